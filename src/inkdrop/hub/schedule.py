"""Schedule: what a scheduler's config says of noise levels and of what the net predicts, as our parts, and back.

Their scheduler_config.json mixes two things: with which levels a net was trained and what it says (`read_noising`), and
how to sample it (`hub.plan.read_plan`). Both raise at a key that they cannot represent, naming it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from inkdrop.core.schedule import Schedule, Table
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import Part, build, check_knobs, find, knobs
from inkdrop.hub.config import Config

__all__ = [
    "EDM",
    "ELSEWHERE",
    "FLOW",
    "KARRAS",
    "MULTISTEP",
    "PLAIN",
    "TABLES",
    "Noising",
    "denoiser_with",
    "family_of",
    "floored",
    "read_noising",
    "schedule_of",
    "write_betas",
]

PLAIN = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
MULTISTEP = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
KARRAS = (
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
TABLES = (*PLAIN, *MULTISTEP, *KARRAS)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")

_LATENT_ENDS = (
    "DPMSolverSDEScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
_EXACT_ZERO = ("DDIMScheduler", "DDPMScheduler")
_FLOORED_ZERO = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
_FLOOR = 2.0**-24

_KEYS = """
algorithm_type base_image_seq_len base_shift beta_end beta_schedule beta_start clip_sample clip_sample_range
disable_corrector dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift interpolation_type
invert_sigmas lambda_min_clipped lower_order_final max_image_seq_len max_shift noise_sampler_seed num_train_timesteps
original_inference_steps predict_x0 prediction_type rescale_betas_zero_snr rho sample_max_value set_alpha_to_one shift
shift_terminal sigma_data sigma_max sigma_min sigma_schedule skip_prk_steps solver_order solver_p solver_type
steps_offset stochastic_sampling thresholding time_shift_type timestep_scaling timestep_spacing timestep_type
trained_betas use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas
use_lu_lambdas variance_type
"""
ELSEWHERE = frozenset(_KEYS.split())
"""Every key of their schedulers. Configs carry keys of other classes than their own, which has no use for them."""

_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class Noising(NamedTuple):
    """With which noise levels a net was trained, and what it hears and says.

    Attributes:
        schedule: the levels.
        target: what it predicts.
        clock: what it is told about time.
        scale: the factor on its input.
    """

    schedule: Part
    target: Part
    clock: Part
    scale: Part


def family_of(config: Config) -> str:
    """The class of a scheduler's config.

    Raises:
        BadCheckpoint: it is none that is known here.
    """
    return config.choice("_class_name", "", (*TABLES, *FLOW, *EDM))


def schedule_of(part: Part) -> Schedule:
    """The schedule that a part names."""
    made: Schedule = build("schedules", part)
    return made


def read_noising(config: Config) -> Noising:
    """What a scheduler's config says of a net's noise levels, prediction, clock and scale.

    Raises:
        BadCheckpoint: a class or a value that has no counterpart here, naming the key.
    """
    name = family_of(config)
    if name in FLOW:
        steps = config.integer("num_train_timesteps", 1000, 1, 1_000_000)
        return _straight(config.number("shift", 1.0, 1e-6, 1e6), steps)
    if name in EDM:
        return _edm(config)
    if name in MULTISTEP and config.flag("use_flow_sigmas", False):
        config.choice("prediction_type", "epsilon", ("flow_prediction",))
        config.skip("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        steps = config.integer("num_train_timesteps", 1000, 1, 1_000_000)
        return _straight(config.number("flow_shift", 1.0, 1e-6, 1e6), steps)
    config.only("flow_shift", 1.0)
    target = Part(_TARGETS[config.choice("prediction_type", "epsilon", tuple(_TARGETS))])
    return Noising(_table(config, name), target, Part("table"), Part("unit"))


def _straight(shift: float, steps: int) -> Noising:
    """Flow matching: the net is told sigma·T, after the shift, and says eps − x0."""
    return Noising(Part("flow", {"shift": shift}), Part("flow"), Part("sigma", {"scale": float(steps)}), Part("unit"))


def _edm(config: Config) -> Noising:
    """Karras et al.'s: alpha = 1, c_in, c_noise = log(sigma)/4 and F."""
    low, high = config.number("sigma_min", 0.002, 1e-9, 1e9), config.number("sigma_max", 80.0, 1e-9, 1e9)
    sd = config.number("sigma_data", 0.5, 1e-9, 1e9)
    config.only("prediction_type", "epsilon")  # their v_prediction is −F
    config.skip("num_train_timesteps")  # of what they hold before timesteps are set
    knobs = {"rho_min": low, "rho_max": high, "power": config.number("rho", 7.0, 1e-3, 1e3)}
    scale = {"sd": sd}
    return Noising(Part("edm", knobs), Part("edm", scale), Part("lam", {"scale": 0.25}), Part("edm", dict(scale)))


