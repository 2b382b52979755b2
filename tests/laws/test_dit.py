"""The diffusion transformer: blocks against their formula, places in closed form, texts and their masks, sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets import dit as house
from inkdrop.nets.dit import DiT, dit
from inkdrop.nets.transformer import DiTBlock, DiTHead, positions, unpatchify

pytestmark = pytest.mark.long  # left out of the fast tier

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
TOKENS = {"vocabulary": 11, "length": 6}
FEATURES = {"features": 5, "length": 6}


def perturbed(net: nn.Module, seed: int = 0) -> Any:
    """The net in float64 with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two answers differ by far more than rounding, in every row."""
    return bool(((a - b).flatten(1).norm(dim=1) > 1e-6 * a.flatten(1).norm(dim=1)).all())


CLOCK = torch.tensor([3.0, 250.0, 700.0], dtype=torch.float64)


# ---- formulas, written out ------------------------------------------------------------------------------------


def part(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in net.state_dict().items() if k.startswith(f"{prefix}.")}


def linear(w: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    """The tanh form, Hendrycks & Gimpel 2016."""
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def norm(h: Tensor, eps: float) -> Tensor:
    centred = h - h.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def look(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Attention row by row, head by head; masked keys are left out of the sums."""
    rows = []
    for b in range(len(q)):
        seen = slice(None) if mask is None else mask[b]
        wide = q.shape[2] // heads
        parts = []
        for one in (slice(i * wide, (i + 1) * wide) for i in range(heads)):
            weight = (q[b, :, one] @ k[b, seen][:, one].T / math.sqrt(wide)).exp()
            parts.append(weight / weight.sum(dim=1, keepdim=True) @ v[b, seen][:, one])
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def block_formula(
    w: dict[str, Tensor], h: Tensor, context: Tensor, heads: int, eps: float, mask: Any = None, words: Any = None
) -> Tensor:
    """adaLN-Zero as in figure 3 of Peebles & Xie: scale and shift before, gate after, each branch."""
    d = h.shape[2]
    told = linear(w, "modulation", silu(context))[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = (told[..., i * d : (i + 1) * d] for i in range(6))
    q, k, v = linear(w, "attention.qkv", norm(h, 1e-6) * (1 + scale1) + shift1).chunk(3, dim=2)
    h = h + gate1 * linear(w, "attention.out", look(q, k, v, heads, mask if words is None else None))
    if words is not None:
        k, v = linear(w, "cross.kv", words).chunk(2, dim=2)
        h = h + linear(w, "cross.out", look(linear(w, "cross.q", h), k, v, heads, mask))
    inner = gelu(linear(w, "linear1", norm(h, eps) * (1 + scale2) + shift2))
    return h + gate2 * linear(w, "linear2", inner)


def context_formula(w: dict[str, Tensor], clock: Tensor, label: Tensor) -> Tensor:
    """The time's MLP on 128 cosines and 128 sines, and the class; label −1 is null."""
    f = torch.tensor([10_000.0 ** (-i / 127) for i in range(128)], dtype=torch.float64)
    wave = torch.cat([(clock[:, None] * f).cos(), (clock[:, None] * f).sin()], dim=1)
    classes = torch.cat([w["label.table.weight"], w["label.null"][None]])
    return linear(w, "linear2", silu(linear(w, "linear1", wave))) + classes[label]


def place_formula(r: float, c: float, width: int) -> Tensor:
    """The place of one token: waves of its column, then of its row."""
    quarter = width // 4
    out = []
    for at in (c, r):
        angles = [at / 10_000 ** (i / quarter) for i in range(quarter)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(out, dtype=torch.float64)


def net_formula(net: DiT, x: Tensor, clock: Tensor, label: Tensor, heads: int, eps: float) -> Tensor:
    """The whole net on an image of any size, square by square."""
    p, channels, width = net.patch, net.shape[0], net.width
    high, wide = x.shape[2] // p, x.shape[3] // p
    stem = part(net, "stem")
    tokens = []
    for r in range(high):
        for c in range(wide):
            square = x[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
            at = place_formula(r * net.shape[1] / p / high, c * net.shape[2] / p / wide, width)
            tokens.append(torch.einsum("bkij,okij->bo", square, stem["weight"]) + stem["bias"] + at)
    h = torch.stack(tokens, dim=1)
    contexts = [context_formula(part(net, "context"), clock, label)]
    contexts += [context_formula(part(net, f"contexts.{i}"), clock, label) for i in range(len(net.contexts))]
    for i in range(len(net.blocks)):
        h = block_formula(part(net, f"blocks.{i}"), h, contexts[i % len(contexts)], heads, eps)
    w = part(net, "head")
    shift, scale = linear(w, "modulation", silu(contexts[0]))[:, None].chunk(2, dim=2)
    out = linear(w, "linear", norm(h, 1e-6) * (1 + scale) + shift)
    outs = channels * (2 if net.learned_variance else 1)
    y = torch.zeros(len(x), outs, x.shape[2], x.shape[3], dtype=x.dtype)
    for r in range(high):
        for c in range(wide):
            for i in range(p):
                for j in range(p):
                    at = (i * p + j) * outs
                    y[:, :, r * p + i, c * p + j] = out[:, r * wide + c, at : at + outs]
    return y


# ---- blocks and the net against them --------------------------------------------------------------------------


def test_a_block_is_adaln_zero() -> None:
    block = DiTBlock(12, 3, 20, eps=1e-3).double()
    h, context, told = noise(2, 5, 12), noise(2, 12, seed=2), silu(noise(2, 12, seed=2))
    assert torch.equal(block(h, told), h)  # identity at the start
    w = perturbed(block).state_dict()
    assert_close(block(h, told), block_formula(w, h, context, 3, 1e-3), rtol=1e-11, atol=1e-11)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    assert_close(block(h, told, mask), block_formula(w, h, context, 3, 1e-3, mask), rtol=1e-11, atol=1e-11)


def test_a_block_that_reads_is_pixarts() -> None:
    block = DiTBlock(12, 3, 20, cross=True).double()
    h, context, told, words = noise(2, 5, 12), noise(2, 12, seed=2), silu(noise(2, 12, seed=2)), noise(2, 4, 12, seed=3)
    mask = torch.tensor([[True, False, True, False], [True] * 4])
    assert torch.equal(block(h, told, mask, words), h)  # identity at the start
    w = perturbed(block).state_dict()
    assert_close(
        block(h, told, mask, words), block_formula(w, h, context, 3, 1e-6, mask, words), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(
    ("shape", "size", "knobs"),
    [
        ((2, 8, 8), (8, 8), {"patch": 2, "learned_variance": True, "eps": 1e-2}),
        ((3, 4, 12), (8, 4), {"patch": 4, "heads": 4, "mlp_ratio": 1.5}),
        ((1, 6, 3), (3, 6), {"patch": 3, "shared": False, "depth": 3}),
    ],
)
def test_the_net_is_its_formula_at_any_size(shape: Any, size: Any, knobs: dict[str, Any]) -> None:
    made = {**SMALL, **knobs}
    net = dit(shape, classes=4, **made).double()
    x, label = noise(3, shape[0], *size), torch.tensor([2, 0, 3])
    cond = Cond(label=label).null(torch.tensor([False, True, False]))
    zero = torch.zeros(3, shape[0] * (2 if net.learned_variance else 1), *size, dtype=torch.float64)
    assert torch.equal(net(x, CLOCK, cond), zero)  # it says 0 at the start
    perturbed(net)
    want = net_formula(net, x, CLOCK, torch.tensor([2, -1, 3]), made["heads"], made.get("eps", 1e-6))
    assert_close(net(x, CLOCK, cond), want, rtol=1e-9, atol=1e-9)


def test_the_starting_weights_are_those_of_the_paper() -> None:
    # Xavier: uniform on ±√(6/(in + out)). 4,096 draws and more: the greatest is within 1 % of the bound but for a
    # chance of e^−40; a standard deviation is within 5 of its standard errors.
    torch.manual_seed(0)
    net = dit((3, 32, 32), classes=1000, width=64, heads=4, depth=1, patch=4)
    for layer in (net.stem, net.blocks[0].attention.qkv, net.blocks[0].linear1, net.blocks[0].linear2):
        out, inp = layer.weight.flatten(1).shape
        bound = math.sqrt(6 / (inp + out))
        assert 0.99 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()
    for weight in (net.context.linear1.weight, net.context.linear2.weight, net.context.label.table.weight):
        assert abs(float(weight.detach().std()) / 0.02 - 1) < 5 / math.sqrt(2 * weight.numel())
    for layer in (net.blocks[0].modulation, net.head.modulation, net.head.linear):
        assert not layer.weight.any()
        assert not layer.bias.any()


# ---- places and patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "made"), [((3, 5), (3, 5)), ((4, 2), (8, 8)), ((1, 6), (2, 3))])
def test_places_are_their_closed_form(grid: tuple[int, int], made: tuple[int, int]) -> None:
    got = positions(*grid, 16, made).reshape(*grid, 16)
    for r in range(grid[0]):
        for c in range(grid[1]):
            want = place_formula(r * made[0] / grid[0], c * made[1] / grid[1], 16)
            assert_close(got[r, c], want, rtol=0, atol=1e-14)


def test_unpatchify_undoes_the_cutting_into_patches() -> None:
    x = noise(2, 3, 6, 4)
    tokens = functional.unfold(x, 2, stride=2).transpose(1, 2)  # (B, N, C·p·p), channels outermost
    tokens = tokens.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)  # innermost
    assert torch.equal(unpatchify(tokens, 3, 2, 2), x)
    # And the stem cuts where unpatchify pastes: with a stem that copies each patch, the two are the identity.
    net = dit((3, 6, 4), width=12, heads=1, depth=1).double()
    copy = torch.eye(12, dtype=torch.float64).reshape(2, 2, 3, 12).permute(3, 2, 0, 1)
    with torch.no_grad():
        net.stem.weight.copy_(copy)
    assert torch.equal(unpatchify(net.stem(x).flatten(2).transpose(1, 2), 3, 2, 2), x)


@pytest.mark.parametrize("size", [(8, 7), (9, 8), (1, 1), (6, 2)])
def test_sizes_that_the_patch_does_not_divide_are_refused(size: tuple[int, int]) -> None:
    said = f"got images of {size[0]}×{size[1]}, need multiples of 4, the patch"
    with pytest.raises(BadShape, match=said):
        dit((1, *size), patch=4, **SMALL)
    net = dit((1, 8, 8), patch=4, **SMALL)
    with pytest.raises(BadShape, match=said) as caught:
        net(torch.zeros(1, 1, *size), torch.zeros(1))
    assert "\n" not in str(caught.value)


def test_one_embedding_for_all_blocks_is_as_many_equal_ones() -> None:
    one = perturbed(dit((1, 4, 4), classes=2, **SMALL))
    each = perturbed(dit((1, 4, 4), classes=2, shared=False, **SMALL))
    weights = {**each.state_dict(), **one.state_dict()}
    weights |= {
        name.replace("context.", "contexts.0.", 1): v for name, v in one.state_dict().items() if "context." in name
    }
    each.load_state_dict(weights)
    x, cond = noise(3, 1, 4, 4), Cond(label=torch.tensor([0, 1, 1]))
    assert_close(each(x, CLOCK, cond), one(x, CLOCK, cond), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        each.contexts[0].linear2.bias += 0.1
    assert differ(each(x, CLOCK, cond), one(x, CLOCK, cond))


# ---- conditions -----------------------------------------------------------------------------------------------

CONDITIONED = [
    pytest.param({**TOKENS, "text": "cross"}, id="tokens-cross"),
    pytest.param({**TOKENS, "text": "joint"}, id="tokens-joint"),
    pytest.param({**FEATURES}, id="features"),
    pytest.param({**FEATURES, "features": 16, "text": "joint"}, id="features-joint"),
]


def texts(net: DiT, length: int = 5) -> Cond:
    """Three texts, of 5, 2 and 3 places."""
    mask = torch.arange(length)[None] < torch.tensor([5, 2, 3])[:, None]
    if net.text is not None and net.text.vocabulary:
        return Cond(text=(torch.arange(3 * length) % net.text.vocabulary).reshape(3, length), text_mask=mask)
    features = 0 if net.text is None else net.text.features
    return Cond(text=noise(3, length, features, seed=5), text_mask=mask)


@pytest.mark.parametrize("knobs", CONDITIONED)
def test_padding_of_a_text_is_not_read_and_every_word_is(knobs: dict[str, Any]) -> None:
    net = perturbed(dit((1, 4, 4), **knobs, **SMALL))
    x, cond = noise(3, 1, 4, 4), texts(net)
    y = net(x, CLOCK, cond)
    assert cond.text is not None
    assert cond.text_mask is not None
    other = cond.text.clone()
    other[~cond.text_mask] = other[~cond.text_mask] * 0 + 7
    assert torch.equal(net(x, CLOCK, Cond(text=other, text_mask=cond.text_mask)), y)
    longer = Cond.cat([cond, texts(net, 6)])  # one place more of padding
    assert_close(net(x.repeat(2, 1, 1, 1), CLOCK.repeat(2), longer)[:3], y, rtol=1e-12, atol=1e-12)
    for row, place in [(0, 4), (1, 1), (2, 0)]:
        changed = cond.text.clone()
        changed[row, place] = (changed[row, place] + 1) % 11
        got = net(x, CLOCK, Cond(text=changed, text_mask=cond.text_mask))
        others = [i for i in range(3) if i != row]
        assert differ(got[row : row + 1], y[row : row + 1])
        assert torch.equal(got[others], y[others])


@pytest.mark.parametrize("knobs", CONDITIONED)
def test_rows_without_a_text_hear_the_learned_null(knobs: dict[str, Any]) -> None:
    net = perturbed(dit((1, 4, 4), **knobs, **SMALL))
    x, cond = noise(3, 1, 4, 4), texts(net)
    null, told = net(x, CLOCK, None), net(x, CLOCK, cond)
    assert differ(null, told)
    some = torch.tensor([True, False, True])
    assert_close(net(x, CLOCK, cond.null(some)), torch.stack([null[0], told[1], null[2]]), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        net.text.null += noise(*net.text.null.shape, seed=8)
    assert differ(net(x, CLOCK, None), null)
    assert torch.equal(net(x, CLOCK, cond), told)


def everything(knobs: dict[str, Any], **more: Any) -> tuple[DiT, Cond]:
    """A net that takes all conditions, and three rows of them with some nulls."""
    terms = {"classes": 3, "attributes": 2, "image": 2, "augment": True}
    net = perturbed(dit((1, 4, 8), **terms, **knobs, **{**SMALL, **more}))
    text = texts(net)
    cond = Cond(
        label=torch.tensor([0, 2, 1]),
        vec=noise(3, 2, seed=6),
        text=text.text,
        text_mask=text.text_mask,
        image=noise(3, 2, 8, 4, seed=7),
        image_t=torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64),
        nulls={"label": torch.tensor([True, False, False]), "text": torch.tensor([False, True, False])},
    )
    return net, cond


@pytest.mark.parametrize("knobs", CONDITIONED[:2])
def test_a_row_with_all_conditions_is_answered_alone_and_hears_each(knobs: dict[str, Any]) -> None:
    net, cond = everything(knobs)
    x = noise(3, 1, 4, 8)
    y = net(x, CLOCK, cond)
    for i in range(3):
        row = slice(i, i + 1)
        assert_close(net(x[row], CLOCK[row], cond.take(row)), y[row], rtol=1e-11, atol=1e-11)
    order = torch.tensor([2, 0, 1])
    assert_close(net(x[order], CLOCK[order], cond.take(order)), y[order], rtol=1e-11, atol=1e-11)
    heard = cond.take(torch.tensor([2]))
    for name in heard.present:
        assert differ(net(x[2:], CLOCK[2:], heard.null(only=(name,))), y[2:]), name
    assert heard.image_t is not None
    louder = heard.take(slice(0, 1))
    object.__setattr__(louder, "image_t", heard.image_t + 0.3)
    assert differ(net(x[2:], CLOCK[2:], louder), y[2:])


def test_an_image_condition_is_joined_to_x_channel_by_channel() -> None:
    # A net of C + C' channels whose extra input is the image: the same stem, and the rest of its output left out.
    net = perturbed(dit((1, 4, 4), image=2, **SMALL))
    wide = dit((3, 4, 4), **SMALL).double().eval()
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("image.")}
    pad = [weights[f"head.linear.{name}"].unflatten(0, (4, 1)) for name in ("weight", "bias")]
    for name, value in zip(("weight", "bias"), pad, strict=True):
        weights[f"head.linear.{name}"] = torch.cat([value, *[torch.zeros_like(value)] * 2], dim=1).flatten(0, 1)
    wide.load_state_dict(weights)
    x, image = noise(3, 1, 4, 4), noise(3, 2, 4, 4, seed=2)
    want = wide(torch.cat([x, image], dim=1), CLOCK)
    assert_close(net(x, CLOCK, Cond(image=image)), want[:, :1], rtol=1e-12, atol=1e-12)
    assert not want[:, 1:].any()


# ---- compiled, and computed again -----------------------------------------------------------------------------


@pytest.mark.parametrize(("knobs", "again"), [(CONDITIONED[0].values[0], True), (CONDITIONED[1].values[0], False)])
def test_it_compiles_without_graph_breaks(knobs: dict[str, Any], again: bool) -> None:
    net, cond = everything(knobs, depth=1, checkpoint=again)
    x = noise(3, 1, 4, 8)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(x, CLOCK, cond), net(x, CLOCK, cond), rtol=1e-11, atol=1e-11)
    torch.compiler.reset()


@pytest.mark.parametrize("knobs", CONDITIONED[:2])
def test_blocks_computed_again_give_the_same_gradient_and_keep_less(knobs: dict[str, Any]) -> None:
    net, cond = everything(knobs, depth=4, dropout=0.3)
    net.train()
    x = noise(3, 1, 4, 8)
    kept: dict[bool, int] = {}
    grads: dict[bool, list[Tensor]] = {}
    for again in (False, True):
        net.checkpoint = again
        held: dict[int, int] = {}

        def pack(t: Tensor, held: dict[int, int] = held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = net(x, CLOCK, cond)
        own = sum(p.numel() * p.element_size() for p in net.parameters() if p.untyped_storage().data_ptr() in held)
        kept[again] = sum(held.values()) - own
        net.zero_grad()
        (y * noise(*y.shape, seed=9)).sum().backward()
        grads[again] = [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
    assert len(grads[True]) == 1 + len(list(net.parameters()))
    for one, other in zip(grads[False], grads[True], strict=True):
        assert torch.equal(one, other)
    assert kept[True] < kept[False] / 2
    net.checkpoint = True
    with torch.no_grad():
        assert differ(net(x, CLOCK, cond), net(x, CLOCK, cond))  # dropout is at work, and nothing is recomputed


# ---- sizes ----------------------------------------------------------------------------------------------------

TABLE_1 = {"dit_s": (12, 384, 6), "dit_b": (12, 768, 12), "dit_l": (24, 1024, 16), "dit_xl": (28, 1152, 16)}
"""Layers, hidden size, heads: Peebles & Xie 2023, table 1."""

TABLE_4 = {"dit_s": (33, 33, 33), "dit_b": (130, 130, 131), "dit_l": (458, 458, 459), "dit_xl": (675, 675, 676)}
"""Millions of parameters at patch 2, 4, 8: Peebles & Xie 2023, table 4, some rounded up and some down."""


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", TABLE_1)
def test_the_presets_are_the_papers(name: str) -> None:
    depth, width, heads = TABLE_1[name]
    for patch, millions in zip((2, 4, 8), TABLE_4[name], strict=True):
        with torch.device("meta"):
            net = getattr(house, name)((4, 32, 32), classes=1000, patch=patch, learned_variance=True)
        block = (6 + 3 + 1 + 4 + 4) * width**2 + (6 + 3 + 1 + 4 + 1) * width  # modulation, qkv, out, up, down
        told = 256 * width + width + width**2 + width + 1001 * width
        ends = (4 * patch**2 * width + width) + 2 * width**2 + 2 * width + (width + 1) * 8 * patch**2
        assert count(net) == depth * block + told + ends
        assert abs(count(net) / 1e6 - millions) < 1
        assert {b.attention.heads for b in net.blocks} == {heads}


def test_dit_xl_2_has_the_size_of_the_published_weights() -> None:
    with torch.device("meta"):
        net = house.dit_xl((4, 32, 32), classes=1000, learned_variance=True)
    assert count(net) == 675_129_632 - 256 * 1152  # DiT-XL-2-256x256.pt, but for its table of places


def test_the_head_tells_what_it_tells() -> None:
    head = DiTHead(8, 4).double()
    h, told = noise(2, 3, 8), noise(2, 8, seed=2)
    assert not head(h, told).any()
    w = perturbed(head).state_dict()
    shift, scale = linear(w, "modulation", told)[:, None].chunk(2, dim=2)
    want = linear(w, "linear", norm(h, 1e-6) * (1 + scale) + shift)
    assert_close(head(h, told), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"width": 18}, "width: got 18, need a multiple of 4"),
        ({"width": 4}, "width"),
        ({"heads": 3}, "heads: got 3, need a divisor of 16"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"patch": 0}, "patch"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"mlp_ratio": math.nan}, "mlp_ratio"),
        ({"dropout": 1.0}, "dropout"),
        ({"eps": 0.0}, "eps"),
        ({"classes": -1}, "classes"),
        ({"augment": True}, "augment: got true, but this net takes no image"),
        ({"text": "joint"}, "text: got 'joint', but this net reads no text"),
        ({"length": 4}, "length: got 4, but this net reads no text"),
        ({"vocabulary": 5}, "length: got 0 with a text"),
        ({"vocabulary": 5, "features": 5, "length": 3}, "vocabulary 5 and features 5"),
        ({"text": "aloud", "features": 5, "length": 3}, "text: got 'aloud', need cross or joint"),
        ({"fourier_scale": 4.0}, "fourier_scale"),
    ],
)
def test_bad_knobs_are_refused_in_one_line(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said) as caught:
        dit((1, 8, 8), **{**SMALL, **knobs})
    assert "\n" not in str(caught.value)


