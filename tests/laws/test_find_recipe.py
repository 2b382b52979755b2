"""Config is a call: names found in folders, knobs read from signatures, recipes written and read, plans carried out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inkdrop.core.cond import Cond
from inkdrop.core.noise import Keyed, normal
from inkdrop.denoiser import Denoiser
from inkdrop.drive import drive
from inkdrop.errors import BadArgument, BadData, BadShape, Cancelled, InkdropError, UnknownName
from inkdrop.find import ROOMS, Part, build, check_knobs, find, knobs, listing, names, parse
from inkdrop.generate import sample, steps
from inkdrop.model import Plain
from inkdrop.plan import Plan, change, grid_of, sampling
from inkdrop.recipe import Recipe, dump, read, set_knobs
from inkdrop.settings import Train
from specimens import schedule_of, target_of

FINDABLES = [(room, name) for room in ROOMS for name in names(room)]
RECIPE = Recipe(data=Part("digits"), net=Part("mlp"))


# ---- find: the folder is the registry ------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "name"), FINDABLES)
def test_everything_findable_keeps_the_form_of_its_room(room: str, name: str) -> None:
    """Positional arguments of the room, knobs with plain annotations, a first line that says what it is."""
    function = find(room, name)
    assert function.__name__ == name
    assert function.__module__ == listing(room)[name].module
    assert len(listing(room)[name].summary) > 10
    for knob, param in knobs(function).items():
        assert is_plain(param.annotation), f"{room} {name}.{knob}: {param.annotation} does not fit JSON and --set"
        if param.default is not param.empty:
            assert check_knobs(name, function, {**needed(function), knob: param.default})[knob] == param.default


def needed(function: Callable[..., Any]) -> dict[str, Any]:
    """Something for each knob that has no default."""
    some: dict[Any, Any] = {Path: "x", str: "x", int: 1, float: 0.5}
    return {n: some.get(p.annotation, (0.5,)) for n, p in knobs(function).items() if p.default is p.empty}


def is_plain(annotation: Any) -> bool:
    """int, float, str, bool, Path, None, Literal, dict of strings, and tuples and unions of those."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return all(isinstance(a, (str, int)) for a in args)
    if origin in (tuple, typing.Union, types.UnionType):
        return all(a is Ellipsis or is_plain(a) for a in args)
    if origin is dict:
        return args[0] is str
    return annotation in (int, float, str, bool, Path, type(None))


@pytest.mark.parametrize("room", ROOMS)
def test_names_are_sorted_and_each_once(room: str) -> None:
    assert names(room) == sorted(set(names(room)))


def test_helpers_and_re_exports_are_not_found() -> None:
    """mean_coefficients, relay and others have other positional arguments; a private function is never found."""
    assert names("schedules") == [
        *(
            "continuous_cosine",
            "cosine",
            "edm",
            "flow",
            "linear",
            "quadratic",
            "scaled_linear",
            "sigmoid",
            "table",
            "vp",
        )
    ]
    assert not [name for room in ROOMS for name in names(room) if name.startswith("_")]


def test_listing_imports_nothing() -> None:
    """Names, summaries and modules come from the source alone, so help starts without torch."""
    code = (
        "import sys\nfrom inkdrop.find import ROOMS, listing\nfor room in ROOMS: listing(room)\n"
        "heavy = {'torch', 'numpy', 'pydantic'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_new_file_is_found_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samplers").mkdir()
    (tmp_path / "samplers" / "mine.py").write_text(
        '"""Mine."""\ndef leap(x, grid, noise, *, far: float = 2.0):\n    """One long step."""\n'
        "def helper(x, grid):\n    pass\ndef _private(x, grid, noise):\n    pass\n"
    )
    monkeypatch.setattr("inkdrop.find.HOUSE", tmp_path)
    found = listing.__wrapped__("samplers")
    assert {n: (e.module, e.summary) for n, e in found.items()} == {"leap": ("inkdrop.samplers.mine", "One long step.")}


def test_a_function_from_outside_the_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.py").write_text("number = 3\ndef scaled(level, *, by: float = 1.0):\n    return by * level\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert build("scales", Part("outside:scaled", {"by": "2.5"}), 2.0) == 5.0
    for bad, kind, message in (
        ("outside:scald", UnknownName, "scales 'outside:scald' .*has no attribute 'scald'"),
        ("outsid:scaled", UnknownName, "scales 'outsid:scaled' .*No module named 'outsid'"),
        ("outside:number", BadArgument, "scales 'outside:number': is not a function"),
        (":scaled", BadArgument, "scales: got ':scaled'"),
        ("outside:", BadArgument, "scales: got 'outside:'"),
        (".outside:scaled", BadArgument, "scales: got '.outside:scaled'"),
    ):
        with pytest.raises(kind, match=message):
            find("scales", bad)


