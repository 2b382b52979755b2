"""The KL autoencoder: its moments, its sizes, its tiles, and how it is trained."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from inkdrop.errors import BadArgument, BadData, BadShape, Diverged
from inkdrop.evals.perceptual import maps_of, perceptual
from inkdrop.evals.psnr import psnr
from inkdrop.find import Part, find, names
from inkdrop.nets.autoencoder import Autoencoder, Moments, autoencoder, autoencoder_sd
from inkdrop.nets.tiles import in_tiles, starts
from inkdrop.train import autoencoder as training
from inkdrop.train.adversary import PatchGAN, adaptive_weight, hinge
from inkdrop.train.autoencoder import Against, fit_autoencoder, reconstruct

SMALL: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "blocks": 1, "latent": 3}
KNOBS: list[dict[str, Any]] = [
    SMALL,
    {"width": 6, "multipliers": (1, 2, 3), "blocks": 2, "norm_groups": 3, "quant": False},
    {"width": 4, "multipliers": (2,), "blocks": 1, "middle_attention": False},
]
PAGE = (Path(__file__).parents[2] / "docs/nets/autoencoder.md").read_text(encoding="utf-8")


def perturbed(net: nn.Module, seed: int = 0) -> Any:
    """The net with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- moments --------------------------------------------------------------------------------------------------


def test_the_moments_are_those_of_a_gaussian() -> None:
    moments = Moments(randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=2))
    theirs = torch.distributions.Normal(moments.mean, (0.5 * moments.logvar).exp())
    unit = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    assert_close(moments.kl(), torch.distributions.kl_divergence(theirs, unit).flatten(1).sum(1), rtol=1e-12, atol=0)
    noise = randn(3, 2, 4, 5, seed=3)
    assert_close(moments.sample(noise), theirs.mean + theirs.stddev * noise, rtol=1e-12, atol=0)
    assert not Moments(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl().any()


def test_the_log_variance_is_clamped() -> None:
    net = autoencoder((1, 4, 4), **SMALL).double().eval().requires_grad_(False)
    with torch.no_grad():
        net.quant.weight.zero_()
        net.quant.bias.copy_(torch.tensor([7.0, -3.0, 0.0, -100.0, 100.0, 2.0]))
    moments = net.encode(randn(1, 1, 4, 4))
    assert [float(moments.mean[0, i, 0, 0]) for i in range(3)] == [7.0, -3.0, 0.0]
    assert [float(moments.logvar[0, i, 1, 1]) for i in range(3)] == [-30.0, 20.0, 2.0]


# ---- the net --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_row_is_answered_alone_at_any_multiple_of_the_factor(knobs: dict[str, Any]) -> None:
    net = perturbed(autoencoder((2, 8, 8), **knobs).double())
    f = net.factor
    assert f == 2 ** (len(knobs["multipliers"]) - 1)
    assert net.latent_shape == (knobs.get("latent", 4), 8 // f, 8 // f)
    x, order = randn(3, 2, 4 * f, 3 * f), torch.tensor([2, 0, 1])
    with torch.no_grad():
        mean, logvar = net.encode(x)
        y = net.decode(mean)
        assert (mean.shape[1:], y.shape) == ((net.latent_shape[0], 4, 3), x.shape)
        assert torch.equal(net.encode(x).mean, mean)
        for got, want in zip(net.encode(x[order]), (mean, logvar), strict=True):
            assert_close(got, want[order], rtol=1e-10, atol=1e-10)
        for i in range(3):
            row = slice(i, i + 1)
            assert_close(net.encode(x[row]).mean, mean[row], rtol=1e-10, atol=1e-10)
            assert_close(net.decode(mean[row]), y[row], rtol=1e-10, atol=1e-10)
        assert (mean[0] - mean[1]).norm() > 1e-3
        assert (y[0] - y[1]).norm() > 1e-3


def test_a_fresh_residual_block_is_its_shortcut() -> None:
    net = autoencoder((1, 8, 8), **SMALL).double()
    block = net.decoder.middle[0]
    x = randn(2, 16, 3, 3)
    assert torch.equal(block(x), x)
    assert not torch.equal(perturbed(block)(x), x)


def test_the_gradient_reaches_every_parameter() -> None:
    net = perturbed(autoencoder((2, 8, 8), **SMALL)).train()
    y, moments = net(randn(4, 2, 8, 8).float(), randn(4, 3, 4, 4).float())
    ((y * randn(*y.shape, seed=5).float()).sum() + moments.kl().sum()).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]


def test_dropout_is_for_training() -> None:
    net = perturbed(autoencoder((1, 8, 8), **SMALL, dropout=0.5))
    x = randn(2, 1, 8, 8).float()
    assert torch.equal(net.encode(x).mean, net.encode(x).mean)
    net.train()
    assert not torch.equal(net.encode(x).mean, net.encode(x).mean)


@pytest.mark.long
def test_it_compiles_without_a_break() -> None:
    net = perturbed(autoencoder((1, 8, 8), **SMALL))
    x, noise = randn(2, 1, 8, 8).float(), randn(2, 3, 4, 4).float()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(x, noise)[0], net(x, noise)[0], rtol=1e-5, atol=1e-5)


