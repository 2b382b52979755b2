"""Law 4: nets are deterministic, treat rows alone, save and load, export, and say what their formulas say.

Every net of the folder is found and tried unasked; every parameter is perturbed first, since a zero-initialised last
layer makes anything equal.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import inkdrop.nets
from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape, InkdropError
from inkdrop.nets import blocks, embed
from inkdrop.nets.mlp import MLPBlock, mlp
from inkdrop.nets.unet import unet
from inkdrop.nets.unets import unet_cifar10

SHAPES = [(5, 7, 5), (1, 28, 28), (3, 48, 32), (4, 16, 16), (1, 8, 8), (2, 1, 1), (2,), (3, 11), (2, 3, 8, 8)]
LARGE = 4_000_000  # parameters; nets above are built on the meta device only
CLASSES = 3

TWO = {"multipliers": (1, 2), "blocks": 1}
OTHERS = {"norm_groups": 4, "norm_eps": 1e-5, "symmetric": True, "shift": 0.0, "cos_first": True}  # Stable Diffusion's

# Knobs that the nets' defaults leave untried, by net.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mlp": [{"embedding": "fourier"}, {"learned_variance": True, "depth": 1, "attributes": 2, "augmentation": 3}],
    "dit": [{"width": 24, "depth": 2, "heads": 2, "augmentation": 3, "coordinates": 2}],
    "unet": [
        {"scale_shift": False, "multipliers": (1, 2, 2, 2), "attention": (1,), "blocks": 1},  # as unet_cifar10
        {"patch": 2, "learned_variance": True, "attention": (0,), "head_width": 8, "blocks": 1},
        {"patch": 3, "embedding": "fourier", "multipliers": (1,), "middle_attention": False},
        {**TWO, "vocabulary": 7, "length": 5, "cross": (1,), "depth": (2,), "head_width": 8, "text_depth": 1},
        {**TWO, "features": 6, "length": 5, "cross": (0,), "only_cross": (0,), "null_length": 2, "pooled": False},
        {**TWO, "image": 2, "augment": True, "attributes": 3, "resample": "residual", "patch": 2},
        {**TWO, **OTHERS, "attention": (0, 1), "heads": (2, 4), "middle_groups": 0, "checkpoint": True},
        {**TWO, "augmentation": 3, "coordinates": 2, "patch": 2},
    ],
    "unet_latent": [{"features": 6, "length": 5}, {"attributes": 2, "image": 2, "augment": True, "norm_groups": 8}],
    "unet_text": [{"attributes": 2, "image": 2, "augment": True, "norm_groups": 4}],
}
QUICK = {"affine", "mlp", "unet", "unet_digits", "unet_mnist", "unet_tiny"}  # at every shape, and in the fast tier
# What a net cannot be made without.
NEEDS: dict[str, dict[str, Any]] = {"unet_text": {"vocabulary": 7, "length": 5}}


def found() -> dict[str, Callable[..., nn.Module]]:
    """The public functions of nets/ whose only positional parameter is `shape`."""
    out = {}
    for info in pkgutil.iter_modules(inkdrop.nets.__path__):
        module = importlib.import_module(f"inkdrop.nets.{info.name}")
        for name, thing in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or thing.__module__ != module.__name__:
                continue
            params = inspect.signature(thing).parameters.values()
            if [p.name for p in params if p.kind is not p.KEYWORD_ONLY] == ["shape"]:
                out[name] = thing
    return out


DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "guides/nets.md").read_text(encoding="utf-8")


def run_guide(first: str) -> dict[str, Any]:
    """The names that the guide's Python block with this first line leaves behind."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL):
        if block.startswith(f"{first}\n"):
            exec(compile(block, "docs/guides/nets.md", "exec"), namespace)  # noqa: S102, the guide is our own
    return namespace


HOUSE = found()
# The guide's own example keeps the laws too.
NETS = {**HOUSE, "affine": run_guide("# src/inkdrop/nets/affine.py")["affine"]}


def make(name: str, shape: tuple[int, ...], **given: Any) -> nn.Module:
    """A net with three classes, and narrow where it has that knob."""
    knobs = inspect.signature(NETS[name]).parameters
    small = {k: v for k, v in {"width": 16, "classes": CLASSES}.items() if k in knobs}
    return NETS[name](shape, **{**small, **NEEDS.get(name, {}), **given})


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@cache
def cases() -> list[Any]:
    """(net, knobs, shape) of every net, every variant and every shape that it takes, but those where it is too large.

    A net that is too large at every shape has one case, which is skipped with the reason.
    """
    out = []
    for name, given in [(net, knobs) for net in NETS for knobs in [{}, *VARIANTS.get(net, [])]]:
        sizes: dict[tuple[int, ...], int] = {}
        for shape in SHAPES:
            with contextlib.suppress(BadShape), torch.device("meta"):
                sizes[shape] = count(make(name, shape, **given))
        runs = [shape for shape, size in sizes.items() if size <= LARGE] or list(sizes)[:1]
        quick = name in QUICK and not set(given) & {"length", "image", "heads"}
        for shape in runs if quick else runs[:2]:
            shown = "x".join(map(str, shape)) + "".join(f",{k}={v}" for k, v in given.items())
            large = pytest.mark.skip(reason=f"{name}: {sizes[shape]:,} parameters, built on the meta device only")
            marks = [large] if sizes[shape] > LARGE else [] if quick else [pytest.mark.long]
            out.append(pytest.param(name, given, shape, marks=marks, id=f"{name}-{shown}"))
    return out


