"""Parity of hub/schedule, hub/plan and hub/solver with diffusers 0.42.1: every scheduler class, from its own config.

What is compared: alphas_cumprod with our table, their timesteps and sigmas with our grid and clock, and whole
trajectories with the sampler that we read, on a mixture whose answers are known.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from theirs import NET, noises_of, ours, quiet, same, scheduler_of, start_of, theirs
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule, Table
from inkdrop.errors import BadCheckpoint
from inkdrop.find import Part, build, check_knobs, find
from inkdrop.hub.config import Config
from inkdrop.hub.plan import Reading, read_scheduler
from inkdrop.hub.schedule import EDM, FLOW, MULTISTEP, PLAIN, TABLES, schedule_of
from inkdrop.plan import Plan, grid_of

pytestmark = pytest.mark.long  # left out of the fast tier

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE = {"set_alpha_to_one": False, "steps_offset": 1, **LATENT}  # Stable Diffusion's
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
FEW = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}  # with T = 1000 these take seconds to make

SPACED: list[dict[str, Any]] = [
    {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    {"timestep_spacing": "linspace", **LATENT},
]
SIGMAS: list[dict[str, Any]] = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True, **LATENT}]

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("DDPMScheduler", config) for config in [{}, *SPACED, ZERO, {"beta_schedule": "sigmoid"}]),
    *(("DDIMScheduler", config) for config in [{}, *SPACED[:2], ZERO, STABLE, {"num_train_timesteps": 50}]),
    *(("PNDMScheduler", {"skip_prk_steps": True, **config}) for config in [{}, SPACED[1], STABLE]),
    *(("DPMSolverMultistepScheduler", config) for config in [{}, *SPACED, SIGMAS[0], {"use_lu_lambdas": True}]),
    ("DPMSolverMultistepScheduler", {**ZERO, **LATENT}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    *(("UniPCMultistepScheduler", config) for config in [{}, *SPACED, SIGMAS[0], {**ZERO, **LATENT}]),
    *(("DEISMultistepScheduler", config) for config in [{}, *SPACED]),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    *(("EulerDiscreteScheduler", config) for config in [{}, *SPACED, *SIGMAS, {**ZERO, **LATENT}]),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    *(("EulerAncestralDiscreteScheduler", config) for config in [{}, *SPACED]),
    *(("HeunDiscreteScheduler", config) for config in [{}, *SPACED, *SIGMAS]),
    *(("LMSDiscreteScheduler", config) for config in [{}, *SPACED, *SIGMAS]),
    *(("KDPM2DiscreteScheduler", {**config, **FEW}) for config in [{}, SPACED[0], SIGMAS[1]]),
    *(("KDPM2AncestralDiscreteScheduler", {**config, **FEW}) for config in [{}, SPACED[1]]),
    *(("DPMSolverSDEScheduler", {**config, **FEW}) for config in [{}, SPACED[0]]),
    *(("FlowMatchEulerDiscreteScheduler", config) for config in [{}, {"shift": 3.0}]),
    *(("FlowMatchHeunDiscreteScheduler", config) for config in [{}]),
    *(("EDMEulerScheduler", config) for config in [{}, {"sigma_schedule": "exponential", "sigma_max": 200.0}]),
    ("EDMDPMSolverMultistepScheduler", {"rho": 5.0}),
]


def told(value: object) -> str:
    if isinstance(value, str):
        return value.removesuffix("Scheduler")
    return ",".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else str(value)


def class_of(name: str) -> Any:
    """Their class; one of them imports torchsde, which is not needed for its timesteps."""
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


def read(name: str, config: dict[str, Any]) -> tuple[Any, Reading]:
    """Their scheduler of a config, and ours, read from the JSON that theirs saves."""
    with quiet():
        scheduler = class_of(name)(**config)
    return scheduler, read_scheduler(json.loads(scheduler.to_json_string()))


def set_steps(scheduler: Any, steps: int) -> Any:
    with quiet():
        scheduler.set_timesteps(steps)
    return scheduler


def clocks_of(reading: Reading, levels: list[Level], schedule: Schedule) -> Tensor:
    """What the net is told at these levels."""
    part, function = reading.noising.clock, find("clocks", reading.noising.clock.name)
    own = {"steps": schedule.steps} if part.name == "table" else {}
    knobs = check_knobs(part.name, function, {**own, **part.knobs})
    return torch.stack([function(level, **knobs) for level in levels])


# ---- tables, timesteps, sigmas -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[0] in TABLES], ids=told)
def test_alphas_are_theirs_to_the_rounding_of_float32(name: str, config: dict[str, Any]) -> None:
    """Theirs are a product of float32 numbers: alpha² to 3e-6 of itself (4e-5 where a last beta is
    near 1), and so sigma² to 1e-6, of the 1e-4 that it is at the first entries."""
    scheduler, reading = read(name, config)
    schedule = schedule_of(reading.noising.schedule)
    theirs = scheduler.alphas_cumprod.double()
    assert schedule.steps == len(theirs)
    level = schedule(torch.arange(1, len(theirs) + 1, dtype=torch.float64) / len(theirs))
    torch.testing.assert_close(level.alpha**2, theirs, rtol=5e-5, atol=0)
    torch.testing.assert_close(level.sigma**2, 1 - theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "config"), CASES, ids=told)
def test_the_net_is_asked_at_their_timesteps_and_their_sigmas(name: str, config: dict[str, Any]) -> None:
    """In 1, 7, 10 and 50 steps. One at linspace is their timestep 0, which is no sample; ours is the noisiest.

    Between the entries of a table they interpolate sigma, and we log-SNR: 3e-4 apart with T = 1000. A rounded timestep
    that is half-way between two may be either.
    """
    scheduler, reading = read(name, config)
    schedule = schedule_of(reading.noising.schedule)
    for steps in (1, 7, 10, 50):
        if steps <= schedule.steps - (name in MULTISTEP):
            set_steps(scheduler, steps)
            compare(name, config, scheduler, reading, grid_of(replace(reading.plan, steps=steps), schedule))


def compare(name: str, config: dict[str, Any], scheduler: Any, reading: Reading, grid: Grid) -> None:
    """Their timesteps and sigmas, which are set, with what the net is told on a grid of ours, and its levels."""
    schedule, asked = grid.schedule, scheduler.timesteps.double()
    if len(asked) == 1 and begins_at_its_end(name, scheduler.config):
        assert float(asked[0]) < 1
        return
    if name.startswith(("Heun", "FlowMatchHeun", "PNDM")):
        asked = torch.unique_consecutive(asked)  # their second asks, about the same levels
    elif name.startswith(("KDPM2", "DPMSolverSDE")) and len(asked) > 1:
        asked = torch.cat([asked[:1], asked[2::2]])  # without their midpoints
    noisy = list(grid[: len(asked)])
    told = clocks_of(reading, noisy, schedule)
    tie = (torch.stack([level.t for level in noisy]) * schedule.steps % 1 - 0.5).abs() < 0.02
    off = (told - asked).abs()
    assert float(off.where(~tie, off.clamp(min=1) - 1).max()) < (shift_of(config) or 0.02)
    if name in PLAIN:
        return
    sigmas = torch.unique_consecutive(scheduler.sigmas.double())
    found = torch.stack([level.sigma if name in FLOW else level.rho for level in grid])
    if shift_of(config):
        assert bool((found[1:-1] < sigmas[1:-1]).all())  # the exception of tests/parity/test_parity_basic.py
        return
    torch.testing.assert_close(found, sigmas, rtol=3e-4 if schedule.steps == 1000 else 2e-3, atol=0)


def begins_at_its_end(name: str, config: Any) -> bool:
    """Whether one step is from the least noisy level to clean: n numbers from the least to the greatest, n = 1."""
    spacing = config.get("timestep_spacing") == "linspace" and name not in MULTISTEP
    return spacing or config.get("sigma_schedule") == "exponential"


def shift_of(config: dict[str, Any]) -> float:
    """By how much their twice shifted levels differ, in timesteps."""
    return 6.0 if config.get("shift", 1.0) != 1 else 0.0


def test_stable_diffusions_own_config() -> None:
    """The scheduler_config.json of Stable Diffusion 1.5, with a key of another class in it."""
    record = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    reading = read_scheduler(record)
    grid = Part("leading", {"offset": 1, "end": "least"})
    assert reading.plan == Plan(Part("plms"), grid, 50, guide=())
    times = grid_of(reading.plan, schedule_of(reading.noising.schedule)).times
    torch.testing.assert_close(times * 1000 - 1, torch.tensor([*range(981, 0, -20), 0.0], dtype=torch.float64))


# ---- trajectories --------------------------------------------------------------------------------------------

RUNS: list[tuple[str, dict[str, Any], int]] = [
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample_range": 0.5}, 10),
    ("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, 10),
    ("DDIMScheduler", {"clip_sample_range": 0.5}, 10),
    ("DDIMScheduler", {**ZERO, "clip_sample": False}, 10),
    ("DDIMScheduler", {**STABLE, "clip_sample": False}, 10),
    ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}, 10),
    ("PNDMScheduler", {"skip_prk_steps": True, **STABLE}, 10),
    ("DPMSolverMultistepScheduler", LATENT, 10),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, 10),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, **ZERO, **LATENT}, 10),
    ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2", "timestep_spacing": "trailing"}, 10),
    ("DEISMultistepScheduler", {"solver_order": 3}, 15),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}, 10),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1, **LATENT}, 10),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 10),
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.5}, 10),
    ("FlowMatchEulerDiscreteScheduler", {}, 10),
    ("EDMEulerScheduler", {}, 10),
    ("EDMDPMSolverMultistepScheduler", {"sigma_data": 1.0}, 10),
]


@pytest.mark.parametrize(("name", "config", "steps"), RUNS, ids=told)
def test_what_we_read_samples_what_they_sample(name: str, config: dict[str, Any], steps: int) -> None:
    """From one start and with one noise, to 2e-4: their alphas' float32 shows, and at Euler's ancestral step, most."""
    reading = read(name, config)[1]
    schedule = schedule_of(reading.noising.schedule)
    grid = grid_of(replace(reading.plan, steps=steps), schedule)
    scheduler = scheduler_of(name, steps, **config)
    x = start_of(grid)
    levels: list[Level] = list(grid[: len(scheduler.timesteps)])
    if "Heun" in name:
        levels = [grid[0], *(level for level in grid[1:-1] for _ in range(2))]
    if name == "PNDMScheduler":
        levels = [schedule(t) for t in (scheduler.timesteps.double() + 1) / schedule.steps]
    noises, more = noises_of(x, 3 * steps), {}
    if name == "DDIMScheduler":
        more = {"use_clipped_model_output": True}
    got = ours(reading.plan.sampler, x, grid, NET, noises, guided(reading.plan))
    same(got, without_idle_step(theirs(scheduler, x, levels, NET, noises, **more), len(got.asked)), 2e-4)


def without_idle_step(run: Any, asks: int) -> Any:
    """Theirs ask about the table's first entry and then step to it, from itself; ours do not ask."""
    return run._replace(asked=run.asked[:asks])


