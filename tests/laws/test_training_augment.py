"""Augmentation as a condition: told in training alone, never dropped, 0 everywhere else, and the same however split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from inkdrop.bundle import load, save
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw
from inkdrop.data.augment import affine, crop, flip
from inkdrop.errors import BadArgument, BadShape, UnknownName
from inkdrop.find import Part, names
from inkdrop.generate import sample
from inkdrop.recipe import dump, read, set_knobs
from inkdrop.train.feed import Feed
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of, points

CPU = torch.device("cpu")
BOTH = (Part("flip"), Part("affine", {"share": 0.5}))


def augmented(*parts: Part, **train):
    return replace(digits(**train), augment=parts or BOTH)


def test_the_room_is_listed_and_set_from_the_command_line():
    assert names("augmentations") == ["affine", "crop", "flip"]
    made = set_knobs(digits(), ["augment=flip,crop", "crop.pad=3", "flip.told=false"])
    assert made.augment == (Part("flip", {"told": False}), Part("crop", {"pad": 3}))
    assert set_knobs(made, ["augment=crop"]).augment == (Part("crop", {"pad": 3}),)
    assert set_knobs(made, ["augment=none"]).augment == digits().augment == ()
    assert read(dump(made)) == made


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: set_knobs(digits(), ["augment=flop"]), UnknownName, "flop"),
        (lambda: set_knobs(digits(), ["augment.pad=3"]), BadArgument, "need names"),
        (lambda: set_knobs(augmented(Part("crop")), ["crop.pad=x"]), BadArgument, "crop.pad"),
        (lambda: Feed(augmented(Part("flip"), Part("flip")), CPU), BadArgument, "each once"),
        (lambda: Feed(replace(points(), augment=BOTH), CPU), BadShape, "need pictures"),
        (lambda: Feed(replace(augmented(), codec="nowhere"), CPU), BadArgument, "beside a codec"),
    ],
)
def test_what_has_no_meaning_is_one_line(make, error, text):
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_net_that_is_not_told_is_refused_before_training():
    with pytest.raises(BadArgument, match="got augmentation, this net takes label"):
        Trainer(replace(augmented(), net=Part("unet_latent", {"width": 16})), None)


def test_a_feed_tells_what_it_did_and_nothing_of_what_is_held_out():
    """Pictures and numbers are those of the functions themselves, on streams that do not overlap."""
    feed = Feed(augmented(), CPU)
    rows, draw = range(40), Draw(0, 3, range(40))
    x0, cond = feed.take(rows, draw, None)
    plain, _ = feed.data.take(rows)
    mirrored, first = flip(plain, draw)
    assert feed.augmented
    assert not Feed(digits(), CPU).augmented
    assert cond.augmentation.shape == (40, 10)
    assert torch.equal(cond.augmentation[:, :1], first)
    moved = (cond.augmentation[:, 1:] != 0).any(1)
    assert 10 < int(moved.sum()) < 40
    assert torch.equal(x0[~moved], mirrored[~moved])
    assert not torch.equal(x0[moved], mirrored[moved])
    own = feed._augmentation(mirrored, draw)[1][:, 1:]
    assert torch.equal(cond.augmentation[:, 1:], own), "what comes before moves no numbers"
    assert not torch.equal(own, affine(mirrored, draw, share=0.5)[1]), "or the numbers of the two would be one"
    held, told = feed.take(rows, draw, None, held_out=True)
    assert torch.equal(held, feed.held_out.take(rows)[0])
    assert told is None or told.augmentation is None


def test_two_augmentations_draw_independently():
    """The mirror of the second with the first's numbers would be the first's: here they agree in half of all rows."""
    feed = Feed(augmented(Part("flip"), Part("crop", {"pad": 1})), CPU)
    _, cond = feed.take(range(1000), Draw(0, 0, range(1000)), None)
    mirrored, dy = cond.augmentation[:, 0], cond.augmentation[:, 1]
    assert abs(torch.corrcoef(torch.stack([mirrored, dy]))[0, 1]) < 4 / 1000**0.5


def test_not_told_is_changed_all_the_same():
    feed = Feed(augmented(Part("flip", {"told": False}), Part("crop")), CPU)
    draw = Draw(0, 0, range(20))
    x0, cond = feed.take(range(20), draw, None)
    whole = flip(feed.data.take(range(20))[0], draw)[0]
    assert cond.augmentation.shape == (20, 2)
    still = (cond.augmentation == 0).all(1)
    assert torch.equal(x0[still], whole[still])
    assert feed.terms.augmentation == 2
    silent = Feed(augmented(Part("flip", {"told": False})), CPU)
    assert silent.terms.augmentation == 0
    assert silent.take(range(20), draw, None)[1].told == ("label",)
    for function in (flip, crop, affine):
        assert function(whole, draw, told=False)[1].shape == (20, 0)
        assert torch.equal(function(whole, draw, told=False)[0], function(whole, draw)[0])


def shaken(recipe, seed=0):
    """A trainer whose averaged net has random weights everywhere, the embedding of augmentation too."""
    trainer = Trainer(recipe, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for net in (trainer.denoiser.net, trainer.ema.net):
            for parameter in net.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trainer


@pytest.mark.parametrize("net", [None, Part("mlp", {"width": 8}), Part("dit", {"width": 8, "depth": 1, "heads": 1})])
def test_zeros_mean_nothing_and_numbers_something(net):
    recipe = augmented() if net is None else replace(augmented(), net=net)
    net = shaken(recipe).denoiser.net.eval()
    x, clock = torch.randn(3, 1, 8, 8), torch.rand(3)
    plain = net(x, clock, None)
    assert torch.equal(net(x, clock, Cond(augmentation=torch.zeros(3, 10))), plain)
    told = net(x, clock, Cond(augmentation=torch.eye(10)[:3]))
    assert ((told - plain).flatten(1).abs().max(1).values > 1e-4).all()
    with pytest.raises(BadShape, match="cond augmentation"):
        net(x, clock, Cond(augmentation=torch.zeros(3, 9)))


def test_dropped_conditions_keep_their_numbers(monkeypatch):
    seen = []
    trainer = Trainer(augmented(null_rate=0.9), None)
    trainer.loss = lambda denoiser, x0, cond, draw: seen.append(cond) or {"loss": x0.flatten(1).sum(1)}
    trainer.losses(range(50))
    [cond] = seen
    assert cond.null_rows("label").sum() > 30
    assert torch.equal(cond.augmentation, trainer.feed.take(range(50), Draw(0, 0, range(50)), None)[1].augmentation)
    assert torch.equal(cond.take(slice(3, 5)).augmentation, cond.augmentation[3:5])
    assert torch.equal(Cond.cat([cond, cond]).augmentation, cond.augmentation.repeat(2, 1))


def test_previews_and_held_out_losses_are_told_nothing(monkeypatch):
    """They are those of the same net without the embedding."""
    trainer = shaken(augmented())
    before = trainer.preview(2), trainer.held_out_loss()
    with torch.no_grad():
        trainer.ema.net.context.augmentation.weight.zero_()
    after = trainer.preview(2), trainer.held_out_loss()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_it_resumes_bit_for_bit_and_micro_batches_are_the_batch(tmp_path):
    recipe = augmented(batch=6)
    fit(recipe, tmp_path / "whole")
    fit(recipe, tmp_path / "parts", max_steps=3)
    resume(tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    last = "checkpoints/step-00000006"
    assert files_of(tmp_path / "whole" / last) == files_of(tmp_path / "parts" / last)
    one, three = (Trainer(augmented(batch=6, accumulate=n), None) for n in (1, 3))
    for trainer in (one, three):
        trainer.gradient()
    for mine, theirs in zip(one.denoiser.parameters(), three.denoiser.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert one.denoiser.net.context.augmentation.weight.grad.abs().max() >= 0


def test_the_embedding_learns(tmp_path):
    trainer = Trainer(augmented(batch=16, lr=1e-2, warmup=0), None)
    for _ in range(4):
        trainer.step()
    assert trainer.denoiser.net.context.augmentation.weight.abs().max() > 1e-3


def test_a_checkpoint_keeps_it(tmp_path):
    trainer = shaken(augmented())
    save(trainer.bundle(), tmp_path / "one")
    back = load(tmp_path / "one")
    assert_close(sample(back, 2), trainer.preview(2), rtol=0, atol=0)
    assert back.denoiser.net.context.augmentation.weight.shape[1] == 10
