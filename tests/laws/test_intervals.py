"""Intervals over images and over seeds, the paired bootstrap, and the shelf on which what was seen is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals import shelf as shelves
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.interval import difference_of_means, frechet_error, mean_of, parts_of, resample, t_quantile
from inkdrop.evals.mmd import CUBIC, mmd
from inkdrop.evals.paired import gap, redraw
from inkdrop.evals.shelf import Shelf


def normals(seed: int, count: int, dim: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dof", [1, 2, 3.7, 19, 400])
@pytest.mark.parametrize("share", [0.9, 0.975, 0.995])
def test_t_quantile_is_scipys(dof: float, share: float) -> None:
    assert t_quantile(share, dof) == pytest.approx(stats.t.ppf(share, dof), rel=1e-9)


def test_intervals_over_seeds_are_scipys() -> None:
    a, b = [1.0, 1.4, 0.7], [2.0, 2.9, 2.2, 2.6]
    found = mean_of(a)
    theirs = stats.t.interval(0.95, 2, loc=np.mean(a), scale=stats.sem(a))
    assert (found.low, found.high, found.dof) == (pytest.approx(theirs[0]), pytest.approx(theirs[1]), 2)
    gone, welch = difference_of_means(a, b), stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (gone.low, gone.high) == (pytest.approx(welch.low), pytest.approx(welch.high))
    assert gone.value == pytest.approx(np.mean(a) - np.mean(b))
    for few in ([], [1.0]):
        with pytest.raises(BadArgument, match="at least 2"):
            mean_of(few)


def test_parts_are_even_and_do_not_depend_on_the_batches() -> None:
    whole = parts_of(1003, 20, 5)
    assert torch.equal(
        whole, torch.cat([parts_of(len(cut), 20, 5, int(cut[0])) for cut in torch.arange(1003).split(77)])
    )
    counts = whole.bincount(minlength=20)
    assert int(counts.max() - counts.min()) <= 1
    assert len(set(whole[::20].tolist())) > 5  # a class that comes at every twentieth place is spread over the parts


def test_jackknife_of_fid_is_how_much_fid_varies() -> None:
    """Over 150 draws of 400 rows: the mean of the errors is the deviation of the distances, to 15 %."""
    dim, count = 4, 400
    mean, cov = torch.full((dim,), 0.3, dtype=torch.float64), 1.5 * torch.eye(dim, dtype=torch.float64)
    values, errors = [], []
    for seed in range(150):
        x = normals(seed, count, dim)
        dealt, parts, whole = parts_of(count, 20, 0), [Moments(dim) for _ in range(20)], Moments(dim)
        whole.update(x)
        for index, part in enumerate(parts):
            part.update(x[dealt == index])
        values.append(frechet(whole.mean, whole.cov, mean, cov))
        errors.append(frechet_error(parts, mean, cov))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)  # a deviation of 150 is known to 6 %


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 250, 6), (40, 250, 60), (40, 30, 60), (300, 250, 60)])
def test_bootstrap_samples_have_the_metrics_of_their_images(n: int, m: int, dim: int) -> None:
    """Whichever of N, M and D is the least."""
    x, y = normals(0, n, dim), normals(1, m, dim, 1.2)
    [found] = redraw([x], y, draws=3)
    w = resample(n, 3, 0)
    assert w.sum(1).tolist() == [n] * 3
    picked = torch.cat([x[i : i + 1].expand(int(n), -1) for i, n in enumerate(w[0])])
    theirs = frechet(picked.mean(0), picked.T.cov(), y.mean(0), y.T.cov())
    assert float(found["fid"][0]) == pytest.approx(theirs, rel=1e-7)
    kernel = ((x @ x.T) / dim + 1) ** 3
    apart = ~torch.eye(n, dtype=torch.bool)  # an image and itself are no pair, also when it was drawn twice
    both = torch.outer(w[0], w[0]) * apart
    cross = ((x @ y.T) / dim + 1) ** 3
    expected = float((both * kernel).sum() / both.sum()) - 2 * float((w[0][:, None] * cross).sum() / (n * m))
    assert float(found["kid"][0]) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_of_kid_sees_all_classes_of_data_that_come_class_by_class() -> None:
    """Held-out images and samples are chosen at random, the same of all models, where there are too many."""
    y = torch.cat([normals(0, 300, 4), normals(1, 300, 4) + 2])
    both, one = torch.cat([normals(2, 200, 4), normals(3, 200, 4) + 2]), normals(4, 400, 4)
    a, b = redraw([both, one], y, draws=40, rows=150)
    assert float((a["kid"] - b["kid"]).mean()) == pytest.approx(
        mmd(both, y, CUBIC).value - mmd(one, y, CUBIC).value, rel=0.25
    )
    whole = redraw([both, one], y, draws=40)
    assert float((whole[0]["kid"] - whole[1]["kid"]).mean()) < 0 < float(whole[1]["kid"].std())
    few = redraw([both[:3]], y)[0]["kid"]
    assert 150 < len(few) < 200  # one draw in 9 is of one image, which has no pairs
    assert bool(few.isfinite().all())
    with pytest.raises(BadShape, match="got 400, 3 images"):
        redraw([both, one[:3]], y)


def test_a_paired_gap_is_surer_than_its_sides_and_true() -> None:
    """What two models share cancels: the gap's error is the deviation of gaps over fresh noise, and small."""
    y, gaps, errors, sides = normals(10_000, 400, 3), [], [], []
    for seed in range(40):
        noise = normals(seed, 300, 3)
        a, b = (noise + far for far in (0.4, 0.35))
        gaps.append(float(fid_of(a, y) - fid_of(b, y)))
        drawn = [each["fid"] for each in redraw([a, b], y, draws=40, seed=seed)]
        found = gap(gaps[-1], *drawn)
        errors.append(found.se)
        sides.append(math.hypot(*(float(each.std()) for each in drawn)))
        assert found.value == gaps[-1]
        assert found.high - found.value == pytest.approx(1.96 * found.se, rel=1e-4)
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.35)  # a deviation of 40 is known to 11 %
    assert np.mean(errors) < 0.3 * np.mean(sides)
    assert np.mean(gaps) > 0