def one_each() -> list[Any]:
    """The first case of every net and variant that is not too large."""
    seen: dict[str, Any] = {}
    for case in cases():
        if "skip" not in [mark.name for mark in case.marks]:
            seen.setdefault(f"{case.values[0]}{case.values[1]}", case)
    return list(seen.values())


every_case = pytest.mark.parametrize(("name", "given", "shape"), cases())
every_net = pytest.mark.parametrize(("name", "given", "shape"), one_each())
every_shown = pytest.mark.parametrize(
    ("name", "given", "shape"), [c for c in one_each() if {"augmentation", "coordinates"} & c.values[1].keys()]
)
every_exported = pytest.mark.parametrize(
    ("name", "given", "shape"), [c for c in one_each() if not c.values[1] or "only_cross" in c.values[1]]
)


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def fields(net: nn.Module, shape: tuple[int, ...], rows: int, seed: int = 1) -> dict[str, Tensor]:
    """Every field of a condition that the net takes, unlike in each row; texts of unlike length."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    if net.classes:
        out["label"] = (torch.arange(rows) + seed) % net.classes
    if net.context.vec is not None:
        out["vec"] = torch.randn(rows, net.context.vec.linear.in_features, generator=generator)
    if (text := getattr(net, "text", None)) is not None:
        tokens = torch.randint(max(text.vocabulary, 1), (rows, 4), generator=generator)
        given = torch.randn(rows, 4, max(text.features, 1), generator=generator)
        out["text"] = tokens if text.vocabulary else given
        out["text_mask"] = torch.arange(4) <= (torch.arange(rows)[:, None] + seed) % 4
    if (image := getattr(net, "image", None)) is not None:
        out["image"] = torch.randn(rows, len(image.null), *shape[1:], generator=generator)
        if net.context.augment is not None:
            out["image_t"] = torch.rand(rows, generator=generator)
    if net.context.augmentation is not None:
        out["augmentation"] = torch.randn(rows, net.context.augmentation.in_features, generator=generator)
    if getattr(net, "coordinates", None) is not None:
        out["window"] = torch.rand(rows, 4, generator=generator)
    return out


def batch(net: nn.Module, shape: tuple[int, ...], rows: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """(x, clock, cond) of unlike rows; the second row is null in every field that the net takes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *shape, generator=generator, dtype=dtype)
    clock = torch.linspace(3.0, 700.0, rows, dtype=dtype)
    told = fields(net, shape, rows)
    return x, clock, Cond(**told).null(torch.arange(rows) == 1) if told else None


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two answers differ by far more than rounding, in every row."""
    return bool(((a - b).flatten(1).norm(dim=1) > 1e-4 * a.flatten(1).norm(dim=1)).all())


# ---- the laws -------------------------------------------------------------------------------------------------


def test_the_house_finds_the_same_nets() -> None:
    from inkdrop.find import names

    assert {"mlp", "unet", "unet_cifar10", "unet_digits", "unet_mnist", "unet_tiny"} <= set(HOUSE)
    assert names("nets") == sorted(HOUSE)


@pytest.mark.parametrize("name", NETS)
def test_every_net_takes_some_shape(name: str) -> None:
    assert [case for case in cases() if case.values[0] == name]


@every_case
def test_a_row_is_answered_alone(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    # In float64, so that what couples rows shows above rounding (sums of some 10^3 terms: about 1e-13 relative).
    net = perturbed(make(name, shape, **given).double())
    x, clock, cond = batch(net, shape, dtype=torch.float64)
    with torch.no_grad():
        y = net(x, clock, cond)
        assert y.shape == (3, shape[0] * (2 if net.learned_variance else 1), *shape[1:])
        asked = inspect.signature(NETS[name]).parameters
        assert (net.shape, net.classes) == (shape, CLASSES if "classes" in asked else 0)
        assert torch.equal(net(x, clock, cond), y)
        order = torch.tensor([2, 0, 1])
        assert_close(net(x[order], clock[order], cond and cond.take(order)), y[order], rtol=1e-10, atol=1e-10)
        for i in range(3):
            row = slice(i, i + 1)
            assert_close(net(x[row], clock[row], cond and cond.take(row)), y[row], rtol=1e-10, atol=1e-10)
    assert differ(y[:1], y[1:2])


@every_net
def test_eval_is_deterministic_and_dropout_is_for_training(
    name: str, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    knobs = inspect.signature(NETS[name]).parameters
    net = perturbed(make(name, shape, **given, **({"dropout": 0.5} if "dropout" in knobs else {})))
    asked = batch(net, shape)
    assert torch.equal(net(*asked), net(*asked))
    if "dropout" in knobs:
        net.train()
        assert differ(net(*asked), net(*asked))


@every_net
def test_a_save_loads(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = perturbed(make(name, shape, **given))
    fresh = perturbed(make(name, shape, **given), seed=5)
    asked = batch(net, shape)
    assert differ(fresh(*asked), net(*asked))
    fresh.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(fresh(*asked), net(*asked))


@every_net
def test_class_and_time_are_heard(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = perturbed(make(name, shape, **given))
    x, clock, cond = batch(net, shape)
    assert differ(net(x, clock, cond), net(x, clock + 1.5, cond))
    if not net.classes:
        pytest.skip(f"{name}: takes no classes")
    a, b = (net(x, clock, Cond(label=torch.tensor(label))) for label in ([0, 0, 0], [1, 2, 1]))
    null = net(x, clock, None)
    assert differ(a, b)
    assert differ(a, null)
    assert differ(b, null)
    assert torch.equal(net(x, clock, Cond(label=torch.tensor([0, 1, 2])).null()), null)  # whatever the label says
    assert torch.equal(net(x, clock, Cond()), null)
    mixed = net(x, clock, Cond(label=torch.tensor([0, 2, 0])).null(torch.tensor([False, False, True])))
    assert_close(mixed, torch.stack([a[0], b[1], null[2]]))


@pytest.mark.long
@every_net
def test_every_field_is_heard_and_its_null_is_its_absence(
    name: str, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    net = perturbed(make(name, shape, **given))
    x, clock, _ = batch(net, shape)
    one, other = fields(net, shape, 3), fields(net, shape, 3, seed=2)
    silent = net(x, clock, None)
    for field in [f for f in one if f in ("label", "vec", "text", "image")]:
        beside = [f"{field}_mask", f"{field}_t"]
        parts = [{k: v for k, v in told.items() if k == field or k in beside} for told in (one, other)]
        a, b = (net(x, clock, Cond(**part)) for part in parts)
        assert differ(a, b)
        assert differ(a, silent)
        assert_close(net(x, clock, Cond(**parts[0]).null()), silent, rtol=1e-5, atol=1e-5)  # whatever it says
        rest = {k: v for k, v in one.items() if k != field and k not in beside}
        without = net(x, clock, Cond(**rest))
        assert_close(net(x, clock, Cond(**one).null(only=(field,))), without, rtol=1e-5, atol=1e-5)
        rows = torch.tensor([True, False, True])
        mixed = net(x, clock, Cond(**parts[1]).null(rows))
        assert_close(mixed, torch.where(rows.view(3, *[1] * (x.ndim - 1)), silent, b), rtol=1e-5, atol=1e-5)


def whole(name: str, told: Tensor) -> Tensor:
    """What says no more than silence does: no augmentation, or a window that is the full picture."""
    return torch.zeros_like(told) if name == "augmentation" else torch.tensor([0.0, 0, 1, 1]).expand_as(told)


@every_shown
def test_how_a_picture_is_shown_is_heard_and_never_null(
    name: str, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    net = perturbed(make(name, shape, **given))
    x, clock, _ = batch(net, shape)
    one, other = fields(net, shape, 3), fields(net, shape, 3, seed=2)
    shown = {field: told for field, told in one.items() if field in ("augmentation", "window")}
    silent = net(x, clock, None)
    for field, told in shown.items():
        a, b = net(x, clock, Cond(**{field: told})), net(x, clock, Cond(**{field: other[field]}))
        assert differ(a, b)
        assert differ(a, silent)
        assert torch.equal(net(x, clock, Cond(**{field: whole(field, told)})), silent)
    assert_close(net(x, clock, Cond(**one).null()), net(x, clock, Cond(**shown)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_a_net_with_these_knobs_has_these_layers(name: str) -> None:
    """Else a net that takes a knob and does not hand it on would pass every other law."""
    knobs = inspect.signature(NETS[name]).parameters
    told = {knob: size for knob, size in (("augmentation", 3), ("coordinates", 2)) if knob in knobs}
    shape = next(case.values[2] for case in cases() if case.values[0] == name)
    with torch.device("meta"):
        net = make(name, shape, **told)
    assert ("augmentation" in told) == (net.context.augmentation is not None)
    assert net.context.augmentation is None or net.context.augmentation.in_features == 3
    assert ("coordinates" in told) == (getattr(net, "coordinates", None) is not None)


@every_net
def test_the_gradient_reaches_every_parameter(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = perturbed(make(name, shape, **given)).train()
    x, clock, cond = batch(net, shape, rows=CLASSES + 2)
    y = net(x.requires_grad_(), clock, cond)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    assert not silent
    assert x.grad is not None
    assert (x.grad != 0).all()  # and every number of x


class Flat(nn.Module):
    """A net whose condition comes as tensors, as exporters need it: x, clock, which rows are null, then its fields."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, clock: Tensor, null: Tensor, *told: Tensor) -> Tensor:
        cond = Cond(**dict(zip(self.names, told, strict=True)))
        return self.net(x, clock, Cond(**vars(cond) | {"nulls": dict.fromkeys(cond.present, null)}))