def test_knobs_are_converted_to_their_annotations() -> None:
    assert check_knobs("ddim", find("samplers", "ddim"), {"eta": "0.5"}) == {"eta": 0.5}
    assert check_knobs("cosine", find("schedules", "cosine"), {"steps": 50.0, "zero_terminal": "true"}) == {
        "steps": 50,
        "zero_terminal": True,
    }
    assert check_knobs("table", find("schedules", "table"), {"betas": [0.1, "0.2"]}) == {"betas": (0.1, 0.2)}


def test_build_gives_a_part_what_it_takes() -> None:
    """A target that needs no schedule is given none; what the house knows goes only where there is such a knob."""
    schedule = schedule_of("linear")
    assert build("targets", Part("eps"), schedule).name == "eps"
    assert build("targets", Part("mu"), schedule).name == "mu"
    assert build("schedules", Part("linear"), steps=7, colour="red").steps == 7
    assert build("schedules", Part("linear", {"steps": 9}), steps=7).steps == 9  # what was asked for wins


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("1,2,2", [1, 2, 2]),
        ("cosine", "cosine"),
        ('"3"', "3"),
        ("", ""),
    ],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


# ---- recipes -------------------------------------------------------------------------------------------------


def test_a_recipe_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """Through JSON text; every field that is not at its default too, and guidance in its order."""
    recipe = Recipe(
        data=Part("folder", {"path": "/tmp/x"}),
        net=Part("mlp", {"width": 32}),
        schedule=Part("linear", {"zero_terminal": True}),
        loss=Part("simple", {"weight": "min_snr", "weight_knobs": {"gamma": 3.0}}),
        train=Train(steps=5, betas=(0.8, 0.9), lr=3e-4, decay="constant"),
        plan=Plan(sampler=Part("ddim", {"eta": 0.5}), steps=7, guide=(Part("clip", {"high": 2.0}), Part("cfg"))),
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(dump(recipe)))
    assert read(path) == recipe
    assert read(dump(recipe)) == recipe
    assert dump(read(path)) == dump(recipe)
    assert read({"data": {"name": "digits"}, "net": {"name": "mlp"}}) == RECIPE
    with_path = Recipe(data=Part("folder", {"path": tmp_path}), net=Part("mlp", {"hidden": (1, 2)}))
    assert dump(read(dump(with_path))) == dump(with_path)


def test_set_changes_what_it_names_and_nothing_else() -> None:
    base = Recipe(data=Part("digits"), net=Part("mlp"), plan=change(Plan(), guidance=2.0))
    changed = set_knobs(
        base,
        ["sampler.eta=0.5", "schedule=linear", "schedule.last = 0.03", "train.lr=1e-4", "plan.steps=9", "cfg.scale=4"],
    )
    want = dump(base)
    want["plan"]["sampler"]["knobs"] = {"eta": 0.5}
    want["schedule"] = {"name": "linear", "knobs": {"last": 0.03}}
    want["train"]["lr"] = 1e-4
    want["plan"]["steps"] = 9
    want["plan"]["guide"][1]["knobs"] = {"scale": 4}
    assert dump(changed) == want
    dropped = set_knobs(changed, ["sampler=heun"])
    assert dropped.plan.sampler == Part("heun")  # another part does not keep the old one's knobs
    assert set_knobs(base, []) == base
    lists = set_knobs(base, ["data=folder", "data.data=here", "data.attributes=hue", "net=unet", "net.cross=1"])
    assert lists.data == Part("folder", {"data": "here", "attributes": ["hue"]})  # a list of one needs no brackets
    assert lists.net == Part("unet", {"cross": [1]})
    with pytest.raises(BadArgument, match="mlp.width: got 'wide', need int"):
        set_knobs(base, ["net.width=wide"])


# ---- plans ---------------------------------------------------------------------------------------------------