def _table(config: Config, name: str) -> Part:
    """The table of betas."""
    ends = (8.5e-4, 0.012) if name in _LATENT_ENDS else (1e-4, 0.02)
    steps = config.integer("num_train_timesteps", 1000, 1, 100_000)
    kinds = {**_BETAS, "sigmoid": "sigmoid"} if name == "DDPMScheduler" else _BETAS
    kind = kinds[config.choice("beta_schedule", "linear", tuple(kinds))]
    first, last = config.number("beta_start", ends[0], 0, 1), config.number("beta_end", ends[1], 0, 1)
    knobs: dict[str, Any] = {"steps": steps} if kind == "cosine" else {"steps": steps, "first": first, "last": last}
    if (betas := config.get("trained_betas")) is not None:
        kind, knobs = "table", {"betas": _listed(config, betas, steps)}
    rescaled = name in (*_EXACT_ZERO, *_FLOORED_ZERO) and config.flag("rescale_betas_zero_snr", False)
    if not rescaled:
        return Part(kind, knobs)
    part = Part(kind, {**knobs, "zero_terminal": True})
    if name in _EXACT_ZERO:
        return part
    try:
        return floored(part)
    except BadArgument:
        need = "false: their last alpha², 2^-24, is above the one before it"
        raise config.error("rescale_betas_zero_snr", need) from None


def _listed(config: Config, betas: Any, steps: int) -> list[float]:
    """trained_betas, which must be as many as there are timesteps."""
    numbers = isinstance(betas, list) and all(isinstance(b, float) and math.isfinite(b) for b in betas)
    if not numbers or len(betas) != steps:
        raise config.error("trained_betas", f"{steps} numbers, as many as num_train_timesteps")
    return list(betas)


def floored(part: Part) -> Part:
    """A table of zero terminal SNR whose last alpha² is 2^−24 instead, as their solvers in log-SNR have it.

    Raises:
        BadArgument: no table of betas, or one whose last but one alpha² is below that.
    """
    table = schedule_of(part)
    if not isinstance(table, Table):
        raise BadArgument(f"schedule {part.name}: is no table of betas")
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - table.betas).cumprod(0)])
    if float(abar[-2]) <= _FLOOR:
        raise BadArgument(f"schedule {part.name}: its last but one alpha² is below 2^-24")
    abar[-1] = _FLOOR
    return Part("table", {"betas": (1 - abar[1:] / abar[:-1]).tolist()})


def write_betas(part: Part) -> dict[str, Any]:
    """Our table of betas in the words of their configs: num_train_timesteps, beta_schedule, beta_start, ...

    A table that has no name there is written out as trained_betas.

    Raises:
        BadCheckpoint: a schedule that is no table of betas.
    """
    table, knobs = schedule_of(part), part.knobs
    if not isinstance(table, Table):
        raise BadCheckpoint(f"hub write: schedule {part.name} is no table of betas, which these pipelines need")
    words: dict[str, Any] = {"num_train_timesteps": table.steps}
    named = {ours: theirs for theirs, ours in _BETAS.items()}
    usual = part.name in named and not knobs.get("rescale") and not set(knobs) & {"offset", "clip"}
    if not usual:
        return words | {"trained_betas": table.betas.tolist()}
    words["beta_schedule"] = named[part.name]
    if part.name != "cosine":
        ends = {"linear": (1e-4, 0.02), "scaled_linear": (8.5e-4, 0.012)}[part.name]
        words |= {"beta_start": knobs.get("first", ends[0]), "beta_end": knobs.get("last", ends[1])}
    return words | ({"rescale_betas_zero_snr": True} if knobs.get("zero_terminal") else {})


def denoiser_with(net: nn.Module, noising: Noising) -> Denoiser:
    """The denoiser of a net, with the levels, target, clock and scale that were read."""
    schedule = schedule_of(noising.schedule)
    target = build("targets", noising.target, schedule)
    clock, scale = find("clocks", noising.clock.name), find("scales", noising.scale.name)
    own = {"steps": schedule.steps} if "steps" in knobs(clock) else {}
    clocked = check_knobs(noising.clock.name, clock, {**own, **noising.clock.knobs})
    scaled = check_knobs(noising.scale.name, scale, noising.scale.knobs)
    return Denoiser(net, schedule, target, lambda lv: clock(lv, **clocked), lambda lv: scale(lv, **scaled))