@every_exported
def test_an_export_equals_eager(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    made = perturbed(make(name, shape, **given))
    told = fields(made, shape, 3)
    net = Flat(made, list(told))
    x, clock, _ = batch(made, shape)
    asked = (x, clock, torch.tensor([False, True, False]), *told.values())
    exported = torch.export.export(net, asked).module()
    assert_close(exported(*asked), net(*asked), rtol=1e-5, atol=1e-5)
    other = (x.flip(0), clock + 40.0, *(part.flip(0) for part in asked[2:]))  # nothing was frozen
    assert_close(exported(*other), net(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "unet_tiny"])
def test_an_export_keeps_the_batch_size_free(name: str) -> None:
    net = perturbed(make(name, (1, 7, 5)))
    x, clock, _ = batch(net, (1, 7, 5), rows=5)
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(net, (x, clock), dynamic_shapes=({0: rows}, {0: rows})).module()
    for n in (1, 4, 5):
        assert_close(exported(x[:n], clock[:n]), net(x[:n], clock[:n]), rtol=1e-5, atol=1e-5)


@every_net
def test_half_precision_is_the_same_net(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = perturbed(make(name, shape, **given))
    x, clock, cond = batch(net, shape)
    with torch.no_grad():
        y = net(x, clock, cond)
        half = net.bfloat16()(x.bfloat16(), clock, cond).float()
    # Eight bits: 0.4 % an operation, some tens of operations deep, added in quadrature.
    assert (half - y).norm() < 0.05 * y.norm()


@every_net
def test_bad_input_is_refused_in_one_line(name: str, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = make(name, shape, **given)
    x, clock, _ = batch(net, shape)
    wide = torch.cat([x, x], dim=1)
    refused: list[tuple[type[InkdropError], str, tuple[Any, ...]]] = [
        (BadShape, "x", (wide, clock, None)),
        (BadShape, "x", (x[0], clock, None)),
        (BadShape, "clock", (x, clock[:2], None)),
        (BadShape, "clock", (x, clock.long(), None)),
        (BadArgument if net.context.vec is None else BadShape, "vec", (x, clock, Cond(vec=torch.zeros(3, 4)))),
    ]
    if net.classes:
        refused += [
            (BadArgument, "got 3, need 0 to 2", (x, clock, Cond(label=torch.tensor([0, 3, 1])))),
            (BadArgument, "got -1, need 0 to 2", (x, clock, Cond(label=torch.tensor([0, -1, 1])))),
            (BadShape, "got 2 rows, need 3", (x, clock, Cond(label=torch.tensor([0, 1])))),
        ]
    for error, said, asked in refused:
        with pytest.raises(error, match=said) as caught:
            net(*asked)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long])
        for name, net in NETS.items()
        if "classes" in inspect.signature(net).parameters
    ],
)
def test_a_net_without_classes_refuses_labels(name: str) -> None:
    shape = next(case.values[2] for case in cases() if case.values[0] == name)
    with torch.device("meta"):
        net = make(name, shape, classes=0)
        x, clock = torch.empty(2, *shape), torch.empty(2)
        with pytest.raises(BadArgument, match="label"):
            net(x, clock, Cond(label=torch.zeros(2, dtype=torch.int64)))
        assert net(x, clock).shape[0] == 2
        with pytest.raises(BadArgument, match="classes"):
            make(name, shape, classes=-1)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"width": 7}, "width"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"blocks": 0}, "blocks"),
        ({"attention": (3,)}, "attention: got level 3, need 0 to 2"),
        ({"attention": (-1,)}, "attention"),
        ({"head_width": 24, "attention": (0,)}, "head_width"),
        ({"dropout": 1.0}, "dropout"),
        ({"patch": 0}, "patch"),
        ({"embedding": "wavelet"}, "embedding"),
        ({"fourier_scale": 4.0}, "fourier_scale"),
        ({"fourier_scale": 0.0, "embedding": "fourier"}, "scale"),
    ],
)
def test_bad_knobs_of_unet_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        unet((1, 8, 8), **knobs)


