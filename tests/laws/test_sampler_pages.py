"""The pages of docs/samplers say what the code says: every sampler, its order, and what starts without signal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from inkdrop.core.oracle import Gaussian
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, find, names, order_of
from inkdrop.plan import Plan, noise_of

GAUSSIAN = Gaussian(torch.tensor([0.3, -0.5]), 0.4)
PAGES = Path(__file__).parents[2] / "docs" / "samplers"
INDEX = (PAGES / "index.md").read_text(encoding="utf-8").partition("## All samplers")[2].partition("## Spacings")[0]
ROWS = {cells[0].strip("` "): cells[1:] for line in INDEX.splitlines() if len(cells := line.split("|")[1:]) > 5}
ROWS = {name: [cell.strip() for cell in cells] for name, cells in ROWS.items() if name in names("samplers")}


def test_every_sampler_is_in_the_table_and_on_a_page() -> None:
    assert sorted(ROWS) == names("samplers")
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md") if page.name != "index.md")
    assert [name for name in [*names("samplers"), *names("combinators")] if f"`{name}`" not in pages] == []


@pytest.mark.parametrize("name", names("samplers"))
def test_the_table_s_order_is_the_code_s(name: str) -> None:
    """A number is that of order_of; where a knob decides, the knob is named."""
    said, order = ROWS[name][1], order_of(Part(name))
    if order is None:
        assert said in ("none", "by tolerance")
    elif (knob := re.match(r"`(\w+)`", said)) is not None:
        assert knob[1] in {"order", "predictor_order"}
        assert order_of(Part(name, {knob[1]: 2})) == (3 if "+ 1" in said else 2)
    else:
        assert int(said[0]) == order


@pytest.mark.parametrize("name", names("samplers"))
def test_the_table_says_who_draws_noise_and_who_starts_without_signal(name: str) -> None:
    schedule = build("schedules", Part("flow"))
    grid = build("grids", Part("uniform"), schedule, 5)
    drawn = []

    def noise(x: torch.Tensor, *levels: object) -> torch.Tensor:
        drawn.append(1)
        return keyed(x, *levels)

    plan = Plan(sampler=Part(name))
    x = torch.ones(2, 2, dtype=torch.float64)
    for starts, part in ((True, grid), (False, grid[1:])):
        keyed = noise_of(plan, 0, range(2))
        try:
            drive(find("samplers", name)(x, part, noise), GAUSSIAN)
        except BadArgument:
            assert starts
            assert ROWS[name][3] == "no"
        else:
            assert not starts or ROWS[name][3].startswith("yes")
    assert bool(drawn) == (ROWS[name][2] not in ("no", "by `eta`"))