def guided(plan: Plan) -> Callable[[Sampling], Sampling]:
    def around(sampling: Sampling) -> Sampling:
        for part in plan.guide:
            sampling = build("guide", part, sampling)
        return sampling

    return around


@pytest.mark.parametrize("most", [1.0, 1.5])
def test_thresholding_is_theirs_up_to_its_greatest_value(most: float) -> None:
    """x0 of sizes 0.5, 1.4 and 4: below 1 it stays, then s is the percentile, and at most 1.5; at most 1 it is clip."""
    x0 = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([0.5, 1.4, 4.0], dtype=torch.float64)[:, None, None, None]
    x0 = x0 / x0.abs().amax((1, 2, 3), keepdim=True) * sizes
    config = {"thresholding": True, "sample_max_value": most, "dynamic_thresholding_ratio": 0.9}
    scheduler, reading = read("DDPMScheduler", config)
    grid = grid_of(replace(reading.plan, steps=2), schedule_of(reading.noising.schedule))

    def asking() -> Sampling:
        belief = yield Ask(x0, grid[0])
        return belief.x0

    work = guided(reading.plan)(asking())
    next(work)
    with pytest.raises(StopIteration) as end:
        work.send(Belief(x0, torch.zeros_like(x0)))
    torch.testing.assert_close(end.value.value, scheduler._threshold_sample(x0), rtol=1e-12, atol=0)


