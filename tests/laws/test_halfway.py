"""Autoencoders and classifiers that were stopped: the same call goes on, to the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inkdrop.cli import main
from inkdrop.errors import BadArgument, Diverged
from inkdrop.find import Part
from inkdrop.recipe import Recipe
from inkdrop.train import halfway
from inkdrop.train.autoencoder import Against, fit_autoencoder
from inkdrop.train.classifier import fit_classifier
from inkdrop.train.record import write_atomically
from runs import digits

pytestmark = pytest.mark.long

NET = Part("autoencoder", {"width": 8, "multipliers": (1, 2), "blocks": 1, "latent": 3, "dropout": 0.2})
Fit = Callable[..., object]


def autoencoder(out: Path, *, seed: int = 0, **more: object) -> object:
    against = Against(adversary=1.0, start=0.2)
    return fit_autoencoder(
        Part("digits"), out, net=NET, against=against, steps=20, batch=4, seed=seed, device="cpu", **more
    )


def classifier(out: Path, *, seed: int = 0, **more: object) -> object:
    return fit_classifier(digits(), out, steps=20, batch=8, width=8, seed=seed, device="cpu", **more)


@pytest.fixture(autouse=True)
def _python_hears_ctrl_c() -> Iterator[None]:
    """It is ignored where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(at: int, kind: signal.Signals) -> Callable[[int, int, str], None]:
    """A listener that sends this process a signal after so many updates."""

    def heard(done: int, total: int, text: str) -> None:
        if done == at:
            os.kill(os.getpid(), kind)

    return heard


def weights(folder: Path) -> bytes:
    [file] = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("fit", [autoencoder, classifier])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_what_was_stopped_goes_on_bit_for_bit(fit: Fit, kind: signal.Signals, tmp_path: Path) -> None:
    fit(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"], "nothing else is left"
    out, hidden = tmp_path / "parts", tmp_path / ".parts.halfway"
    with pytest.raises(KeyboardInterrupt):
        fit(out, on_progress=signalled(10, kind))
    assert not out.exists()
    assert json.loads((hidden / "state.json").read_text())["done"] == 10
    seen: list[int] = []
    fit(out, on_progress=lambda done, total, text: seen.append(done))
    assert seen == [20], "the first half is not done again"
    assert weights(out) == weights(tmp_path / "whole")
    assert not hidden.exists()


@pytest.mark.parametrize("fit", [autoencoder, classifier])
def test_a_kill_costs_what_came_after_the_last_save(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy of what lies there after 10 updates is what a SIGKILL leaves."""
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    fit(tmp_path / "whole")
    kept = tmp_path / ".parts.halfway"

    def heard(done: int, total: int, text: str) -> None:
        if done == 10:
            (tmp_path / ".other.halfway").rename(kept)

    fit(tmp_path / "other", on_progress=heard)
    assert json.loads((kept / "state.json").read_text())["done"] == 10
    fit(tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


class Killed(BaseException):
    """What no handler hears."""


@pytest.mark.parametrize("at", [1, 2, 21, 22])
def test_a_kill_within_a_save_leaves_the_one_before(at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two files each: the first and the second of the first save, and of the eleventh."""
    classifier(tmp_path / "whole")
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(halfway, "EVERY", 0.0)

        def write(path: Path, content: object) -> None:
            written.append(path)
            if len(written) == at:
                path.with_name(f".{path.name}.part").write_bytes(b"torn")
                raise Killed
            write_atomically(path, content)

        patch.setattr(halfway, "write_atomically", write)
        with pytest.raises(Killed):
            classifier(tmp_path / "out")
    seen: list[int] = []
    classifier(tmp_path / "out", on_progress=lambda done, total, text: seen.append(done))
    assert seen == ([10, 20] if at < 3 else [20])
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("fit", [autoencoder, classifier])
def test_half_of_another_training_is_refused(fit: Fit, tmp_path: Path) -> None:
    hidden = tmp_path / ".out.halfway"
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", on_progress=signalled(10, signal.SIGINT))
    with pytest.raises(
        BadArgument, match=r"\.out\.halfway: is half of another training; remove it, or choose another --out"
    ):
        fit(tmp_path / "out", seed=1)
    [file] = hidden.glob("*.safetensors")
    file.write_bytes(b"torn")
    with pytest.raises(BadArgument, match=r"\.out\.halfway: cannot be read \(.*\); remove it to begin again$"):
        fit(tmp_path / "out")


def test_one_that_diverged_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would do so again from what was kept."""
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    with pytest.raises(Diverged):
        fit_classifier(digits(), tmp_path / "out", steps=20, batch=8, width=8, lr=1e30, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inkdrop.train.autoencoder.fit_autoencoder", stopped)
    with pytest.raises(SystemExit) as end:
        main(["autoencoder", "digits", "--out", str(tmp_path / "out")])
    assert end.value.code == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_a_recipe_of_another_schedule_is_another_training(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        classifier(tmp_path / "out", on_progress=signalled(10, signal.SIGINT))
    other: Recipe = digits()
    object.__setattr__(other, "schedule", Part("linear", {"steps": 100}))
    with pytest.raises(BadArgument, match="another training"):
        fit_classifier(other, tmp_path / "out", steps=20, batch=8, width=8, device="cpu")