def test_half_precision_is_the_same_net() -> None:
    net = perturbed(autoencoder((1, 8, 8), **SMALL))
    x, noise = randn(2, 1, 8, 8).float(), randn(2, 3, 4, 4).float()
    with torch.no_grad():
        y = net(x, noise)[0]
        half = net.bfloat16()(x.bfloat16(), noise.bfloat16())[0].float()
    assert (half - y).norm() < 0.05 * y.norm()  # eight bits, some tens of operations deep


def test_stable_diffusions_has_its_published_size_and_the_page_tells_every_presets() -> None:
    with torch.device("meta"):
        net = autoencoder_sd((3, 512, 512))
        assert sum(p.numel() for p in net.parameters()) == 83_653_863
        assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {32}
        assert (net.factor, net.latent_shape) == (8, (4, 64, 64))
        row = r"^\| `(\w+)` \| ([\d×]+) \| ([\d×]+) \| ([\d,]+) \|"
        told = re.findall(row, PAGE, flags=re.MULTILINE)
        assert {name for name, *_ in told} == set(names("codecs"))
        for name, pixels, latent, size in told:
            made: Autoencoder = find("codecs", name)(tuple(int(n) for n in pixels.split("×")))
            assert "×".join(map(str, made.latent_shape)) == latent
            assert (name, f"{sum(p.numel() for p in made.parameters()):,}") == (name, size)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"latent": 0}, "latent"),
        ({"width": 0}, "width"),
        ({"blocks": 0}, "blocks"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"norm_groups": 5}, "norm_groups"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        autoencoder((1, 8, 8), **{**SMALL, **knobs})


def test_bad_shapes_are_refused_in_one_line() -> None:
    net = autoencoder((1, 8, 8), width=4)
    for pixels in [(1, 8), (1, 8, 0), (3, 30, 64), (3, 8, 2)]:
        with pytest.raises(BadShape, match="autoencoder"):
            autoencoder(pixels)
    refused: list[tuple[type[Exception], str, Any]] = [
        (
            BadShape,
            "got images of 30×64, need multiples of 4 pixels; try 32×64",
            lambda: net.encode(torch.zeros(1, 1, 30, 64)),
        ),
        (BadShape, "need \\(B, 1, H, W\\)", lambda: net.encode(torch.zeros(1, 2, 8, 8))),
        (BadShape, "need \\(B, 4, h, w\\)", lambda: net.decode(torch.zeros(1, 3, 2, 2))),
        (BadArgument, "overlap: got 2 without a tile", lambda: net.decode(torch.zeros(1, 4, 2, 2), overlap=2)),
        (BadArgument, "tile: got 3", lambda: net.decode(torch.zeros(1, 4, 2, 2), tile=3)),
        (BadArgument, "overlap: got 5, need 0 to 4", lambda: net.decode(torch.zeros(1, 4, 2, 2), tile=8, overlap=5)),
    ]
    for error, said, call in refused:
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- tiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "wide", "tile", "overlap"), [(9, 7, 4, 2), (16, 16, 8, 2), (5, 23, 8, 4), (8, 8, 8, 4), (9, 9, 4, 0)]
)
def test_windows_share_out_every_place(high: int, wide: int, tile: int, overlap: int) -> None:
    for side in (high, wide):
        begins = starts(side, tile, overlap)
        covered = {place for begin in begins for place in range(begin, begin + min(tile, side))}
        assert covered == set(range(side))
        assert all(later - begin <= tile - overlap for begin, later in pairwise(begins))
    x = randn(2, 3, 2 * high, 2 * wide)  # a run that sees one place only, three pixels of every two
    got = in_tiles(
        lambda part: functional.interpolate(part, scale_factor=1.5), x, inp=2, out=3, tile=tile, overlap=overlap
    )
    assert_close(got, functional.interpolate(x, scale_factor=1.5), rtol=1e-13, atol=1e-13)