# ---- every key is understood or refused ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TABLES, *FLOW, *EDM], ids=told)
def test_every_parameter_of_their_class_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of other classes are passed over by theirs as by ours, but none of its own is."""
    asked: set[str] = set()
    skip = Config.skip

    def note(self: Config, *keys: str) -> None:
        if len(keys) > 40:  # the keys of all classes, after which nothing is asked
            asked.update(self._asked)
        skip(self, *keys)

    monkeypatch.setattr(Config, "skip", note)
    read(name, LEAST.get(name, {}))
    own = set(inspect.signature(class_of(name).__init__).parameters) - {"self", "kwargs"}
    assert own - asked == UNUSED.get(name, set())


@pytest.mark.parametrize("name", [*TABLES, *FLOW, *EDM], ids=told)
def test_a_key_that_is_absent_has_the_default_of_their_class(name: str) -> None:
    """Old configs say little: theirs is filled in by the class when it is saved again."""
    assert read_scheduler({"_class_name": name, **LEAST.get(name, {})}) == read(name, LEAST.get(name, {}))[1]


LEAST = {"PNDMScheduler": {"skip_prk_steps": True}, "DPMSolverSinglestepScheduler": {"solver_order": 1}}
UNUSED = {"DPMSolverSDEScheduler": {"noise_sampler_seed"}}  # of their noise

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, "timestep_spacing is 'linspace', need leading or trailing"),
    ("DDIMScheduler", {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2], need 1000 numbers"),
    ("DDIMScheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
    ("DDIMScheduler", {"num_train_timesteps": True}, "num_train_timesteps is True"),
    ("DDIMScheduler", {"beta_end": math.inf}, "beta_end is inf"),
    ("DDIMScheduler", {"clip_sample": "yes"}, "clip_sample is 'yes', need true or false"),
    ("DDIMScheduler", {"new_way": 3}, "new_way = 3 is not known here"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
    ("DDPMScheduler", {"variance_type": "learned"}, "variance_type is 'learned'"),
    ("PNDMScheduler", {}, "skip_prk_steps is nothing, need true"),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}, "prediction_type"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver'"),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type is 'heun', need midpoint"),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True}, "euler_at_final is True, need False"),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.0}, "lambda_min_clipped is -5.0"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min'"),
    ("DPMSolverMultistepScheduler", ZERO, "rescale_betas_zero_snr is True"),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "use_flow_sigmas is True, need False",
    ),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type is nothing, need flow_prediction"),
    ("DPMSolverSinglestepScheduler", {}, "solver_order is nothing, need 1"),
    ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector is [0]"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 is False"),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
    ("EulerDiscreteScheduler", {"sigma_min": 0.1}, "sigma_min is 0.1, need null"),
    (
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True, "timestep_spacing": "leading"},
        "timestep_spacing is 'leading', need linspace",
    ),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction', need 'epsilon'"),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min', need 'zero'"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 0.0}, "shift is 0.0"),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "shift_terminal is 0.1"),
    ("LCMScheduler", {}, "_class_name is 'LCMScheduler'"),
]


@pytest.mark.parametrize(("name", "config", "message"), REFUSED, ids=told)
def test_what_has_no_counterpart_is_refused_by_its_key(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        read_scheduler({"_class_name": name, **config})
    assert str(caught.value).startswith(f"{name} config: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_of_ones_own_leaves_only_the_net_to_be_read() -> None:
    """What stands in the way of their sampler does not matter then; what the net was trained with does."""
    plan = Plan(steps=5)
    record = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}
    reading = read_scheduler(record, plan=plan)
    assert reading.plan == plan
    assert reading.noising.target == Part("v")
    record = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    reading = read_scheduler({**record, "prediction_type": "flow_prediction"}, plan=plan)
    assert reading.noising.schedule == Part("flow", {"shift": 3.0})
    with pytest.raises(BadCheckpoint, match="beta_schedule"):
        read_scheduler({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, plan=plan)


def test_trained_betas_are_the_table() -> None:
    betas = torch.linspace(1e-3, 0.3, 40).tolist()
    scheduler, reading = read("DDIMScheduler", {"trained_betas": betas, "num_train_timesteps": 40})
    made = schedule_of(reading.noising.schedule)
    assert isinstance(made, Table)
    torch.testing.assert_close(made.betas, scheduler.betas.double(), rtol=1e-6, atol=0)


def test_flow_matching_tells_the_net_the_shifted_sigma() -> None:
    """sigma·T after the shift, which is not t·T."""
    scheduler, reading = read("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    schedule = schedule_of(reading.noising.schedule)
    levels = [schedule(s / (3 - 2 * s)) for s in (0.2, 0.5, 0.9)]
    torch.testing.assert_close(torch.stack([level.sigma for level in levels]), torch.tensor([0.2, 0.5, 0.9]).double())
    told = clocks_of(reading, levels, schedule)
    torch.testing.assert_close(told, torch.tensor([200.0, 500.0, 900.0]).double())
    assert float(scheduler._sigma_to_t(0.2)) == 200.0


def test_grids_that_end_at_the_least_level_do_not_repeat_it() -> None:
    """With steps_offset 0 the last timestep is the first entry already: one step less."""
    reading = read("DDIMScheduler", {"set_alpha_to_one": False})[1]
    grid = grid_of(replace(reading.plan, steps=10), schedule_of(reading.noising.schedule))
    assert isinstance(grid, Grid)
    assert [round(float(level.t) * 1000) - 1 for level in grid] == [*range(900, -1, -100)]