class Shrink(nn.Module):
    """A net of x, time and class with a parameter; dropout tells whether it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        shift = 0 if cond is None else 0.1 * cond.label.to(x.dtype).reshape(-1, 1, 1)
        return self.drop(torch.tanh(self.gain * x) + shift)


def pictures(guidable: bool = True) -> Plain:
    """A model as a Bundle is one: knows its shape, classes and plan."""
    schedule = schedule_of("cosine")
    denoiser = Denoiser(Shrink(), schedule, target_of("v", schedule))
    return Plain(denoiser, (2, 3), ("ant", "bee", "cat"), Plan(sampler=Part("ddpm"), steps=4), guidable)


def test_an_image_is_the_same_at_any_count_batch_and_first() -> None:
    """R4: image i of a seed, alone, in batches of 8, all 20 at once, and from its own index on; its class too."""
    model = pictures()
    whole = sample(model, 20, seed=3)
    torch.testing.assert_close(sample(model, 20, seed=3, batch=8), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample(model, 20, seed=3, batch=1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample(model, 4, seed=3, first=7), whole[7:11], rtol=0, atol=1e-6)
    assert not torch.equal(sample(model, 4, seed=4), whole[:4])
    assert whole.dtype == torch.float32


def test_sample_is_the_plan_carried_out() -> None:
    """Start noise, grid, sampler, condition and clipping put together by hand give the same numbers."""
    model = pictures()
    plan = change(model.plan, sampler=Part("ddim", {"eta": 0.5}), grid="leading", steps=5, guidance=2.0)
    noise, cond = Keyed(1, range(3)), Cond(label=torch.tensor([0, 1, 2]))
    x = normal((3, 2, 3), 1, range(3), 0).float()
    grid = build("grids", Part("leading"), model.denoiser.schedule, 5)
    model.denoiser.eval()
    by_hand = drive(sampling(plan, x, grid, noise, cond), model.denoiser)
    got = sample(model, 3, seed=1, sampler=Part("ddim", {"eta": 0.5}), grid="leading", steps=5, guidance=2.0)
    assert torch.equal(got, by_hand)
    assert float(got.abs().max()) <= 1
    assert float(sample(model, 3, seed=1, clip=False).abs().max()) > 1
    assert [float(level.t) for level in grid_of(plan, model.denoiser.schedule)] == [float(level.t) for level in grid]


def test_steps_shows_what_sample_gives() -> None:
    model = pictures()
    seen = list(steps(model, 3, seed=2, label="bee"))
    assert [float(step.level.t) for step in seen] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(seen[-1].x0, sample(model, 3, seed=2, label=["bee", 1, "1"]))


def test_the_net_is_put_back_to_training_whatever_happens() -> None:
    model = pictures()
    model.denoiser.train()
    sample(model, 2)
    assert model.denoiser.training
    with pytest.raises(Cancelled):
        sample(model, 2, on_step=lambda done, step: True)
    assert model.denoiser.training
    for _ in steps(model, 2):
        assert not model.denoiser.training
        break
    assert model.denoiser.training
    with pytest.raises(InkdropError):
        steps(model, 2, steps=5000)
    assert model.denoiser.training
    model.denoiser.eval()
    sample(model, 2)
    assert not model.denoiser.training


# ---- a table of bad input ------------------------------------------------------------------------------------

DDIM, COSINE = find("samplers", "ddim"), find("schedules", "cosine")
PLAIN = {"data": {"name": "digits"}, "net": {"name": "mlp"}}
GRID: dict[str, Any] = {"name": "trailing"}


def bare() -> Denoiser:
    return pictures().denoiser


BAD: list[tuple[str, type[InkdropError], Callable[[], object], str]] = [
    ("room", UnknownName, lambda: names("sampler"), "room: unknown name 'sampler'; did you mean samplers"),
    ("sampler", UnknownName, lambda: find("samplers", "dimm"), "samplers: unknown name 'dimm'; did you mean ddim"),
    ("far", UnknownName, lambda: find("guide", "zzz"), "guide: unknown name 'zzz'; known: "),
    (
        "knob",
        UnknownName,
        lambda: check_knobs("ddim", DDIM, {"etta": 1}),
        "ddim knob: unknown name 'etta'; did you mean eta",
    ),
    ("no knobs", UnknownName, lambda: build("targets", Part("v", {"a": 1})), "v knob: unknown name 'a'; known: none"),
    ("type", BadArgument, lambda: check_knobs("ddim", DDIM, {"eta": "much"}), "ddim.eta: got 'much', need float"),
    ("fraction", BadArgument, lambda: check_knobs("cosine", COSINE, {"steps": 2.5}), "cosine.steps: got 2.5, need int"),
    (
        "literal",
        BadArgument,
        lambda: check_knobs("ddpm", find("samplers", "ddpm"), {"variance": "gamma"}),
        "ddpm.variance: got 'gamma', need beta or beta-tilde or learned",
    ),
    ("missing", BadArgument, lambda: build("schedules", Part("table")), "table: needs a value for 'betas'"),
    (
        "set form",
        BadArgument,
        lambda: set_knobs(RECIPE, ["sampler.eta"]),
        "--set: got 'sampler.eta', need slot.knob=value",
    ),
    ("set nothing", BadArgument, lambda: set_knobs(RECIPE, ["=3"]), "--set: got '=3', need slot.knob=value"),
    (
        "set slot",
        UnknownName,
        lambda: set_knobs(RECIPE, ["smpler=ddim"]),
        "--set slot: unknown name 'smpler'; did you mean",
    ),
    ("set knob", UnknownName, lambda: set_knobs(RECIPE, ["sampler.ate=1"]), "ddim knob: unknown name 'ate'"),
    (
        "set part",
        UnknownName,
        lambda: set_knobs(RECIPE, ["grid=karas"]),
        "grids: unknown name 'karas'; did you mean karras",
    ),
    ("set type", BadArgument, lambda: set_knobs(RECIPE, ["sampler.eta=x"]), "ddim.eta: got 'x', need float"),
    (
        "set train",
        UnknownName,
        lambda: set_knobs(RECIPE, ["train.bach=3"]),
        "train knob: unknown name 'bach'; did you mean batch",
    ),
    (
        "set plan",
        UnknownName,
        lambda: set_knobs(RECIPE, ["plan.sampler=1"]),
        "plan knob: unknown name 'sampler'; known: guide, noise, steps",
    ),
    ("train type", BadArgument, lambda: set_knobs(RECIPE, ["train.steps=many"]), "train.steps: got 'many'"),
    (
        "train range",
        BadArgument,
        lambda: set_knobs(RECIPE, ["train.ema=1.0"]),
        "train.ema: got 1.0, need a number in [0, 1)",
    ),
    ("train seed", BadArgument, lambda: Train(seed=-1), "train.seed: got -1, need an integer in [0, 2^63)"),
    ("train lr", BadArgument, lambda: Train(lr=0.0), "train.lr: got 0.0, need more than 0"),
    ("train decay", BadArgument, lambda: Train(decay="step"), "train.decay: got step, need cosine or constant"),
    ("plan steps", BadArgument, lambda: set_knobs(RECIPE, ["plan.steps=0"]), "sampler steps: got 0, need at least 1"),
    ("absent cfg", UnknownName, lambda: set_knobs(RECIPE, ["cfg.scale=2"]), "--set slot: unknown name 'cfg'"),
    ("field", UnknownName, lambda: read({**PLAIN, "nett": {}}), "recipe field: unknown name 'nett'; did you mean net"),
    (
        "deep field",
        UnknownName,
        lambda: read({**PLAIN, "plan": {"grid": {**GRID, "knob": {}}}}),
        "recipe.plan.grid field",
    ),
    ("guide field", UnknownName, lambda: read({**PLAIN, "plan": {"guide": [{"nme": "clip"}]}}), "recipe.plan.guide"),
    ("absent field", BadArgument, lambda: read({"net": {"name": "mlp"}}), "recipe.data: is missing"),
    ("field type", BadArgument, lambda: read({**PLAIN, "train": {"lr": "fast"}}), "recipe.train.lr: got 'fast'"),
    ("not an object", BadArgument, lambda: read({**PLAIN, "train": 3}), "recipe.train: got int, need a JSON object"),
    (
        "no file",
        BadData,
        lambda: read(Path("/nowhere/recipe.json")),
        "recipe /nowhere/recipe.json: cannot be read as JSON",
    ),
    ("count", BadArgument, lambda: sample(pictures(), 0), "sample count: got 0, need at least 1"),
    ("batch", BadArgument, lambda: sample(pictures(), 2, batch=0), "sample batch: got 0, need at least 1"),
    ("seed", BadArgument, lambda: sample(pictures(), 1, seed=-1), "seed: got -1, need an integer in [0, 2^64)"),
    (
        "option",
        UnknownName,
        lambda: sample(pictures(), 1, step=3),
        "sample option: unknown name 'step'; did you mean steps",
    ),
    ("steps", BadArgument, lambda: sample(pictures(), 1, steps=1001), "sampler steps: got 1001, need at most 1000"),
    (
        "class",
        BadArgument,
        lambda: sample(pictures(), 1, label=3),
        "class: got 3, need a number in [0, 2], or a name: ant, bee",
    ),
    (
        "class name",
        UnknownName,
        lambda: sample(pictures(), 1, label="be"),
        "class: unknown name 'be'; did you mean bee",
    ),
    ("superscript", UnknownName, lambda: sample(pictures(), 1, label="²"), "class: unknown name '²'"),
    ("labels", BadShape, lambda: sample(pictures(), 3, label=[1, 2]), "class: got 2 labels for 3 images"),
    (
        "no classes",
        BadArgument,
        lambda: sample(bare(), 1, label=1, shape=(2, 3)),
        "a bare denoiser knows no classes or words",
    ),
    ("no shape", BadArgument, lambda: sample(bare(), 1), "a bare denoiser does not know its data; give shape="),
    (
        "cond rows",
        BadShape,
        lambda: sample(pictures(), 1, cond=Cond(vec=torch.zeros(2, 1))),
        "cond: got 2 rows for 1 images",
    ),
    (
        "label and cond",
        BadArgument,
        lambda: sample(pictures(), 1, label=1, cond=Cond(label=torch.tensor([1]))),
        "sample: got cond beside label",
    ),
    ("not guidable", BadArgument, lambda: sample(pictures(False), 1, guidance=2), "trained without dropped conditions"),
    ("guidance", BadArgument, lambda: sample(pictures(), 1, guidance=-1), "cfg scale: got -1"),
    (
        "no cond",
        BadArgument,
        lambda: sample(bare(), 1, shape=(2, 3), guidance=2),
        "cfg: there is no condition to guide by",
    ),
    (
        "betas",
        BadArgument,
        lambda: build("schedules", Part("table", {"betas": (0.1, 1.2)})),
        "betas[1]: got 1.2, need a number",
    ),
    ("inner 1", BadArgument, lambda: build("schedules", Part("table", {"betas": (1.0, 0.5)})), "betas[0]: got 1"),
    (
        "ends",
        BadArgument,
        lambda: build("schedules", Part("linear", {"last": 2.0})),
        "betas: got first=0.0001, last=2, need 0 <",
    ),
    (
        "rescaled ends",
        BadArgument,
        lambda: build("schedules", Part("linear", {"steps": 10, "rescale": True})),
        "last=0.02 (times 100), need 0 < first <= last < 1",
    ),
    (
        "one step",
        BadArgument,
        lambda: build("schedules", Part("table", {"betas": (0.5,), "zero_terminal": True})),
        "at least 2",
    ),
    (
        "clip",
        BadArgument,
        lambda: build("schedules", Part("cosine", {"clip": 1.0})),
        "cosine clip: got 1, need a number in",
    ),
    (
        "offset",
        BadArgument,
        lambda: build("schedules", Part("cosine", {"offset": -1})),
        "cosine offset: got -1, need at least 0",
    ),
    (
        "vp",
        BadArgument,
        lambda: build("schedules", Part("vp", {"beta_max": "inf"})),
        "vp betas: got 0.1, inf, need 0 < beta_min",
    ),
    ("edm", BadArgument, lambda: build("schedules", Part("edm", {"rho_max": 0.001})), "edm: got rho 0.002..0.001"),
    (
        "edm power",
        BadArgument,
        lambda: build("schedules", Part("edm", {"power": 0})),
        "power 0; need 0 < rho_min < rho_max",
    ),
    (
        "shift",
        BadArgument,
        lambda: build("schedules", Part("flow", {"shift": "inf"})),
        "flow shift: got inf, need a positive",
    ),
    (
        "shift nan",
        BadArgument,
        lambda: build("schedules", Part("flow", {"shift": "nan"})),
        "flow shift: got nan, need a positive",
    ),
    (
        "lam_end",
        BadArgument,
        lambda: build("schedules", Part("continuous_cosine", {"lam_end": 1})),
        "lam_end: got 1, need a neg",
    ),
    (
        "sd",
        BadArgument,
        lambda: build("targets", Part("edm", {"sd": 0})),
        "edm sd: got 0, need a positive number; try 0.5",
    ),
    (
        "lost signal",
        BadArgument,
        lambda: build("schedules", Part("table", {"betas": (0.99,) * 200})),
        "betas: no signal is left in float64 after",
    ),
    (
        "power",
        BadArgument,
        lambda: build("grids", Part("karras", {"power": -7}), schedule_of("vp"), 3),
        "karras power: got -7, need a positive number; try 7",
    ),
    (
        "leading offset",
        BadArgument,
        lambda: build("grids", Part("leading", {"offset": 30}), schedule_of("linear"), 50),
        "leading offset: got 30, need 0 to 19; try 0",
    ),
]


@pytest.mark.parametrize(("kind", "call", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_refused_in_one_line(kind: type[InkdropError], call: Callable[[], object], message: str) -> None:
    """R9: the class of error, the words of its message, and never a second line."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert type(caught.value) is kind


def test_the_table_of_bad_input_is_long_enough() -> None:
    assert len(BAD) >= 30
    assert len({message for *_, message in BAD}) == len(BAD)