def test_an_overlap_is_a_quarter_of_nothing_and_a_linear_ramp() -> None:
    calls = iter([0.0, 1.0])
    got = in_tiles(
        lambda part: torch.full_like(part, next(calls)),
        torch.zeros(1, 1, 1, 24).double(),
        inp=1,
        out=1,
        tile=16,
        overlap=8,
    )
    # 24 places: windows [0, 16) and [8, 24) share [8, 16); its outer quarters, 2 places, are one window's alone
    ramp = [(u + 0.5 - 2) / 4 for u in range(2, 6)]
    assert_close(got.flatten(), torch.tensor([0.0] * 10 + ramp + [1.0] * 10).double())


def test_what_goes_wrong_at_the_edges_of_windows_is_not_seen() -> None:
    # A run that ruins the outer quarter of the overlap along every side of its window but those of the image itself.
    x, tile, overlap, edge = randn(1, 2, 30, 41), 16, 8, 2
    at = iter([(top, left) for top in starts(30, tile, overlap) for left in starts(41, tile, overlap)])

    def run(part: Tensor) -> Tensor:
        top, left = next(at)
        y = torch.full_like(part, torch.pi * 1e6)
        first, last = (0 if top == 0 else edge), (None if top + tile == 30 else -edge)
        start, end = (0 if left == 0 else edge), (None if left + tile == 41 else -edge)
        y[..., first:last, start:end] = part[..., first:last, start:end]
        return y

    assert_close(in_tiles(run, x, inp=1, out=1, tile=tile, overlap=overlap), x, rtol=1e-13, atol=1e-13)