def test_shapes_that_are_no_images_are_refused() -> None:
    for shape in [(2,), (1, 8), (1, 2, 8, 8), (1, 0, 8)]:
        with pytest.raises(BadShape, match="dit shape"):
            dit(shape, **SMALL)


# ---- the page -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs/nets/dit.md").read_text(encoding="utf-8")


def test_the_page_tells_the_sizes() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", PAGE, re.MULTILINE
    )
    assert [row[0] for row in rows] == list(TABLE_1)
    for name, *form in rows:
        assert tuple(map(int, form[:3])) == TABLE_1[name]
        for patch, told in zip((2, 4, 8), form[3:], strict=True):
            with torch.device("meta"):
                net = getattr(house, name)((4, 32, 32), classes=1000, patch=patch, learned_variance=True)
            assert f"{count(net):,}" == told
    assert f"{count(dit((3, 32, 32))):,}" in PAGE
    assert f"{count(house.dit_mnist((1, 28, 28), classes=10)):,}" in PAGE


def test_the_example_of_the_page_runs() -> None:
    left: dict[str, Any] = {}
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "docs/nets/dit.md", "exec"), left)  # noqa: S102, the page is our own
    assert left["y"].shape == (3, 4, 32, 32)
    assert left["wide"].shape == (3, 4, 16, 48)
