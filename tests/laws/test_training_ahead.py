"""R21: batches made by threads beside the net: the numbers of a run are the same, and no thread outlives it."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from albums import album, codec_folder
from albums import pictured as shown
from inkdrop.bundle import locate
from inkdrop.codec import encoded
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw
from inkdrop.data.augment import flip as mirror
from inkdrop.errors import BadArgument, BadData, InkdropWarning
from inkdrop.find import Part
from inkdrop.recipe import open_data
from inkdrop.settings import Train
from inkdrop.train.ahead import Ahead
from inkdrop.train.feed import Feed
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of, points

CPU = torch.device("cpu")


def threads() -> list[str]:
    """The names of the threads of prefetching that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


def equal(a: tuple[torch.Tensor, Cond | None], b: tuple[torch.Tensor, Cond | None]) -> bool:
    """Whether two batches are the same, bit for bit."""
    fields = [[x0, *(v for v in vars(cond).values() if isinstance(v, torch.Tensor))] for x0, cond in (a, b)]
    return len(fields[0]) == len(fields[1]) and all(map(torch.equal, *fields))


def pictured(**train: Any) -> Any:
    """Digits that are augmented and shown with noised small copies: all that a batch draws."""
    recipe = digits(**{"augment": 0.3, "steps": 6, "batch": 6, **train})
    net = Part("unet", {**recipe.net.knobs, "augment": True})
    return replace(recipe, net=net, image=Part("lowres", {"factor": 2}), augment=(Part("crop"),))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_part_is_that_of_the_batch_whoever_made_it(workers):
    """Against Feed.take of the part alone; and in any order of updates, as after a return."""
    feed = Feed(pictured(workers=workers), CPU)
    trainer = Trainer(pictured(workers=workers), None)
    schedule = trainer.denoiser.schedule
    ahead = Ahead(feed, schedule, CPU)
    with ahead.running(9):
        for update in (0, 1, 2, 2, 5, 6, 1, 2):
            rows = ahead.rows(update)
            for places in (range(6), range(2, 5), range(5, 6)):
                own = [rows[place] for place in places]
                assert equal(ahead.part(update, own, places), feed.take(own, Draw(0, update, places), schedule)), (
                    update,
                    places,
                )
        assert len(threads()) == workers


def test_a_process_makes_its_own_places_alone(monkeypatch):
    feed = Feed(points(workers=0), CPU)
    schedule = Trainer(points(), None).denoiser.schedule
    asked: list[tuple[Sequence[int], Sequence[int]]] = []
    take = feed.take
    monkeypatch.setattr(
        feed, "take", lambda rows, draw, at: (asked.append((rows, draw.places)), take(rows, draw, at))[1]
    )
    ahead = Ahead(feed, schedule, CPU, range(3, 6))
    rows = ahead.rows(4)
    for places in (range(3, 6), range(3, 4), range(4, 6)):
        x0, cond = ahead.part(4, [rows[place] for place in places], places)
        assert torch.equal(x0, feed.data.take([rows[place] for place in places])[0])
        assert cond is not None
        assert len(cond) == len(places)
    assert [(list(rows_), list(places)) for rows_, places in asked] == [(list(rows[3:6]), [3, 4, 5])]
    ahead.part(4, rows[2:4], range(2, 4))  # not all its own: made for itself
    assert [list(places) for _, places in asked] == [[3, 4, 5], [2, 3]]


def runs(folder: Any, recipe: Any, workers: int, *, stop: int | None = None) -> tuple[Any, Any]:
    """What a run leaves, stopped and resumed if so said."""
    recipe = replace(recipe, train=replace(recipe.train, workers=workers))
    fit(recipe, folder, max_steps=stop)
    if stop:
        resume(folder)
    return files_of(locate(folder)), log_of(folder)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", ["conditions", "stages", "windows", "aware"])
def test_a_run_is_bit_equal_at_any_number_of_workers(kind, accumulate, tmp_path):
    recipe = {
        "conditions": lambda: pictured(accumulate=accumulate),
        "stages": lambda: digits(stages=((2, 0.5),), accumulate=accumulate),
        "windows": lambda: digits(windows=(0.5,), accumulate=accumulate),
        "aware": lambda: points(draws="aware", accumulate=accumulate),
    }[kind]()
    if kind == "windows":
        recipe = replace(recipe, net=Part("unet", {**recipe.net.knobs}))
    alone = runs(tmp_path / "0", recipe, 0)
    assert runs(tmp_path / "3", recipe, 3) == alone
    assert runs(tmp_path / "1", recipe, 1, stop=3) == alone


@pytest.mark.parametrize("workers", [1, 3])
def test_skips_returns_and_memory_are_bit_equal_too(workers, monkeypatch, tmp_path):
    """Three skips in a row at 11 to 13 take the run back to 8; memory runs out at update 18."""
    losses, went = Trainer.losses, list[int]()

    def troubled(self, rows, places=None):
        terms = losses(self, rows, places)
        if 11 <= self.update <= 13 and not self.guard.rollbacks:
            went.append(self.update)
            terms["loss"] = terms["loss"] * math.nan
        if self.update >= 18 and len(rows) > 2:
            raise MemoryError
        return terms

    monkeypatch.setattr(Trainer, "losses", troubled)
    alone = runs(tmp_path / "0", points(skips=3), 0)
    assert went
    assert runs(tmp_path / "n", points(skips=3), workers) == alone
    assert any("rollback" in line for line in alone[1])
    assert any("out_of_memory" in line for line in alone[1])


