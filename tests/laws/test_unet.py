"""The U-Net: its blocks against their formulas, its conditions, its memory, and the sizes of its presets."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets import blocks, convolve, embed, spatial, unets
from inkdrop.nets.text import Text, Words
from inkdrop.nets.unet import unet

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of some 10^3 terms


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in net.state_dict().items() if k.startswith(f"{prefix}.")}


# ---- formulas, written out ------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def group_norm(x: Tensor, w: dict[str, Tensor], name: str, groups: int, eps: float = 1e-6) -> Tensor:
    b, c, h, wide = x.shape
    g = x.reshape(b, groups, -1)
    g = g - g.mean(dim=2, keepdim=True)
    z = (g / (g.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(b, c, h, wide)
    return z * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def layer_norm(h: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = h - h.mean(dim=2, keepdim=True)
    return h / (h.square().mean(dim=2, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def conv(x: Tensor, w: dict[str, Tensor], name: str, **how: Any) -> Tensor:
    return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def halved(x: Tensor) -> Tensor:
    """The mean over each 2×2 pixels that there are."""
    rows, columns = (range(0, side, 2) for side in x.shape[-2:])
    cells = [[x[..., i : i + 2, j : j + 2].mean(dim=(-1, -2)) for j in columns] for i in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)


def doubled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x[..., torch.arange(size[0]) // 2, :][..., torch.arange(size[1]) // 2]


def res_block(
    w: dict[str, Tensor], x: Tensor, context: Tensor, resize: Callable[[Tensor], Tensor] = lambda x: x, **norm: Any
) -> Tensor:
    """A scale-shift residual block of four channels a group, which may resize."""
    h = resize(silu(group_norm(x, w, "norm1", x.shape[1] // 4, **norm)))
    h, x = conv(h, w, "conv1", padding=1), resize(x)
    scale, shift = (silu(context) @ w["project.weight"].T + w["project.bias"])[:, :, None, None].chunk(2, dim=1)
    h = group_norm(h, w, "norm2", h.shape[1] // 4, **norm) * (1 + scale) + shift
    short = conv(x, w, "shortcut") if "shortcut.weight" in w else x
    return short + conv(silu(h), w, "conv2", padding=1)


def attention(h: Tensor, other: Tensor, w: dict[str, Tensor], name: str, width: int, mask: Tensor | None) -> Tensor:
    """Attention from h (B, N, D) to other (B, L, D'), head by head and with one exponential after another."""
    if f"{name}.qkv.weight" in w:
        of_q, of_k, of_v = w[f"{name}.qkv.weight"].chunk(3)
    else:
        of_q, (of_k, of_v) = w[f"{name}.q.weight"], w[f"{name}.kv.weight"].chunk(2)
    heads = []
    for at in range(0, h.shape[2], width):
        q, k, v = (
            torch.einsum("bnd,ed->bne", x, m[at : at + width]) for x, m in ((h, of_q), (other, of_k), (other, of_v))
        )
        weight = (torch.einsum("bne,ble->bnl", q, k) / math.sqrt(width)).exp()
        weight = weight if mask is None else weight * mask[:, None, :]
        heads.append(torch.einsum("bnl,ble->bne", weight, v) / weight.sum(dim=2, keepdim=True))
    return torch.cat(heads, dim=2) @ w[f"{name}.out.weight"].T + w[f"{name}.out.bias"]


def transformer(w: dict[str, Tensor], x: Tensor, words: Words, width: int, groups: int, depth: int) -> Tensor:
    """A spatial transformer from its weights; which attention reads is told by the names of the weights."""
    b, c, high, wide = x.shape
    h = group_norm(x, w, "norm", groups).reshape(b, c, -1).transpose(1, 2) @ w["inp.weight"].T + w["inp.bias"]
    for i in range(depth):
        at = f"blocks.{i}"
        n = layer_norm(h, w, f"{at}.norm1")
        own = f"{at}.attention1.qkv.weight" in w
        told = (n, n) if own else (n, words.tokens)
        h = h + attention(*told, w, f"{at}.attention1", width, None if own else words.mask)
        n = layer_norm(h, w, f"{at}.norm2")
        h = h + attention(n, words.tokens, w, f"{at}.attention2", width, words.mask)
        n = layer_norm(h, w, f"{at}.norm3") @ w[f"{at}.linear1.weight"].T + w[f"{at}.linear1.bias"]
        value, gate = n[..., : 4 * c], n[..., 4 * c :]
        gelu = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
        h = h + (value * gelu) @ w[f"{at}.linear2.weight"].T + w[f"{at}.linear2.bias"]
    h = h @ w["out.weight"].T + w["out.bias"]
    return x + h.transpose(1, 2).reshape(b, c, high, wide)


def some_words(width: int = 6) -> Words:
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    return Words(random(2, 4, width, seed=5), mask, torch.zeros(2, width).double())


# ---- blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 3)])
@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_resampling_block_is_its_formula(resample: Any, size: tuple[int, int]) -> None:
    block = blocks.ResBlock(8, 12, 10, resample=resample, norm_eps=1e-3).double()
    perturbed(block)
    x, context = random(2, 8, *size), random(2, 10, seed=1)
    w = dict(block.state_dict())
    if resample == "down":
        assert_close(block(x, context), res_block(w, x, context, halved, eps=1e-3), **TIGHT)
        return
    for to in ((2 * size[0], 2 * size[1]), (2 * size[0] - 1, 2 * size[1])):
        got = block(x, context, to)
        assert_close(got, res_block(w, x, context, lambda x, to=to: doubled(x, to), eps=1e-3), **TIGHT)


@pytest.mark.parametrize(("depth", "only_cross", "head_width"), [(1, False, 4), (2, True, None), (1, True, 2)])
def test_a_spatial_transformer_is_its_formula(depth: int, only_cross: bool, head_width: int | None) -> None:
    made = spatial.SpatialTransformer(8, 6, head_width=head_width, depth=depth, only_cross=only_cross, norm_groups=2)
    x, words = random(2, 8, 3, 5), some_words()
    assert torch.equal(made.double()(x, words), x)  # zero at the start
    perturbed(made)
    assert ("blocks.0.attention1.kv.weight" in made.state_dict()) == only_cross
    want = transformer(dict(made.state_dict()), x, words, head_width or 8, 2, depth)
    assert_close(made(x, words), want, **TIGHT)


def test_words_behind_the_mask_are_not_read() -> None:
    made = perturbed(spatial.SpatialTransformer(8, 6).double())
    x, words = random(2, 8, 3, 2), some_words()
    loud = torch.where(words.mask[:, :, None], words.tokens, 1e3)
    assert torch.equal(made(x, words), made(x, words._replace(tokens=loud)))
    assert not torch.allclose(made(x, words), made(x, words._replace(mask=torch.ones(2, 4, dtype=torch.bool))))


def test_down_pads_both_sides_where_asked() -> None:
    for size in ((6, 4), (5, 7), (1, 1)):
        down = blocks.Down(4, symmetric=True).double()
        x = random(2, 4, *size)
        padded = functional.pad(x, (1, 1, 1, 1))
        want = torch.stack(
            [
                torch.stack(
                    [
                        torch.einsum("bcij,ocij->bo", padded[..., i : i + 3, j : j + 3], down.conv.weight)
                        for j in range(0, size[1], 2)
                    ],
                    dim=2,
                )
                for i in range(0, size[0], 2)
            ],
            dim=2,
        )
        assert_close(down(x), want + down.conv.bias[:, None, None], **TIGHT)


def test_norms_have_the_groups_and_eps_that_they_are_given() -> None:
    made = perturbed(blocks.norm(12, 3, 0.5).double())
    x = random(2, 12, 3, 2)
    assert_close(made(x), group_norm(x, {f"n.{k}": v for k, v in made.state_dict().items()}, "n", 3, 0.5), **TIGHT)
    for count in (5, 0, -3):
        with pytest.raises(BadArgument, match="need a divisor of 12 channels"):
            blocks.norm(12, count)
    bare = perturbed(blocks.SelfAttention(8, norm_groups=0).double())
    w, x = dict(bare.state_dict()), random(2, 8, 3, 2)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = (tokens @ w["qkv.weight"].T + w["qkv.bias"]).chunk(3, dim=2)
    weight = torch.einsum("bid,bjd->bij", q, k).div(math.sqrt(8)).exp()
    mixed = torch.einsum("bij,bjd->bid", weight / weight.sum(dim=2, keepdim=True), v)
    want = x + (mixed @ w["out.weight"].T + w["out.bias"]).transpose(1, 2).reshape(2, 8, 3, 2)
    assert_close(bare(x), want, **TIGHT)


# ---- convolve: what is computed again for the gradient ---------------------------------------------------------


def parts_of(channels: int = 4, out: int = 3) -> tuple[nn.GroupNorm, nn.Conv2d, list[Tensor]]:
    """A norm, a convolution, and (h, scale, shift), in float64."""
    norm, conv = nn.GroupNorm(2, channels).double(), nn.Conv2d(channels, out, 3, padding=1).double()
    perturbed(norm)
    told = [random(2, channels, 3, 4), random(2, channels, 1, 1, seed=1), random(2, channels, 1, 1, seed=2)]
    return norm, conv, [t.requires_grad_() for t in told]


@pytest.mark.parametrize("modulated", [True, False])
def test_the_gradient_in_training_is_that_of_the_plain_chain(modulated: bool) -> None:
    norm, conv, (h, *told) = parts_of()
    given = (h, *told) if modulated else (h,)
    leaves = [*given, *norm.parameters(), *conv.parameters()]
    grads = []
    for training, again in ((True, False), (True, True), (False, False)):
        y = convolve.convolve(h, norm, conv, *given[1:], training=training)
        grads.append((y, *torch.autograd.grad((y * random(*y.shape, seed=3)).sum(), leaves, create_graph=again)))
    assert type(convolve.convolve(*given[:1], norm, conv, training=True).grad_fn).__name__ == "_ConvolveBackward"
    for once, twice, plain in zip(*grads, strict=True):
        assert_close(once, plain, rtol=1e-12, atol=1e-12)
        assert_close(twice, plain, rtol=1e-12, atol=1e-12)  # the gradient of which there is a gradient


def test_the_gradient_in_training_does_not_ask_for_a_layout() -> None:
    norm, conv, (h, scale, shift) = parts_of()
    last, odd = h.detach().contiguous(memory_format=torch.channels_last), h.detach().transpose(2, 3).contiguous()
    ways = [h.detach(), last, odd.transpose(2, 3), torch.cat([h.detach()] * 2, dim=1)[:, :4]]
    others = (scale, shift, *norm.parameters(), *conv.parameters())
    want = torch.autograd.grad(convolve.convolve(h, norm, conv, scale, shift).sin().sum(), (h, *others))
    for kernels in (torch.contiguous_format, torch.channels_last):
        conv.to(memory_format=kernels)
        for way in ways:
            way.requires_grad_()
            y = convolve.convolve(way, norm, conv, scale, shift, training=True)
            for once, again in ((True, False), (True, True)):
                got = torch.autograd.grad(y.sin().sum(), (way, *others), retain_graph=once, create_graph=again)
                assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("dropped", [True, False])
def test_the_gradient_in_training_is_right_to_the_second_order(dropped: bool) -> None:
    norm, conv, (h, scale, shift) = parts_of()
    keep = torch.rand(h.shape, generator=torch.Generator().manual_seed(0)) > 0.3 if dropped else None

    def chain(*given: Tensor) -> Tensor:
        return convolve._Convolve.apply(*given[:3], keep, *given[3:], (2, 1e-5, 0.3 if dropped else 0.0))

    given = (h, scale, shift, norm.weight, norm.bias, conv.weight, conv.bias)
    assert torch.autograd.gradcheck(chain, given)
    assert torch.autograd.gradgradcheck(chain, given)


def test_training_drops_what_it_says_and_keeps_the_mean() -> None:
    norm, conv, (h, *_) = parts_of()
    with torch.no_grad():  # the centre of the kernel only: the answer is what the convolution sees
        conv.weight.copy_(functional.pad(torch.eye(3, 4).double()[:, :, None, None], (1, 1, 1, 1)))
        conv.bias.zero_()
    whole = convolve.convolve(h, norm, conv, training=True)
    draws = torch.stack([convolve.convolve(h, norm, conv, dropout=0.3, training=True).detach() for _ in range(400)])
    kept = draws != 0
    assert_close(draws[kept], (whole / 0.7).expand_as(draws)[kept], **TIGHT)
    # 400 · 72 draws: the standard error of the share is 0.0027; five of them.
    assert abs(float(kept.double().mean()) - 0.7) < 0.014


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, as it makes decompositions
def test_other_ways_of_differentiating_a_training_net_work() -> None:
    norm, conv, (h, scale, shift) = parts_of()
    h, scale, shift = h.detach(), scale.detach(), shift.detach()

    def chain(training: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: convolve.convolve(x, norm, conv, scale, shift, training=training)

    tangent = random(*h.shape, seed=7)
    for ours, plain in zip(
        torch.func.jvp(chain(True), (h,), (tangent,)), torch.func.jvp(chain(False), (h,), (tangent,)), strict=True
    ):
        assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    ours, plain = (torch.func.grad(lambda x, t=t: chain(t)(x).square().sum())(h) for t in (True, False))
    assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    rows = [torch.func.vmap(lambda x, t=t: chain(t)(x[None].expand(2, -1, -1, -1)))(h) for t in (True, False)]
    assert_close(*rows, rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm, conv, (h, *_) = parts_of()
    conv.weight.requires_grad_(False)
    norm.bias.requires_grad_(False)
    convolve.convolve(h.detach(), norm, conv, training=True).square().sum().backward()
    assert conv.weight.grad is None
    assert norm.bias.grad is None
    assert conv.bias.grad is not None
    assert norm.weight.grad is not None


# ---- memory ---------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at once, of those that operations made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.held.pop(key)


def peak(net: nn.Module, asked: Any) -> tuple[int, list[Tensor]]:
    """The most bytes alive in a forward and backward pass, and the gradients."""
    net.zero_grad()
    torch.manual_seed(3)
    with Live() as live:
        net(*asked).square().sum().backward()
    return live.peak, [p.grad for p in net.parameters()]


def asked_of(net: nn.Module, rows: int = 2) -> Any:
    x = random(rows, *net.shape).float()
    text = None if net.text is None else random(rows, 3, net.text.features, seed=1).float()
    return x, torch.linspace(3.0, 700.0, rows), Cond(text=text)


MEMORY = {"width": 16, "multipliers": (1, 2), "blocks": 2, "cross": (1,), "features": 6, "length": 3, "dropout": 0.2}


@pytest.mark.long
def test_checkpoints_give_the_same_gradients_for_less_memory() -> None:
    nets = [unet((3, 24, 24), **MEMORY, checkpoint=on) for on in (False, True)]
    nets[1].load_state_dict(perturbed(nets[0]).state_dict())
    asked = asked_of(nets[0], rows=4)
    (plain, want), (less, got) = (peak(net.train(), asked) for net in nets)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert less < 0.6 * plain
    nets[1].eval()
    assert torch.equal(nets[0].eval()(*asked), nets[1](*asked))


@pytest.mark.long
def test_training_takes_less_memory_than_the_plain_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    net = perturbed(unet((3, 24, 24), width=16, multipliers=(1, 2), blocks=2)).train()
    asked = (random(4, 3, 24, 24).float(), torch.linspace(3.0, 700.0, 4))
    ours, got = peak(net, asked)
    monkeypatch.setattr(convolve, "_is_cast_or_dual", lambda _: True)
    plain, want = peak(net, asked)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert ours < 0.75 * plain


# ---- the whole ------------------------------------------------------------------------------------------------


def test_a_unet_reads_in_the_order_of_its_parts() -> None:
    torch.manual_seed(0)
    net = unet(
        (2, 6, 5),
        width=8,
        multipliers=(1, 2),
        blocks=1,
        cross=(1,),
        head_width=4,
        resample="residual",
        features=6,
        length=4,
        image=3,
        augment=True,
        classes=3,
        attributes=2,
    )
    perturbed(net.double())
    x, clock, picture, vec = random(2, 2, 6, 5), torch.tensor([3.0, 700.0]).double(), random(2, 3, 6, 5), random(2, 2)
    words = some_words()
    label, noised = torch.tensor([2, 1]), torch.tensor([0.25, 0.5]).double()
    cond = Cond(label=label, vec=vec, text=words.tokens, text_mask=words.mask, image=picture, image_t=noised)
    w = part(net, "context")

    def linear(h: Tensor, name: str, of: dict[str, Tensor]) -> Tensor:
        return h @ of[f"{name}.weight"].T + of[f"{name}.bias"]

    context = linear(silu(linear(embed.sinusoid(clock, 8), "linear1", w)), "linear2", w)
    context = context + w["label.table.weight"][label] + linear(vec, "vec.linear", w)
    context = context + linear(silu(linear(embed.sinusoid(1000 * noised, 8), "augment.1", w)), "augment.3", w)
    mean = torch.stack([t[m].mean(dim=0) for t, m in zip(words.tokens, words.mask, strict=True)])
    context = context + linear(mean, "pool", dict(net.state_dict()))

    def res(h: Tensor, name: str, **how: Any) -> Tensor:
        return res_block(part(net, name), h, context, **how)

    def read(h: Tensor, name: str) -> Tensor:
        return transformer(part(net, f"{name}.attention"), h, words, 4, 4, 1)

    a = conv(torch.cat([x, picture], dim=1), dict(net.state_dict()), "stem", padding=1)
    b = res(a, "down.0.block")
    c = res(b, "down.1", resize=halved)
    d = read(res(c, "down.2.block"), "down.2")
    h = res(read(res(d, "middle.0.block"), "middle.0"), "middle.1.block")
    h = read(res(torch.cat([h, d], dim=1), "up.0.block"), "up.0")
    h = read(res(torch.cat([h, c], dim=1), "up.1.block"), "up.1")
    h = res(h, "up.2", resize=lambda x: doubled(x, (6, 5)))
    h = res(torch.cat([h, b], dim=1), "up.3.block")
    h = res(torch.cat([h, a], dim=1), "up.4.block")
    h = conv(silu(group_norm(h, part(net, "head"), "0", 2)), part(net, "head"), "2", padding=1)
    assert_close(net(x, clock, cond), h, rtol=1e-9, atol=1e-9)


def test_an_image_condition_is_resized_to_x() -> None:
    condition = embed.ImageCondition(2).double()
    nn.init.normal_(condition.null)
    x, image = random(3, 1, 5, 4), random(3, 2, 2, 3)
    got = condition(Cond(image=image).null(torch.tensor([False, True, False])), x)
    assert got.shape == (3, 2, 5, 4)
    assert torch.equal(got[1], condition.null[:, None, None].expand(2, 5, 4))
    for i in range(5):
        for j in range(4):  # the centre of pixel (i, j) among the centres of the 2×3 image, held within them
            y, z = max((i + 0.5) * 2 / 5 - 0.5, 0.0), max((j + 0.5) * 3 / 4 - 0.5, 0.0)
            top, left = min(int(y), 1), min(int(z), 2)
            low, right = min(top + 1, 1), min(left + 1, 2)
            near, far = image[0, :, top], image[0, :, low]
            v = y - top
            at = [near[:, k] * (1 - v) + far[:, k] * v for k in (left, right)]
            assert_close(got[0, :, i, j], at[0] * (1 - (z - left)) + at[1] * (z - left), **TIGHT)
    assert torch.equal(condition(None, x), condition.null[None, :, None, None].expand(3, 2, 5, 4))
    assert torch.equal(condition(Cond(image=random(3, 2, 5, 4)), x), random(3, 2, 5, 4))
    with pytest.raises(BadShape, match="need \\(B, 2, H, W\\)"):
        condition(Cond(image=random(3, 1, 5, 4)), x)


def test_how_noisy_an_image_is_does_not_matter_where_there_is_none() -> None:
    net = perturbed(unet((1, 8, 8), width=8, multipliers=(1,), blocks=1, image=1, augment=True))
    x, clock, image = random(2, 1, 8, 8).float(), torch.tensor([3.0, 700.0]), random(2, 1, 8, 8, seed=1).float()
    noisy = [Cond(image=image, image_t=torch.tensor(t)) for t in ([0.0, 0.0], [0.5, 0.9])]
    assert torch.equal(net(x, clock, noisy[0]), net(x, clock, Cond(image=image)))
    assert not torch.allclose(net(x, clock, noisy[0]), net(x, clock, noisy[1]), atol=1e-3)
    assert torch.equal(net(x, clock, noisy[1].null()), net(x, clock))
    plain = unet((1, 8, 8), width=8, multipliers=(1,), blocks=1, image=1)
    with pytest.raises(BadArgument, match="augment=true"):
        plain(x, clock, noisy[0])


def test_without_pooling_only_cross_attention_hears_the_text() -> None:
    made = {"width": 8, "multipliers": (1, 2), "blocks": 1, "features": 6, "length": 3}
    x, clock = random(2, 1, 8, 8).float(), torch.tensor([3.0, 700.0])
    texts = [Cond(text=random(2, 3, 6, seed=s).float()) for s in (1, 2)]
    for knobs in ({"cross": (1,), "pooled": False}, {"cross": ()}, {"cross": (0,)}):
        net = perturbed(unet((1, 8, 8), **made, **knobs))
        assert not torch.allclose(net(x, clock, texts[0]), net(x, clock, texts[1]), atol=1e-3)
        assert (net.pool is None) == (knobs.get("pooled") is False)
    with pytest.raises(BadArgument, match="pooled"):
        unet((1, 8, 8), **made, pooled=False)  # nothing would hear it


@pytest.mark.parametrize(
    "knobs",
    [
        {"attention": (1,), "head_width": 8},
        {"cross": (1,), "features": 6, "length": 3, "resample": "residual"},
        {"symmetric": True, "scale_shift": False},
    ],
)
def test_channels_last_stays_channels_last(knobs: dict[str, Any]) -> None:
    net = perturbed(unet((3, 8, 12), width=16, multipliers=(1, 2), blocks=1, **knobs))
    x, *asked = asked_of(net)
    want = net(x, *asked)
    told: list[tuple[str, bool]] = []
    for name, module in net.named_modules():
        if isinstance(module, blocks.ResBlock | blocks.SelfAttention | spatial.SpatialTransformer | blocks.Down):
            keep = lambda _, __, y, name=name: told.append((name, y.is_contiguous(memory_format=torch.channels_last)))  # noqa: E731
            module.register_forward_hook(keep)
    got = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), *asked)
    assert [name for name, kept in told if not kept] == []
    assert told
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {"cross": (1,), "vocabulary": 7, "length": 4, "image": 1, "augment": True},
        {"attention": (0,), "resample": "residual", "checkpoint": True, "classes": 3, "attributes": 2},
    ],
)
def test_a_compiled_net_has_no_graph_breaks(knobs: dict[str, Any], training: bool) -> None:
    torch._dynamo.reset()
    net = perturbed(unet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1, **knobs)).train(training)
    told: dict[str, Tensor] = {}
    if "image" in knobs:
        told = {"text": torch.tensor([[1, 2, 0], [3, 0, 0]]), "text_mask": torch.tensor([[True, True, False]] * 2)}
        told |= {"image": random(2, 1, 8, 8).float(), "image_t": torch.tensor([0.1, 0.7])}
    else:
        told = {"label": torch.tensor([1, 2]), "vec": random(2, 2).float()}
    asked = (random(2, 1, 8, 8).float(), torch.tensor([3.0, 700.0]), Cond(**told))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(*asked), net(*asked), rtol=1e-5, atol=1e-5)