def test_shapes_and_knobs_of_other_nets_are_refused() -> None:
    for shape in [(2,), (1, 8), (1, 2, 8, 8), (1, 0, 8)]:
        with pytest.raises(BadShape, match="unet shape"):
            unet(shape)
    for shape in [(), (0,)]:
        with pytest.raises(BadShape, match="mlp shape"):
            mlp(shape)
    for knobs in [{"width": 2}, {"depth": 0}, {"dropout": -0.1}]:
        with pytest.raises(BadArgument, match="mlp"):
            mlp((2,), **knobs)
    with pytest.raises(BadShape, match="need \\(B, 2, 3\\)"):
        mlp((2, 3))(torch.zeros(1, 2, 4), torch.zeros(1))


def test_a_unet_made_for_one_size_runs_at_another() -> None:
    net = perturbed(unet((1, 8, 8), width=16, multipliers=(1, 1), attention=(1,), patch=2))
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    other = unet((1, 13, 6), width=16, multipliers=(1, 1), attention=(1,), patch=2).eval()
    other.load_state_dict(weights)
    asked = batch(other, (1, 13, 6))
    assert torch.equal(net(*asked), other(*asked))


# ---- embeddings against closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "shift", "period"), [(8, 1.0, 10_000.0), (6, 0.0, 10_000.0), (128, 1.0, 50.0)])
def test_sinusoid_is_its_formula(width: int, shift: float, period: float) -> None:
    clock = torch.tensor([0.0, 1.0, 17.5, 999.0], dtype=torch.float64)
    half = width // 2
    angles = [[float(c) * period ** (-i / (half - shift)) for i in range(half)] for c in clock]
    sines = torch.tensor([[math.sin(a) for a in row] for row in angles], dtype=torch.float64)
    cosines = torch.tensor([[math.cos(a) for a in row] for row in angles], dtype=torch.float64)
    got = embed.sinusoid(clock, width, max_period=period, shift=shift)
    assert_close(got, torch.cat([sines, cosines], dim=1), rtol=0, atol=1e-12)
    swapped = embed.sinusoid(clock, width, max_period=period, shift=shift, cos_first=True)
    assert torch.equal(swapped, torch.cat([got[:, half:], got[:, :half]], dim=1))
    # float32: the angle 999 is known to 2^-14, and a frequency to 1e-7 of it.
    assert_close(embed.sinusoid(clock.float(), width, max_period=period, shift=shift).double(), got, rtol=0, atol=3e-4)
    assert embed.sinusoid(torch.tensor([3.0]), 4).dtype == torch.float32


