"""What the terminal shows where it is a file: begun, how far now and then, and what a stop leaves."""

from __future__ import annotations

import pytest

from inkdrop import screen
from inkdrop.screen import Screen


def test_a_log_says_once_a_minute_how_long_a_task_still_takes(monkeypatch, capsys):
    """At a tenth of a task a second from its 20th of 120 on: lines at 60 s and at 120 s, none between."""
    clock = [1000.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    with Screen() as shown:
        report = shown.task("sampling")
        for done in range(20, 41):
            report(done, 120, "")
            clock[0] += 6.0
    assert capsys.readouterr().err.splitlines() == [
        "sampling ...",
        "sampling: 30 of 120, about 9 min left",
        "sampling: 40 of 120, about 8 min left",
    ]


def test_a_stop_says_what_it_leaves(capsys):
    with pytest.raises(KeyboardInterrupt), Screen("the same command goes on from here"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"
    with pytest.raises(ValueError, match="x"), Screen("the same command goes on from here"):
        raise ValueError("x")
    assert capsys.readouterr().err == ""