def test_names_of_weights_are_those_of_the_first_checkpoints() -> None:
    net = unet((1, 8, 8), classes=2, width=8, multipliers=(1, 2), blocks=1, attention=(1,))
    pair, norms = ("weight", "bias"), ("norm1", "conv1", "project", "norm2", "conv2")
    block = [f"block.{n}.{k}" for n in norms for k in pair]
    wider = [*block, "block.shortcut.weight", "block.shortcut.bias"]
    attends = [f"attention.{n}.{k}" for n in ("norm", "qkv", "out") for k in pair]
    want = [f"context.linear{i}.{k}" for i in (1, 2) for k in pair] + [
        "context.label.null",
        "context.label.table.weight",
    ]
    want += [f"stem.{k}" for k in pair] + [f"head.{i}.{k}" for i in (0, 2) for k in pair]
    want += [f"down.1.conv.{k}" for k in pair] + [f"up.2.conv.{k}" for k in pair]
    for name, names in {
        "down.0": block,
        "down.2": [*wider, *attends],
        "middle.0": [*block, *attends],
        "middle.1": block,
        "up.0": [*wider, *attends],
        "up.1": [*wider, *attends],
        "up.3": wider,
        "up.4": wider,
    }.items():
        want += [f"{name}.{n}" for n in names]
    assert sorted(net.state_dict()) == sorted(want)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"cross": (1,)}, "cross: got levels \\(1,\\), but no text"),
        ({"cross": (3,), "features": 4, "length": 2}, "cross: got level 3, need 0 to 2"),
        ({"cross": (1,), "attention": (1,), "features": 4, "length": 2}, "attention: got level 1, which is in cross"),
        ({"only_cross": (1,)}, "only_cross: got level 1"),
        ({"depth": (2,)}, "depth: got \\(2,\\), but no level"),
        ({"depth": (1, 2), "cross": (1,), "features": 4, "length": 2}, "depth: got \\(1, 2\\), need one"),
        ({"heads": (0,)}, "heads"),
        ({"heads": (3,)}, "heads: got 3, need a divisor of the 128 channels of level 2"),
        ({"heads": (2,), "head_width": 8}, "need one of them"),
        ({"middle_groups": 4, "middle_attention": False}, "middle_groups"),
        ({"symmetric": True, "resample": "residual"}, "symmetric"),
        ({"symmetric": True, "multipliers": (1,)}, "symmetric"),
        ({"resample": "residual", "multipliers": (1,)}, "resample"),
        ({"resample": "fir"}, "resample"),
        ({"norm_groups": 48}, "need a divisor of 64"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"image": -1}, "image"),
        ({"augment": True}, "augment"),
        ({"vocabulary": 4}, "null_length: got 1, need 1 to 0"),
        ({"text_width": 4}, "text_width"),
        ({"features": 4, "length": 2, "text_depth": 1}, "text_depth"),
        ({"null_length": 2}, "null_length"),
        ({"length": 2}, "length"),
        ({"cos_first": True, "embedding": "fourier"}, "cos_first"),
        ({"attributes": -1}, "attributes"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said) as caught:
        unet((1, 8, 8), **knobs)
    assert "\n" not in str(caught.value)