def test_sinusoid_refuses_odd_and_narrow() -> None:
    for width in (0, 2, 7):
        with pytest.raises(BadArgument, match=f"got {width}"):
            embed.sinusoid(torch.zeros(1), width)
    for width in (0, 3):
        with pytest.raises(BadArgument, match=f"got {width}"):
            embed.Fourier(width)


def test_fourier_is_its_formula_and_its_frequencies_are_gaussian() -> None:
    torch.manual_seed(0)
    wave = embed.Fourier(8192, scale=5.0)
    f = wave.frequencies.double()
    # 4,096 draws: the standard error of the mean is 5/64 and of the standard deviation 5/90; four of each.
    assert abs(float(f.mean())) < 4 * 5 / 64
    assert abs(float(f.std()) - 5) < 4 * 5 / 90
    clock = torch.tensor([-1.5, 0.0, 0.3], dtype=torch.float64)
    angle = torch.tensor([[2 * math.pi * float(c) * float(k) for k in f[:50]] for c in clock], dtype=torch.float64)
    assert_close(wave(clock)[:, :50], angle.sin(), rtol=0, atol=1e-11)
    assert_close(wave(clock)[:, 4096 : 4096 + 50], angle.cos(), rtol=0, atol=1e-11)
    assert set(wave.state_dict()) == {"frequencies"}
    assert torch.equal(embed.Fourier(8192, 5.0).bfloat16().frequencies.double(), _seeded_frequencies())


def _seeded_frequencies() -> Tensor:
    """What the generator would have drawn next, rounded to eight bits by hand."""
    torch.manual_seed(0)
    torch.randn(4096)
    mantissa, exponent = torch.frexp((torch.randn(4096) * 5).double())
    return torch.ldexp((mantissa * 256).round() / 256, exponent)