def test_batches_are_made_in_threads_while_a_run_is_on_and_only_then(monkeypatch, tmp_path):
    made: dict[str, int] = {}
    take = Feed.take

    def seen(self, rows, draw, schedule, **more):
        name = threading.current_thread().name
        made[name] = made.get(name, 0) + (not more)
        return take(self, rows, draw, schedule, **more)

    monkeypatch.setattr(Feed, "take", seen)
    fit(points(workers=1), tmp_path / "run")
    assert made == {"MainThread": 1, "prefetch-0": 24}, "the trial is the main thread's, the batches are not"
    trainer = Trainer(points(workers=2), None)
    trainer.step()
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_no_thread_is_left_after_an_exception(error, monkeypatch, tmp_path):
    def broken(self, net, update):
        assert threads()
        raise error

    monkeypatch.setattr("inkdrop.train.ema.Ema.update", broken)
    with contextlib.suppress(KeyboardInterrupt, ZeroDivisionError):
        fit(points(workers=2), tmp_path / "run")
    assert not threads()


def test_an_unreadable_sample_ends_the_run_at_its_own_update(monkeypatch, tmp_path):
    """It is read ahead; those before it are trained on first."""
    data = open_data(points().data, "train")
    kind, bad = type(data), None
    take = kind.take

    def damaged(self, rows):
        if bad in rows and threading.current_thread() is not threading.main_thread():
            raise BadData(f"{self.name(bad)}: cannot be read")
        return take(self, rows)

    bad = Ahead(Feed(points(), CPU), Trainer(points(), None).denoiser.schedule, CPU).rows(7)[3]
    monkeypatch.setattr(kind, "take", damaged)
    with pytest.raises(BadData, match=r"cannot be read; stopped at update 7; go on from step-00000007 with: inkdrop"):
        fit(points(workers=2, preview_every=100), tmp_path / "run")


def test_a_text_that_is_cut_is_warned_of_once_by_any_thread():
    """The reader of a feed tells it; without a feed it warns each time."""
    feed = Feed(points(), CPU)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        workers = [threading.Thread(target=feed._hear, args=(f"text {i}",)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [w.category for w in heard] == [InkdropWarning]


def test_workers_are_at_least_none():
    with pytest.raises(BadArgument, match=r"train\.workers: got -1, need at least 0"):
        Train(workers=-1)


# ---- latents that are not kept -----------------------------------------------------------------------------------


@pytest.mark.long
def test_latents_made_at_every_update_are_those_of_the_cache(tmp_path):
    """Within 1e-5: the encoder is asked in other chunks, and sums round otherwise."""
    folder, codec = album(tmp_path / "album"), codec_folder(tmp_path / "codec")
    recipe = shown(folder, label=True, codec=codec, image=Part("lowres", {"factor": 2}))
    schedule = Trainer(recipe, None).denoiser.schedule
    kept, made = (Feed(replace(recipe, train=replace(recipe.train, cache=cache)), CPU) for cache in (True, False))
    for held_out in (False, True):
        rows, draw = range(7), Draw(0, 3, range(7))
        (z, cond), (own, told) = (feed.take(rows, draw, schedule, held_out=held_out) for feed in (kept, made))
        assert z.shape[1:] == kept.shape == made.shape == (2, 4, 4)
        torch.testing.assert_close(own, z, rtol=1e-5, atol=1e-5)
        assert equal((z, cond), (z, told))
        assert z.std() > 0.05, "the test is blind"


@pytest.mark.long
def test_augmented_pictures_are_encoded_after_it_and_equal_at_any_number_of_workers(tmp_path):
    folder, codec = album(tmp_path / "album"), codec_folder(tmp_path / "codec")
    flip = (Part("flip", {"told": False}),)
    recipe = replace(shown(folder, codec=codec, cache=False, steps=5), augment=flip)
    plain = Feed(replace(recipe, augment=()), CPU)
    feed, draw = Feed(recipe, CPU), Draw(0, 3, range(8))
    mirrored = mirror(plain.data.take(range(8))[0], draw)[0]
    assert not torch.equal(mirrored, plain.data.take(range(8))[0])
    assert torch.equal(feed.take(range(8), draw, None)[0], encoded(feed.codec, mirrored))
    alone = runs(tmp_path / "0", recipe, 0)
    assert runs(tmp_path / "2", recipe, 2) == alone


@pytest.mark.long
def test_what_the_cache_cannot_do_is_one_line(tmp_path):
    folder, codec = album(tmp_path / "album"), codec_folder(tmp_path / "codec")
    recipe = shown(folder, codec=codec)
    for wrong, text in (
        (replace(recipe, augment=(Part("flip"),)), "use augment=none, or train.cache=false"),
        (points(cache=False), "train.cache: got false, but there is no codec"),
    ):
        with pytest.raises(BadArgument, match=text) as caught:
            Feed(wrong, CPU)
        assert "\n" not in str(caught.value)
