"""Models of latents: decoded by a last question, and edited as pictures are: encode, edit, decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from albums import KINDS, SHAPE, random_codec, shake
from inkdrop import editing, eval_jobs
from inkdrop.bundle import Bundle
from inkdrop.classifier import NoisyClassifier, with_parts
from inkdrop.codec import Codec
from inkdrop.core.ask import Ask, Belief
from inkdrop.core.cond import Cond, Terms
from inkdrop.denoiser import Denoiser
from inkdrop.drive import drive, watch
from inkdrop.edit.decoded import decoded
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.find import Part
from inkdrop.generate import parts_of, sample, steps
from inkdrop.latent import inside
from inkdrop.model import Plain
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe, denoiser_of
from inkdrop.screen import Screen
from inkdrop.settings import Train
from inkdrop.train.classifier import fit_classifier

NET = Part("unet", {"width": 4, "multipliers": [1], "blocks": 1, "middle_attention": False})
RECIPE = Recipe(
    data=None,
    net=NET,
    schedule=Part("cosine", {"steps": 100}),
    plan=Plan(steps=3, guide=(Part("cfg", {"scale": 1.5}),)),
    train=Train(null_rate=0.1),
)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return random_codec()


@pytest.fixture(scope="module")
def model(codec: Codec) -> Bundle:
    """A guided model of latents (2, 4, 4) of pictures (3, 8, 8), with every weight random."""
    return made(codec)


def made(codec: Codec | None, *, seed: int = 0, recipe: Recipe = RECIPE) -> Bundle:
    shape = SHAPE if codec is None else codec.latent_shape
    denoiser = denoiser_of(recipe, shape, Terms(classes=len(KINDS))).eval()
    shake(denoiser, seed=seed, by=0.2)
    return Bundle(recipe, denoiser, SHAPE, KINDS, codec=codec)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_the_last_question_is_the_decoder_s(model: Bundle, codec: Codec) -> None:
    """Asked once, about the latent that the sampling ended with, at the clean level and without a condition."""
    asks: list[Ask] = []

    def spy(name: str) -> Callable[[Ask], Belief]:
        def answer(ask: Ask) -> Belief:
            asks.append(ask)
            return parts_of(model)[name](ask)

        return answer

    def work() -> Any:
        latent = yield Ask(torch.ones(2, 2, 4, 4), model.schedule(0.5), None)
        return latent.x0

    parts = {name: spy(name) for name in parts_of(model)}
    assert set(parts) == {"net", "decode"}
    got = drive(decoded(work()), parts)
    assert [ask.of for ask in asks] == ["net", "decode"]
    assert asks[1].level.clean
    assert asks[1].cond is None
    assert torch.equal(got, codec.decode(asks[1].x).clamp(-1, 1))
    cond = Cond(label=torch.tensor([0, 1]))
    latent = sample(inside(model), 2, cond=cond, seed=3)
    assert latent.shape == (2, 2, 4, 4)
    assert_close(sample(model, 2, cond=cond, seed=3), codec.decode(latent).clamp(-1, 1), rtol=0, atol=0)


def test_progress_counts_the_net_s_questions_and_ends_with_the_picture(model: Bundle) -> None:
    seen = list(steps(model, 2, seed=3))
    assert [step.x.shape[1:] for step in seen] == [(2, 4, 4)] * 3 + [SHAPE]
    assert [step.level.clean for step in seen] == [False] * 3 + [True]
    assert torch.equal(seen[-1].x0, sample(model, 2, seed=3))
    heard: list[Any] = []
    sample(model, 2, on_step=lambda done, step: heard.append(step.number) and None)
    assert heard == [0, 1, 2, 3]
    assert len(list(watch(decoded(iter_of(torch.zeros(1, 2, 4, 4))), parts_of(model)))) == 2


def iter_of(latent: Tensor) -> Any:
    """A sampling that asks nothing."""
    yield from ()
    return latent


def test_decoding_never_couples_rows(model: Bundle, codec: Codec) -> None:
    """A row is decoded the same whatever its neighbours are, bit for bit; and images at any batch to rounding."""
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    other = z.clone()
    other[1] = 1e3
    mine, theirs = (codec(Ask(part, model.schedule(0.5))).x0 for part in (z, other))
    assert torch.equal(mine[[0, 2, 3]], theirs[[0, 2, 3]])
    assert not torch.equal(mine[1], theirs[1])
    assert_close(sample(model, 5, batch=2), sample(model, 5), rtol=1e-4, atol=1e-5)


# ---- editing -----------------------------------------------------------------------------------------------------

KEEP = torch.zeros(8, 8, dtype=torch.bool)
KEEP[:, :5] = True
KEEP[0, 1] = False

VERBS: list[tuple[str, dict[str, Any]]] = [
    ("img2img", {"strength": 0.5, "label": [0, 1, 2]}),
    ("img2img", {"strength": 0.7, "guidance": 2.0, "label": 1, "sampler": "ddpm", "seed": 5}),
    ("vary", {"count": 2, "strength": 0.6}),
    ("vary", {"count": 2, "strength": 0.6, "eta": 0.5, "label": 1}),
    ("invert", {"depth": 0.8, "label": 0}),
]
EACH = [pytest.param(*row, id=f"{row[0]} {i}", marks=[pytest.mark.long] * (i > 1)) for i, row in enumerate(VERBS)]


def encoded(codec: Codec, x: Tensor) -> Tensor:
    with torch.no_grad():
        return codec.encode(x)


def pictures_of(codec: Codec, z: Tensor) -> Tensor:
    with torch.no_grad():
        flat = codec.decode(z.reshape(-1, *z.shape[-3:])).clamp(-1, 1)
    return flat.reshape(*z.shape[:-3], *SHAPE)


@pytest.mark.parametrize(("verb", "knobs"), EACH)
def test_a_verb_is_encoding_the_verb_on_latents_and_decoding(verb, knobs, model, codec, x) -> None:
    run = editing.VERBS[verb]
    got, inner = run(model, x, **knobs), run(inside(model), encoded(codec, x), **knobs)
    assert_close(got, inner if verb == "invert" else pictures_of(codec, inner), rtol=1e-4, atol=1e-5)
    assert got.dtype == torch.float32
    by_batch = run(model, x, **knobs, batch=2)
    assert_close(by_batch, got, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_ways_and_round_trips_too(model: Bundle, codec: Codec, x: Tensor) -> None:
    way = editing.interpolate(model, x[:1], x[1:2], count=3, label=1)
    inner = editing.interpolate(inside(model), encoded(codec, x[:1]), encoded(codec, x[1:2]), count=3, label=1)
    assert_close(way, pictures_of(codec, inner), rtol=1e-4, atol=1e-5)
    seeds = editing.interpolate_seeds(model, (1, 2), count=2, label=0)
    assert_close(seeds, pictures_of(codec, editing.interpolate_seeds(inside(model), (1, 2), count=2, label=0)))
    states = editing.invert(model, x, depth=0.5, label=2)
    assert states.shape == (3, 2, 4, 4)
    want = pictures_of(codec, editing.decode(inside(model), states, depth=0.5, label=2))
    assert_close(editing.decode(model, states, depth=0.5, label=2), want, rtol=1e-4, atol=1e-5)
    near = pictures_of(codec, encoded(codec, x))  # a round trip can only be as near as the autoencoder
    back = editing.decode(model, states, depth=0.5, label=2)
    assert (back - near).abs().mean() < 0.1 * (near - x).abs().mean()


@pytest.mark.parametrize("keep", [KEEP, KEEP.expand(3, 3, 8, 8), KEEP[None, None]])
def test_inpainting_keeps_pixels_exactly_and_latents_that_are_whole(keep: Tensor, model, codec, x) -> None:
    """A latent (factor 2) is held where all four of its pixels are kept; the kept pixels are laid over the result."""
    got = editing.inpaint(model, x, keep, label=1)
    mask = KEEP.expand(3, 3, 8, 8)
    assert torch.equal(got[mask], x[mask])
    whole = KEEP.view(4, 2, 4, 2).all(3).all(1)
    assert whole.sum() == 7
    inner = editing.inpaint(inside(model), encoded(codec, x), whole, label=1)
    assert_close(got, torch.where(mask, x, pictures_of(codec, inner)), rtol=1e-4, atol=1e-5)
    assert torch.equal(inner[..., whole], encoded(codec, x)[..., whole])
    colour = KEEP.expand(3, 8, 8).clone()
    colour[0] = True  # of a pixel that is kept in one channel only, nothing is known of its latent
    got = editing.inpaint(model, x, colour, label=1)
    assert torch.equal(got[:, colour], x[:, colour])
    assert_close(got, torch.where(colour, x, pictures_of(codec, inner)), rtol=1e-4, atol=1e-5)


def test_strength_0_is_the_picture_itself_not_the_autoencoder_s(model: Bundle, codec: Codec, x: Tensor) -> None:
    got = editing.img2img(model, x, strength=0)
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()
    assert (pictures_of(codec, encoded(codec, x)) - x).abs().max() > 0.1


def test_pictures_are_not_asked_about_in_training_mode(model: Bundle, codec: Codec, x: Tensor) -> None:
    model.codec.train()
    editing.img2img(model, x, strength=0.5)
    assert model.codec.training
    model.codec.eval()


WRONG: list[tuple[Callable[[Bundle, Tensor], Any], type[Exception], str]] = [
    (lambda m, x: editing.img2img(m, x, clip=True), BadArgument, "clip: got a model of latents, which have no range"),
    (lambda m, x: editing.vary(m, x, guide=["threshold"]), BadArgument, "threshold: got a model of latents"),
    (lambda m, x: sample(m, 1, clip=True), BadArgument, "clip: got a model of latents, which have no range; sample"),
    (lambda m, x: sample(m, 1, guide=["threshold"]), BadArgument, "threshold: got a model of latents"),
    (lambda m, x: editing.vary(m, x, strength=0), BadArgument, "strength: got 0"),
    (lambda m, x: editing.img2img(m, x, strength=0, label=7), BadArgument, "class: got 7, need a number in [0, 2]"),
    (lambda m, x: editing.img2img(m, x, strength=2.0), BadArgument, "strength: got 2"),
    (lambda m, x: editing.img2img(m, x[:, :2]), BadShape, "img2img images: got torch.float32 (3, 2, 8, 8), need float"),
    (lambda m, x: editing.img2img(m, 2 * x), BadData, "img2img images: got values in [-"),
    (lambda m, x: editing.img2img(m, x / 0), BadData, "img2img images: got values that are not finite"),
    (lambda m, x: editing.img2img(m, x[:0]), BadArgument, "img2img images: got none, need at least 1"),
    (lambda m, x: editing.interpolate(m, x[:1], x), BadShape, "interpolate: got images of (1, 2, 4, 4) and (3, 2"),
    (lambda m, x: editing.inpaint(m, x, KEEP.float()), BadShape, "inpaint keep: got torch.float32"),
    (lambda m, x: editing.inpaint(m, x, KEEP[:4]), BadShape, "inpaint keep: got torch.bool (4, 8)"),
    (lambda m, x: editing.inpaint(m, x, KEEP | True), BadArgument, "inpaint keep: got a mask that keeps every pixel"),
    (lambda m, x: editing.inpaint(m, x, KEEP & False), BadArgument, "inpaint keep: no latent is kept whole"),
    (lambda m, x: editing.decode(m, x), BadShape, "decode images: got torch.float32 (3, 3, 8, 8), need float (B, 2"),
    (
        lambda m, x: editing.outpaint(m, x, left=2),
        BadArgument,
        "outpaint: got a model of latents, need one of pictures",
    ),
    (lambda m, x: editing.restore(m, x, "gray"), BadArgument, "restore: got a model of latents, need one of pictures"),
    (lambda m, x: inside(made(None)), BadArgument, "latents: this model works on samples themselves"),
]


@pytest.mark.parametrize(("run", "error", "text"), WRONG, ids=[f"{i} {r[2][:40]}" for i, r in enumerate(WRONG)])
def test_what_latents_cannot_do_is_one_line(run, error, text, model, x) -> None:
    with pytest.raises(error) as caught:
        run(model, x)
    assert one_line(caught).startswith(text)


@pytest.mark.long
def test_a_model_of_pictures_is_edited_as_it_was(x: Tensor) -> None:
    """The verbs of `in_latents` do nothing else to it, nor to a bare denoiser."""
    plain = made(None)
    bare: Denoiser = plain.denoiser
    how: dict[str, Any] = {"strength": 0.5, "plan": Plan(steps=3, guide=())}
    mine = editing.img2img(plain, x, label=1, **how)
    assert torch.equal(mine, editing.img2img(bare, x, cond=Cond(label=torch.tensor([1, 1, 1])), **how))
    inpainted = editing.inpaint(plain, x, KEEP, label=1)
    assert torch.equal(inpainted[..., KEEP], x[..., KEEP])


# ---- what else asks a model --------------------------------------------------------------------------------------


def test_likelihood_of_pictures_is_refused(model: Bundle) -> None:
    """Before any data is opened: a density of latents is none of pictures, and a picture is no part of the data."""
    of_pictures = made(None, recipe=replace(RECIPE, image=Part("gray")))
    for bundle, text in ((model, "of latents"), (of_pictures, "that starts from a picture")):
        with pytest.raises(BadArgument) as caught, Screen() as screen:
            eval_jobs.likelihood_of(bundle, 4, 0, None, {}, (), screen)
        assert one_line(caught) == (
            f"eval --nll: got a model {text}, whose likelihood of pictures is not known; try eval"
        )


@pytest.mark.long
def test_a_guide_must_know_the_same_latents(model: Bundle, codec: Codec) -> None:
    """A weak net of another autoencoder's latents, or a classifier of pictures, would be asked what it cannot know."""
    weak = with_parts(model, weak=made(codec, seed=1))
    assert (sample(weak, 2, guide=["autoguidance"]) - sample(model, 2)).abs().max() > 1e-3
    with pytest.raises(BadArgument, match="weak: was trained with other latents than the model; need the same"):
        with_parts(model, weak=made(random_codec(seed=1)))
    with pytest.raises(
        BadArgument, match=r"weak: made for samples of shape \(3, 8, 8\), but the model works on latent"
    ):
        with_parts(model, weak=made(None))
    judge = NoisyClassifier(RECIPE.schedule, SHAPE, KINDS, {"width": 8, "blocks": 1})
    with pytest.raises(BadArgument, match=r"classifier: made for samples of shape \(3, 8, 8\), but the model works on"):
        with_parts(model, classifier=judge)
    assert "classifier" in with_parts(made(None), classifier=judge).parts
    with pytest.raises(BadArgument, match="classifier: the model works on latents, and this learns"):
        fit_classifier(replace(RECIPE, codec="somewhere"), steps=1, device="cpu")


def test_a_weak_net_must_be_told_the_same() -> None:
    """Attributes, texts and pictures of the model's questions reach the weak net too."""
    mine, theirs = made(None), made(None)
    theirs.attributes = ("hue",)
    with pytest.raises(BadArgument, match="weak: was trained with other attributes than the model; need the same"):
        with_parts(mine, weak=theirs)
    with pytest.raises(BadArgument, match="weak: was trained with other pictures than the model; need the same"):
        with_parts(mine, weak=made(None, recipe=replace(RECIPE, image=Part("gray"))))
    assert "weak" in with_parts(mine, weak=made(None)).parts


@pytest.mark.long
def test_a_model_without_a_recipe_is_one_too(model: Bundle, codec: Codec, x: Tensor) -> None:
    plain = Plain(model.denoiser, SHAPE, KINDS, RECIPE.plan, guidable=True, codec=codec)
    assert torch.equal(sample(plain, 2), sample(model, 2))
    assert torch.equal(editing.img2img(plain, x, label=1), editing.img2img(model, x, label=1))