def fid_of(x: Tensor, y: Tensor) -> float:
    return frechet(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


# ---- the shelf ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path))
    return []


def make(calls: list[str], value: float = 1.0):
    def made() -> dict[str, Tensor]:
        calls.append("made")
        return {"x": torch.full((3,), value)}

    return made


def test_a_shelf_keeps_what_was_made_until_something_it_depends_on_changes(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"data": "abc", "seed": 0}
    assert torch.equal(Shelf("things", about).get("a", make(calls))["x"], torch.ones(3))
    assert torch.equal(Shelf("things", about).get("a", make(calls, 2.0))["x"], torch.ones(3))
    assert len(calls) == 1
    for other in ({"data": "abd", "seed": 0}, {"data": "abc", "seed": 1}, {"data": "abc"}):
        assert Shelf("things", other).find("a") is None
    monkeypatch.setattr(shelves, "_own_code", lambda: "another")
    assert Shelf("things", about).find("a") is None


def test_a_damaged_entry_is_made_again_and_a_dropped_one_is_gone(calls: list[str]) -> None:
    shelf = Shelf("things", {"n": 1})
    shelf.get("a", make(calls))
    file = shelf.folder / "a" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(shelf.get("a", make(calls, 3.0))["x"], torch.full((3,), 3.0))
    shelf.drop("a")
    assert shelf.find("a") is None
    shelf.drop("a")
    assert [path.name for path in shelf.folder.iterdir()] == []
    with pytest.raises(BadArgument, match="no plain JSON"):
        Shelf("things", {"bad": math.nan})