# ---- presets --------------------------------------------------------------------------------------------------


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.long
@pytest.mark.parametrize(
    ("made", "published", "ours"),
    [
        # (a preset, the parameters of the published net, our learned nulls)
        (lambda: unets.unet_sd15((4, 64, 64)), 859_520_964, 768),
        (lambda: unets.unet_sd15((4, 64, 64), image=5), 859_535_364, 768 + 5),
        (lambda: unets.unet_adm64((3, 64, 64), classes=1000), 295_904_454, 768),
        (lambda: unets.unet_adm256((3, 256, 256), classes=1000), 553_838_086, 1024),
    ],
)
def test_presets_have_their_published_sizes(made: Callable[[], nn.Module], published: int, ours: int) -> None:
    with torch.device("meta"):
        net = made()
    nulls = sum(p.numel() for name, p in net.named_parameters() if name.split(".")[-1] == "null")
    assert (count(net) - nulls, nulls) == (published, ours)


@pytest.mark.long
def test_presets_attend_where_they_are_said_to() -> None:
    def sides(net: nn.Module, text: Tensor | None = None) -> list[tuple[int, int]]:
        """(side, channels a head) of every attention of one pass."""
        seen: list[tuple[int, int]] = []
        for module in net.modules():
            if isinstance(module, blocks.SelfAttention):
                head = module.head_width
                module.register_forward_pre_hook(lambda _, given, head=head: seen.append((given[0].shape[-1], head)))
            if isinstance(module, spatial.SpatialTransformer):
                head = module.blocks[0].attention2.head_width
                module.register_forward_pre_hook(lambda _, given, head=head: seen.append((given[0].shape[-1], head)))
        net(torch.empty(1, *net.shape), torch.empty(1), None if text is None else Cond(text=text))
        return seen

    with torch.device("meta"):
        down = [(32, 64)] * 3 + [(16, 64)] * 3 + [(8, 64)] * 3
        up = [(8, 64)] * 4 + [(16, 64)] * 4 + [(32, 64)] * 4
        assert sides(unets.unet_adm64((3, 64, 64))) == [*down, (8, 64), *up]
        down = [(64, 40)] * 2 + [(32, 80)] * 2 + [(16, 160)] * 2
        up = [(16, 160)] * 3 + [(32, 80)] * 3 + [(64, 40)] * 3
        assert sides(unets.unet_sd15((4, 64, 64)), torch.empty(1, 77, 768)) == [*down, (8, 160), *up]


def test_a_small_net_reads_where_it_says() -> None:
    latent = unets.unet_latent((4, 16, 16), classes=3)
    reading = unets.unet_latent((4, 16, 16), vocabulary=9, length=4)
    assert latent.text is None
    assert isinstance(reading.text, Text)
    assert not any(isinstance(m, spatial.SpatialTransformer) for m in latent.modules())
    assert not any(isinstance(m, blocks.SelfAttention) for m in reading.modules())
    with pytest.raises(BadArgument, match="no text; try vocabulary"):
        unets.unet_text((3, 32, 32))