def test_context_is_its_formula() -> None:
    torch.manual_seed(3)
    context = embed.Context(8, 12, classes=4)
    nn.init.normal_(context.label.null)
    clock, label = torch.tensor([5.0, 80.0, 999.0]), torch.tensor([3, 0, 2])
    cond = Cond(label=label).null(torch.tensor([False, True, False]))
    w = context.state_dict()
    first = embed.sinusoid(clock, 8) @ w["linear1.weight"].T + w["linear1.bias"]
    time = (first / (1 + (-first).exp())) @ w["linear2.weight"].T + w["linear2.bias"]
    classes = torch.stack([w["label.table.weight"][3], w["label.null"], w["label.table.weight"][2]])
    assert_close(context(clock, cond), time + classes)
    assert_close(context(clock, None), time + w["label.null"])


# ---- blocks against their formulas ----------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Group normalisation from means and variances."""
    b, c, h, w = x.shape
    g = x.reshape(b, groups, -1)
    centred = g - g.mean(dim=2, keepdim=True)
    z = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()).reshape(b, c, h, w)
    return z * weight[:, None, None] + bias[:, None, None]


def res_block(w: dict[str, Tensor], x: Tensor, context: Tensor, groups: tuple[int, int], scale_shift: bool) -> Tensor:
    """A residual block from its weights, written out."""
    h = silu(group_norm(x, groups[0], w["norm1.weight"], w["norm1.bias"]))
    h = functional.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
    e = (silu(context) @ w["project.weight"].T + w["project.bias"])[:, :, None, None]
    out = h.shape[1]
    if scale_shift:
        h = group_norm(h, groups[1], w["norm2.weight"], w["norm2.bias"]) * (1 + e[:, :out]) + e[:, out:]
    else:
        h = group_norm(h + e, groups[1], w["norm2.weight"], w["norm2.bias"])
    h = functional.conv2d(silu(h), w["conv2.weight"], w["conv2.bias"], padding=1)
    if "shortcut.weight" in w:
        x = torch.einsum("oi,bihw->bohw", w["shortcut.weight"][:, :, 0, 0], x) + w["shortcut.bias"][:, None, None]
    return x + h


def self_attention(w: dict[str, Tensor], x: Tensor, groups: int, head_width: int) -> Tensor:
    """Self-attention from its weights, pixel by pixel and head by head."""
    b, c, high, wide = x.shape
    tokens = group_norm(x, groups, w["norm.weight"], w["norm.bias"]).reshape(b, c, -1).transpose(1, 2)
    q, k, v = (
        tokens @ part.T + bias for part, bias in zip(w["qkv.weight"].chunk(3), w["qkv.bias"].chunk(3), strict=True)
    )
    heads = []
    for at in range(0, c, head_width):
        one = slice(at, at + head_width)
        score = torch.einsum("bid,bjd->bij", q[..., one], k[..., one]) / math.sqrt(head_width)
        weight = score.exp() / score.exp().sum(dim=2, keepdim=True)
        heads.append(torch.einsum("bij,bjd->bid", weight, v[..., one]))
    mixed = torch.cat(heads, dim=2) @ w["out.weight"].T + w["out.bias"]
    return x + mixed.transpose(1, 2).reshape(b, c, high, wide)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("inp", "out"), [(8, 12), (12, 12)])
