"""`inkdrop eval RUN --nll`: bits a dimension of held-out data from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkdrop.bundle import load, save
from inkdrop.cli import main
from inkdrop.data.digits import digits as digit_data
from inkdrop.evals.bound import bound
from inkdrop.evals.likelihood import Settings, likelihood
from inkdrop.evals.nll import dequantise, nll
from inkdrop.evals.stream import subset
from inkdrop.find import Part, build
from inkdrop.train.loop import fit
from runs import digits, points, untrained

pytestmark = pytest.mark.app


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Digits with classes, by a net of random weights; points of a line, which are continuous."""
    folder = tmp_path_factory.mktemp("runs")
    made = untrained(digits(), (1, 8, 8), tuple(map(str, range(10))))
    save(replace(made, card={"updates": 2}), folder / "digits")
    fit(replace(points(steps=2), data=Part("mixture1d", {"count": 90})), folder / "line")
    return folder


@pytest.fixture
def inkdrop(runs, monkeypatch, capsys):
    """The command line beside the runs: (exit code, stdout, stderr)."""
    monkeypatch.chdir(runs)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["eval", *[str(arg) for arg in args]])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return end.value.code or 0, shown.out, shown.err

    return run


FEW = ("--steps", 4, "--set", "nll.flow_steps=3", "--set", "nll.draws=3")


def test_the_figures_are_those_of_the_bare_conditional_model(inkdrop, runs):
    """JSON and table against direct calls: each image with its class, without the plan's clipping."""
    code, out, err = inkdrop("digits", "--nll", "-n", 5, "--seed", 7, *FEW, "--grid", "linspace", "--out", "nll.json")
    assert code == 0, err
    got = json.loads((runs / "nll.json").read_text())
    bundle, data = load(runs / "digits"), digit_data("test")
    rows = subset(360, 5, seed=7)
    assert got["images"]["row"] == rows
    x, cond = data.take(rows)
    assert cond is not None
    grid = build("grids", Part("linspace"), bundle.schedule, 4)
    chain = bound(bundle.denoiser, x, grid, levels=17, cond=cond, seed=7, images=rows)
    assert got["images"]["bound"] == pytest.approx(chain.total.tolist(), rel=1e-5)
    bare = bound(bundle.denoiser, x, grid, levels=17, cond=cond.null(), seed=7, images=rows)
    assert got["images"]["bound"] != pytest.approx(bare.total.tolist(), rel=1e-4)
    flow = Settings(flow_steps=3).flow(bundle.schedule)
    each = [
        nll(
            bundle.denoiser,
            dequantise(x, 17, seed=7, images=rows, draw=k),
            flow,
            cond=cond,
            seed=7,
            images=rows,
            draw=k,
        )
        for k in range(3)
    ]
    want = torch.stack([one.bits for one in each]).mean(0) + 3  # a bin is 1/8 wide
    assert got["images"]["flow"] == pytest.approx(want.tolist(), rel=1e-4)
    assert got["settings"]["steps"] == 4
    assert (got["data"]["n"], got["data"]["fingerprint"], got["seed"]) == (360, data.fingerprint, 7)
    assert got["checkpoint"]["updates"] == 2
    assert f"{got['bound']['bits']:.4f}" in out
    assert f"{got['flow']['bits']:.4f}" in out
    assert f"{got['flow']['se_of_draws']:.4f}" in out
    assert "all 17 values alike  4.0875" in out
    assert "4 asks an image, grid linspace" in out
    assert "24 asks an image, 1 derivative(s) each (rademacher), 3 draw(s)" in out
    assert "of the bare conditional model: own classes, no guidance" in out
    assert "x0 clipped" not in out
    assert "held-out images, 4 asks each of the chain and 24 of the flow: about " in err


def test_a_bound_worse_than_no_model_says_what_to_try(inkdrop, runs):
    """Ten asks of a net of random weights on cosine, whose first step divides its error by alpha, unless it clips."""
    how = ("digits", "--nll", "-n", 5, "--seed", 7, "--steps", 10, "--set", "nll.flow_steps=2", "--out", "nll.json")
    note, said = "note: the bound is above all values alike; --set nll.clip=true", []
    for more in ((), ("--set", "nll.clip=true")):
        code, out, err = inkdrop(*how, *more)
        assert code == 0, err
        said.append((json.loads((runs / "nll.json").read_text())["bound"]["bits"], note in out, "x0 clipped" in out))
    (bare, *first), (clipped, *second) = said
    assert bare > max(clipped, math.log2(17))
    assert (first, second) == ([True, False], [False, True])


def test_by_default_it_is_64_images_and_the_whole_chain(inkdrop, runs, monkeypatch):
    """T steps; knobs that were not given are `Settings`' own."""
    seen = {}

    def spy(denoiser, data, rows, settings, **more):
        seen.update(count=len(rows), settings=settings, training=denoiser.training)
        return likelihood(denoiser, data, rows[:2], Settings(steps=2, flow_steps=2))

    monkeypatch.setattr("inkdrop.evals.likelihood.likelihood", spy)
    assert inkdrop("digits", "--nll")[0] == 0
    assert seen == {"count": 64, "settings": Settings(), "training": False}
    assert Settings().chain(load(runs / "digits").schedule).times.tolist() == [k / 100 for k in range(100, -1, -1)]


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (("line", "--nll"), "the data are continuous (no levels)"),
        (("digits", "--nll", "--sampler", "heun"), "got sampler, which has no effect"),
        (("digits", "--nll", "--guidance", 2), "got guidance, which has no effect"),
        (("digits", "--nll", "--no-clip"), "got clip, which has no effect"),
        (("digits", "--nll", "--guide", "threshold"), "got guide, which has no effect"),
        (("digits", "--nll", "--noise", "brownian"), "got noise, which has no effect"),
        (("digits", "--nll", "--weak", "digits"), "got weak, which has no effect"),
        (("digits", "--nll", "--set", "sampler.eta=1"), "only nll.KNOB=VALUE has an effect"),
        (("digits", "--nll", "--set", "nll.prob=2"), "unknown name 'prob'; did you mean probes?"),
        (("digits", "--nll", "--set", "nll.draws=many"), "nll.draws: got 'many', need int"),
        (("digits", "--nll", "--set", "nll.trace=sum"), "nll.trace: got 'sum'"),
        (("digits", "--nll", "--set", "nll.trace=exact", "--set", "nll.probes=2"), "the exact trace has none"),
        (("digits", "--nll", "--set", "nll.variance=learned"), "this net does not predict a variance"),
        (("digits", "--nll", "--steps", 101), "got 101, need at most 100"),
        (("digits", "--nll", "-n", 1), "images: got 1, need at least 2"),
        (("digits", "--set", "nll.draws=2"), "which goes with eval --nll alone"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_has_no_effect_or_no_meaning_is_one_line(inkdrop, args, fragment):
    code, out, err = inkdrop(*args)
    assert code == 2, (out, err)
    assert [line for line in err.strip().splitlines() if line.startswith("inkdrop: ") and fragment in line] != [], err
    assert out == ""