def without_norms(net: nn.Module) -> nn.Module:
    """The net with its norms left out, so that a place sees its surroundings only."""
    for module in list(net.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return net


def seen(run: Any, x: Tensor, at: int) -> int:
    """How many columns of x away the middle of run(x) looks, in columns of x."""
    x = x.clone().requires_grad_()
    y = run(x)
    [gradient] = torch.autograd.grad(y[..., y.shape[-2] // 2, at].sum(), x)
    columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    return int(max(columns.max() - x.shape[-1] // 2, x.shape[-1] // 2 - columns.min()))


@pytest.mark.long
def test_convolutions_in_tiles_are_those_of_the_whole() -> None:
    net = without_norms(
        perturbed(autoencoder((1, 8, 8), width=4, multipliers=(1, 2), blocks=1, middle_attention=False).double())
    )
    x = randn(1, 1, 320, 176)
    sizes: list[int] = []
    net.encoder.register_forward_pre_hook(lambda _, given: sizes.append(max(given[0].shape[-2:])))
    net.decoder.register_forward_pre_hook(lambda _, given: sizes.append(2 * max(given[0].shape[-2:])))
    with torch.no_grad():
        whole = net.encode(x)
        z = whole.mean
        y = net.decode(z)
    reach = max(seen(net.decode, z[..., :80], 80), math.ceil(seen(lambda p: net.encode(p).mean, x[..., :160], 40) / 2))
    assert 8 < reach <= 16  # so that the overlap below, of 64, is enough and one of 32 is not
    sizes.clear()
    with torch.no_grad():
        tiled = net.encode(x, tile=128, overlap=64)
        assert_close(tiled.mean, z, rtol=1e-11, atol=1e-11)
        assert_close(tiled.logvar, whole.logvar, rtol=1e-11, atol=1e-11)
        assert_close(net.decode(z, tile=128, overlap=64), y, rtol=1e-11, atol=1e-11)
        assert sizes == [2 * 128] * (2 * 2)  # memory is bounded: no call has seen more than a window
        gap = (net.decode(z, tile=64, overlap=32) - y).abs()
        assert 0 < gap.max() < 0.05 * y.abs().max()


@pytest.mark.long
def test_norms_and_attention_see_their_window_alone() -> None:
    # What the page says: with them a tile differs from the whole, everywhere, by a little.
    net = perturbed(autoencoder((1, 8, 8), width=8, multipliers=(1, 2), blocks=1).double())
    x = randn(1, 1, 96, 96).cumsum(-1).tanh()
    with torch.no_grad():
        whole, tiled = net.encode(x).mean, net.encode(x, tile=32).mean
    gap = (tiled - whole).abs()
    assert gap[..., 12:20, 12:20].min() > 1e-6
    assert gap.square().mean().sqrt() < 0.2 * whole.std()


# ---- the adversary and the features ---------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_patch_of_the_paper(depth: int, patch: int) -> None:
    critic = PatchGAN(2, width=4, depth=depth).double()
    for i, layer in enumerate(critic.layers):  # norms see everything: without them, and without slopes
        critic.layers[i] = layer if isinstance(layer, nn.Conv2d) else nn.Identity()
    x = randn(1, 2, 160, 160).requires_grad_()
    y = critic(x)
    [gradient] = torch.autograd.grad(y[0, 0, y.shape[2] // 2, y.shape[3] // 2], x)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_rows_of_the_critic_do_not_see_one_another() -> None:
    critic = perturbed(PatchGAN(1, width=8).double()).train()
    x = randn(3, 1, 32, 32)
    assert_close(critic(x)[1:2], critic(x[1:2]), rtol=1e-10, atol=1e-10)


def test_the_hinge_is_its_formula() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert float(hinge(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.25) / 2))


def test_the_adversary_pulls_as_the_rest_does() -> None:
    last = randn(5).requires_grad_()
    one, other = (last * randn(5, seed=2)).sum(), 100 * (last**2).sum()
    weight = adaptive_weight(one, other, last)
    assert float(weight) == pytest.approx(float(randn(5, seed=2).norm() / (200 * last.detach().norm())), rel=1e-5)
    assert not weight.requires_grad
    [mine] = torch.autograd.grad(weight * other, last)
    assert float(mine.norm()) == pytest.approx(float(randn(5, seed=2).norm()), rel=1e-5)


def test_the_perceptual_distance_is_that_of_directions() -> None:
    layers = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    )
    x, y = randn(3, 2, 9, 8), randn(3, 2, 9, 8, seed=2)
    want = np.zeros(3)
    for stop in (2, 5):
        a, b = (layers[:stop](part).detach().numpy() for part in (x, y))
        for row in range(3):
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    p, q = a[row, :, i, j], b[row, :, i, j]
                    gap = p / max(np.linalg.norm(p), 1e-12) - q / max(np.linalg.norm(q), 1e-12)
                    want[row] += gap @ gap / (a.shape[2] * a.shape[3])
    assert_close(perceptual(maps_of(layers), x, y), torch.from_numpy(want), rtol=1e-10, atol=1e-12)
    assert not perceptual(maps_of(layers), x, x).any()
    vectors = perceptual(lambda part: [part.flatten(1)], x, y)  # (B, D), one place
    a, b = (functional.normalize(part.flatten(1)) for part in (x, y))
    assert_close(vectors, (a - b).square().sum(1))
    with pytest.raises(BadArgument, match="no ReLU"):
        maps_of(nn.Sequential(nn.Conv2d(1, 1, 1)))


# ---- training -------------------------------------------------------------------------------------------------

DIGITS = Part("digits")
NET = Part("autoencoder", {"width": 16, "multipliers": (1, 2), "blocks": 1, "latent": 4})


def weights(**given: Any) -> Tensor:
    made = fit_autoencoder(DIGITS, **{"net": NET, "steps": 3, "batch": 8, **given})
    return torch.cat([value.flatten() for value in made.state_dict().values()])


@pytest.mark.long
def test_a_fit_is_keyed_by_its_seed() -> None:
    torch.manual_seed(5)
    one = weights(seed=3)
    torch.manual_seed(6)
    torch.rand(17)
    assert torch.equal(weights(seed=3), one)
    assert not torch.equal(weights(seed=4), one)
    assert not torch.equal(weights(seed=3, against=Against(kl=1.0)), one)
    assert not torch.equal(weights(seed=3, against=Against(reconstruction="mse")), one)
    assert not torch.equal(weights(seed=3, precision="bfloat16"), one)
    assert not torch.equal(weights(seed=3, ema=0.0), one)
    noisy = weights(seed=3, against=Against(adversary=1.0, start=0.0))
    assert not torch.equal(noisy, one)
    late = weights(seed=3, against=Against(adversary=1.0, start=0.99))  # starts after the third update
    assert torch.equal(late, one)
    assert not torch.equal(weights(seed=3, against=Against(perceptual=1.0, features=lambda x: [x.flatten(1)])), one)


@pytest.mark.slow
def test_the_features_may_be_a_classifiers_of_the_same_data() -> None:
    one = weights(seed=3)
    assert not torch.equal(weights(seed=3, against=Against(perceptual=1.0, features="classifier")), one)


def test_the_loss_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    whole = training._Fit._terms

    def spy(self: Any, x: Tensor, y: Tensor, moments: Moments) -> dict[str, Tensor]:
        made.append((self.against, x, y.detach(), moments, whole(self, x, y, moments)))
        return made[-1][-1]

    monkeypatch.setattr(training._Fit, "_terms", spy)
    weights(
        steps=1, against=Against(kl=0.25, perceptual=0.5, features=lambda x: [x.flatten(1), x[:, :, :3].flatten(1)])
    )
    weights(steps=1, against=Against(kl=0.25, reconstruction="mse"))
    for against, x, y, moments, facts in made:
        gap = (x - y).abs() if against.reconstruction == "l1" else (x - y) ** 2
        kl = 0.5 * (moments.mean**2 + moments.logvar.exp() - 1 - moments.logvar).sum() / len(x)
        want = gap.sum() / x.numel() + 0.25 * kl / 64
        if against.features is not None:
            want = want + 0.5 * perceptual(against.features, x, y).mean()
        assert_close(facts["loss"], want)


@pytest.mark.long
def test_a_trained_one_reconstructs_what_it_has_not_seen_and_has_latents_of_unit_deviation(tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    made = fit_autoencoder(
        DIGITS, tmp_path / "ae", net=NET, steps=200, batch=32, lr=3e-3, on_progress=lambda *facts: heard.append(facts)
    )
    card = made.card
    data = find("data", "digits")("test")
    x = data.take(range(len(data)))[0]
    mean = find("data", "digits")("train").take(range(1000))[0].mean(0)
    baseline = psnr(x, mean.expand_as(x)).mean()
    ratio = psnr(x, reconstruct(made, x))
    assert float(ratio.mean()) == pytest.approx(card["psnr_db"], abs=0.3)  # the card's is over these images, or some
    assert ratio.mean() > baseline + 6  # a quarter of the baseline's error
    z = made.encode(x)
    assert float(z.std()) == pytest.approx(1, abs=0.05)  # R25, on images that it was not measured on
    for deviation in z.transpose(0, 1).flatten(1).std(1).tolist():
        assert deviation == pytest.approx(1, abs=0.1)
    assert z.mean().abs() < 0.1
    assert heard[-1][:2] == (200, 200)
    assert "pixels" in heard[-1][2]
    with pytest.raises(BadArgument, match="exists already"):
        fit_autoencoder(DIGITS, tmp_path / "ae", net=NET)


def test_psnr_is_its_formula() -> None:
    x = torch.zeros(3, 1, 4, 4)
    y = x.clone()
    y[0] = 0.2
    y[1, :, :2] = 2.0
    most = 20 * math.log10(2 * 255)  # of the third, which is exact
    assert_close(psnr(x, y), torch.tensor([20 * math.log10(2 / 0.2), 10 * math.log10(4 / 2.0), most]))


@pytest.mark.long
def test_what_cannot_be_trained_is_refused() -> None:
    for against, said in [
        ({"reconstruction": "huber"}, "reconstruction"),
        ({"kl": -1.0}, "kl"),
        ({"start": 1.0}, "start"),
        ({"perceptual": 1.0}, "together"),
        ({"features": "classifier"}, "together"),
    ]:
        with pytest.raises(BadArgument, match=said):
            Against(**against)
    with pytest.raises(BadData, match="need images"):
        fit_autoencoder(Part("mixture1d"), net=NET)
    with pytest.raises(BadArgument, match="precision"):
        fit_autoencoder(DIGITS, net=NET, precision="float8")
    with pytest.raises(BadShape, match="multiples of 16"):
        fit_autoencoder(DIGITS, net=Part("autoencoder", {"multipliers": (1, 1, 1, 1, 1)}))
    with pytest.raises(Diverged, match="not finite at update"):
        weights(lr=1e30, steps=20)


@pytest.mark.long
def test_the_pages_example_runs() -> None:
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    left: dict[str, Any] = {}
    exec(compile(block, "docs/nets/autoencoder.md", "exec"), left)  # noqa: S102, the page is our own
    assert left["moments"].mean.shape == (2, 4, 16, 16)
    assert left["x"].shape == (2, 3, 64, 64)