def test_res_block_is_its_formula(inp: int, out: int, scale_shift: bool) -> None:
    torch.manual_seed(0)
    block = blocks.ResBlock(inp, out, 10, scale_shift=scale_shift).double()
    x, context = torch.randn(2, inp, 5, 4).double(), torch.randn(2, 10).double()
    if inp == out:
        assert torch.equal(block(x, context), x)  # zero at the start
    perturbed(block)
    got = block(x, context)
    want = res_block(dict(block.state_dict()), x, context, (inp // 4, out // 4), scale_shift)
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert block.train()(x, context).equal(got)


@pytest.mark.parametrize("head_width", [None, 4])
def test_self_attention_is_its_formula(head_width: int | None) -> None:
    torch.manual_seed(0)
    block = blocks.SelfAttention(12, head_width=head_width).double()
    x = torch.randn(2, 12, 3, 5).double()
    assert torch.equal(block(x), x)  # zero at the start
    perturbed(block)
    assert_close(block(x), self_attention(dict(block.state_dict()), x, 3, head_width or 12), rtol=1e-10, atol=1e-10)


def test_mlp_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = MLPBlock(6, 10).double()
    h, context = torch.randn(4, 6).double(), torch.randn(4, 10).double()
    assert torch.equal(block(h, context), h)
    w = perturbed(block).state_dict()
    hidden = silu(h) @ w["linear1.weight"].T + w["linear1.bias"]
    hidden = silu(hidden + silu(context) @ w["project.weight"].T + w["project.bias"])
    assert_close(block(h, context), h + hidden @ w["linear2.weight"].T + w["linear2.bias"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("high", "wide"), [(4, 6), (5, 4), (7, 1), (1, 1)])
def test_down_is_ddpms_convolution_and_up_undoes_its_size(high: int, wide: int) -> None:
    torch.manual_seed(0)
    down, up = blocks.Down(4).double(), blocks.Up(4).double()
    x = torch.randn(2, 4, high, wide).double()
    small = down(x)
    # Even sides are padded at the end only, so that a window starts at pixel 2i; odd sides at both, at 2i − 1.
    first = [-(side % 2) for side in (high, wide)]
    want = torch.zeros(2, 4, -(-high // 2), -(-wide // 2)).double()
    for i in range(want.shape[2]):
        for j in range(want.shape[3]):
            for k in range(3):
                for m in range(3):
                    row, column = first[0] + 2 * i + k, first[1] + 2 * j + m
                    if 0 <= row < high and 0 <= column < wide:
                        want[:, :, i, j] += x[:, :, row, column] @ down.conv.weight[:, :, k, m].T
    assert_close(small, want + down.conv.bias[:, None, None], rtol=1e-12, atol=1e-12)
    rows, columns = torch.arange(high) // 2, torch.arange(wide) // 2
    large = functional.conv2d(small[:, :, rows][..., columns], up.conv.weight, up.conv.bias, padding=1)
    assert_close(up(small, (high, wide)), large, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 16, 49, 64, 256, 1024, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_two_paths_of_attention_agree(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=generator).to(dtype)
    fused = functional.scaled_dot_product_attention(q, k, v)
    # Rounding of the dtype, on outputs of order 1: bfloat16 has 8 bits, and rounds the weights too.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float64: 1e-14}[dtype]
    assert_close(blocks._plain(q, k, v), fused, rtol=0, atol=tolerance)
    calls: list[str] = []
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *_: calls.append("fused") or fused)
    chosen = blocks.attend(q, k, v)
    plain = dtype == torch.bfloat16 and tokens <= 1024
    assert calls == ([] if plain else ["fused"])
    assert torch.equal(chosen, blocks._plain(q, k, v) if plain else fused)


def test_attention_follows_its_definition_between_unlike_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 5, 4, generator=generator, dtype=torch.float64)
    for head in range(2):
        for i in range(3):
            weight = [math.exp(float(q[0, head, i] @ k[0, head, j]) / 2) for j in range(5)]
            want = sum(p * v[0, head, j] for j, p in enumerate(weight)) / sum(weight)
            assert_close(blocks.attend(q, k, v)[0, head, i], want, rtol=1e-12, atol=1e-12)
            assert_close(blocks._plain(q, k, v)[0, head, i], want, rtol=1e-12, atol=1e-12)


def test_groups_divide_and_hold_four_channels() -> None:
    known = {128: 32, 256: 32, 384: 32, 64: 16, 48: 12, 36: 9, 32: 8, 5: 1, 3: 1, 1: 1, 37: 1, 640: 32, 192: 32}
    assert {c: blocks.groups(c) for c in known} == known
    for channels in range(1, 700):
        n = blocks.groups(channels)
        better = [m for m in range(n + 1, 33) if channels % m == 0 and channels // m >= 4]
        assert channels % n == 0
        assert not better
        assert n == 1 or channels // n >= 4


# ---- the U-Net as a whole -------------------------------------------------------------------------------------


def part(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in net.state_dict().items() if k.startswith(f"{prefix}.")}


def test_the_unet_runs_in_the_order_of_ddpm() -> None:
    torch.manual_seed(0)
    made = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "scale_shift": False}
    net = unet((3, 6, 5), **made).double()
    x, clock, _ = batch(net, (3, 6, 5), dtype=torch.float64)
    assert torch.equal(net(x, clock), torch.zeros_like(x))  # zero at the start
    perturbed(net)

    def conv(h: Tensor, name: str, **how: Any) -> Tensor:
        w = part(net, name)
        return functional.conv2d(h, w["weight"], w["bias"], **how)

    def res(h: Tensor, name: str, groups: tuple[int, int]) -> Tensor:
        return res_block(part(net, f"{name}.block"), h, context, groups, False)

    def attention(h: Tensor, name: str) -> Tensor:
        return self_attention(part(net, f"{name}.attention"), h, 4, 16)

    w = part(net, "context")
    context = silu(embed.sinusoid(clock, 8) @ w["linear1.weight"].T + w["linear1.bias"])
    context = context @ w["linear2.weight"].T + w["linear2.bias"]
    a = conv(x, "stem", padding=1)
    b = res(a, "down.0", (2, 2))
    c = conv(functional.pad(b, (1, 1, 0, 1)), "down.1.conv", stride=2)  # 6×5 -> 3×3
    d = attention(res(c, "down.2", (2, 4)), "down.2")
    h = res(attention(res(d, "middle.0", (4, 4)), "middle.0"), "middle.1", (4, 4))
    h = attention(res(torch.cat([h, d], dim=1), "up.0", (8, 4)), "up.0")
    h = attention(res(torch.cat([h, c], dim=1), "up.1", (6, 4)), "up.1")
    h = h[:, :, torch.arange(6) // 2][..., torch.arange(5) // 2]
    h = conv(h, "up.2.conv", padding=1)
    h = res(torch.cat([h, b], dim=1), "up.3", (6, 2))
    h = res(torch.cat([h, a], dim=1), "up.4", (4, 2))
    h = silu(group_norm(h, 2, *(part(net, "head.0")[n] for n in ("weight", "bias"))))
    assert_close(net(x, clock), conv(h, "head.2", padding=1), rtol=1e-9, atol=1e-9)


def test_a_patch_is_a_square_of_pixels() -> None:
    # With patch 2 the stem sees channel 4·c + 2·i + j at (y, x) where the image has channel c at (2y + i, 2x + j).
    net = perturbed(unet((2, 4, 6), width=8, multipliers=(1,), patch=2).double())
    x, clock, _ = batch(net, (2, 4, 6), dtype=torch.float64)
    pixels = torch.stack([x[:, c, i::2, j::2] for c in range(2) for i in (0, 1) for j in (0, 1)], dim=1)
    inner = unet((8, 2, 3), width=8, multipliers=(1,)).double().eval()
    inner.load_state_dict(net.state_dict())
    y, want = net(x, clock), inner(pixels, clock)
    for n, (c, i, j) in enumerate((c, i, j) for c in range(2) for i in (0, 1) for j in (0, 1)):
        assert_close(y[:, c, i::2, j::2], want[:, n], rtol=1e-12, atol=1e-12)
    padded = torch.cat([x, torch.zeros(3, 2, 4, 1).double()], dim=3)[:, :, :3]
    assert_close(
        net(padded, clock), net(functional.pad(padded, (0, 1, 0, 1)), clock)[:, :, :3, :7], rtol=1e-12, atol=1e-12
    )


def test_the_guides_first_example_says_what_it_says() -> None:
    left = run_guide("import torch")
    assert (left["net"].shape, left["net"].classes, left["net"].learned_variance) == ((3, 48, 32), 5, False)
    assert torch.equal(left["y"], torch.zeros(4, 3, 48, 32))


def test_every_net_starts_at_zero() -> None:
    for name in ("mlp", "unet", "unet_tiny"):
        net = make(name, (1, 8, 8))
        x, clock, cond = batch(net, (1, 8, 8))
        assert torch.equal(net(x, clock, cond), torch.zeros_like(x))


# ---- parameters -----------------------------------------------------------------------------------------------


def test_the_cifar10_net_of_ddpm_has_its_published_size() -> None:
    with torch.device("meta"):
        assert count(unet_cifar10((3, 32, 32))) == 35_746_307  # google/ddpm-cifar10-32
        assert next(m.p for m in unet_cifar10((3, 32, 32)).modules() if isinstance(m, nn.Dropout)) == 0.1


def test_the_cifar10_net_of_ddpm_attends_at_16_and_in_the_middle_by_one_head_and_adds_the_time() -> None:
    sides: list[int] = []
    with torch.device("meta"):
        net = unet_cifar10((3, 32, 32))
        for module in net.modules():
            if isinstance(module, blocks.SelfAttention):
                assert module.head_width == 256
                module.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[-1]))
        net(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert sides == [16, 16, 4, 16, 16, 16]
    assert not any(m.scale_shift for m in net.modules() if isinstance(m, blocks.ResBlock))


def told_sizes() -> list[tuple[str, tuple[int, ...], dict[str, int], int]]:
    """(net, shape, knobs, parameters) of the tables in the guide and on the page of the U-Net."""
    row = r"^\| `(\w+)` \| ([\d×]+) \| ([^|]*)\| ([\d,]+) \|"
    page = (DOCS / "nets/unet.md").read_text(encoding="utf-8")
    return [
        (name, tuple(map(int, shape.split("×"))), _knobs(given), int(size.replace(",", "")))
        for name, shape, given, size in re.findall(row, GUIDE + page, flags=re.MULTILINE)
    ]


def _knobs(given: str) -> dict[str, int]:
    return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", given)}


@pytest.mark.long
def test_the_pages_tell_the_size_of_every_net() -> None:
    rows = told_sizes()
    assert {row[0] for row in rows} == {name for name in HOUSE if name.split("_")[0] in ("mlp", "unet")}
    with torch.device("meta"):
        for name, shape, given, size in rows:
            assert (name, given, count(HOUSE[name](shape, **given))) == (name, given, size)
