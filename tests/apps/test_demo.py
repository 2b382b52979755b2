"""The demo: its report prints the figures of the checkpoint that is there, and of no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkdrop.bundle import load, locate, save
from inkdrop.demo.report import render
from inkdrop.demo.run import measure, run_demo
from inkdrop.errors import BadArgument, BadData
from inkdrop.screen import Screen

pytestmark = pytest.mark.app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of hardly trained models, scored on a few samples."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with Screen() as screen:
        assert run_demo(out, updates=8, samples=40, screen=screen) == out / "report.html"
    return out


def shown(figures: dict) -> list[str]:
    """Some figures as the report writes them."""
    main = figures["ddim50"]
    return [
        f"{100 * main['classes']['sure']:.1f} %",
        f"{100 * main['classes']['agree']:.1f} %",
        f"{main['fid']:.3g}",
        f"{figures['linear10']['fid']:.3g}",
        main["features"]["hash"],
    ]


def test_report_holds_every_picture_and_figure(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    for figure in shown(json.loads((folder / "figures.json").read_text())):
        assert figure in text
    assert "x0 is clipped to the data's range" in text
    assert text.count("data:image/png;base64,") == len(list((folder / "pictures").glob("*.png"))) == 12


def test_another_checkpoint_gives_other_figures(folder: Path) -> None:
    before = json.loads((folder / "figures.json").read_text())
    was = locate(folder / "runs" / "cosine")
    bundle = load(was)
    with torch.no_grad():  # hardly trained, the last layer is nearly zero: scaling it would change nothing to see
        for parameter in bundle.denoiser.net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    save(replace(bundle, card={**bundle.card, "updates": 12_345}), was.with_name("step-99999999"))
    with Screen() as screen:
        after = measure(folder, samples=40, screen=screen)
    text = render(folder).read_text(encoding="utf-8")
    assert abs(after["ddim50"]["fid"] - before["ddim50"]["fid"]) > 0.01 * before["ddim50"]["fid"]
    assert after["linear10"]["fid"] == before["linear10"]["fid"]  # the other model is as it was
    assert "12,345 updates" in text
    for figure in shown(after):
        assert figure in text


def test_only_a_demo_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with Screen() as screen, pytest.raises(BadArgument, match="holds something else than a demo"):
        run_demo(tmp_path, updates=1, samples=2, screen=screen)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_report_of_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="run inkdrop demo again"):
        render(tmp_path)


def test_pictures_are_of_the_models(folder: Path) -> None:
    """The forward strip starts at the clean digit and ends in noise that both schedules share."""
    import numpy as np
    from PIL import Image

    strips = [
        np.asarray(Image.open(folder / "pictures" / f"forward-{name}.png"), dtype=float)
        for name in ("cosine", "linear")
    ]
    edge, cell = 10, 90  # a scale of 10, a gap of 1 pixel, 8 pixels a side
    first, last = ([s[edge : edge + 80, edge + i * cell : edge + i * cell + 80] for s in strips] for i in (0, 5))
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(last[0] - last[1]).mean() < 2  # alpha(1) is under 0.007 in both
    assert np.abs(first[0] - last[0]).mean() > 40
