"""Plan: how a scheduler of diffusers samples, as a sampler, a grid and guides of ours, and back.

Spacings come in three kinds. The plain ones (DDPM, DDIM, PNDM) space n integer timesteps; multistep solvers space n + 1
and leave out the last; k-diffusion's do not round at linspace. Each class's sampler is the one that tests/parity shows
to agree with it, noise for noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inkdrop.errors import BadCheckpoint
from inkdrop.find import Part
from inkdrop.hub.config import Config
from inkdrop.hub.schedule import (
    EDM,
    ELSEWHERE,
    FLOW,
    KARRAS,
    MULTISTEP,
    PLAIN,
    Noising,
    family_of,
    read_noising,
    schedule_of,
    write_betas,
)
from inkdrop.hub.solver import sampler_of
from inkdrop.plan import Plan

__all__ = ["Reading", "read_plan", "read_scheduler", "write_scheduler"]

_START = "theirs starts from sigma(1) times the noise, ours from the noise itself"


@dataclass(frozen=True)
class Reading:
    """What a scheduler's config says.

    Attributes:
        noising: the levels, and what the net hears and says.
        plan: how to sample.
        notes: in what their sampler differs from ours, in words; () where it does not.
    """

    noising: Noising
    plan: Plan
    notes: tuple[str, ...] = ()


def read_scheduler(record: dict[str, Any], *, plan: Plan | None = None) -> Reading:
    """What a scheduler_config.json says, as ours.

    Args:
        record: its JSON.
        plan: how to sample instead of as it says; then only what it says of the net is read.

    Raises:
        BadCheckpoint: a class or a value that has no counterpart here, naming the key.
    """
    config = Config(record, str(record.get("_class_name", "scheduler")))
    noising = read_noising(config)
    if plan is not None:
        config.skip(*ELSEWHERE)
        config.done()
        return Reading(noising, plan)
    made, rounded, notes = read_plan(config, noising)
    config.skip(*ELSEWHERE)
    config.done()
    if rounded:
        noising = noising._replace(clock=Part("table", {"rounded": True}))
    return Reading(noising, made, notes)


def read_plan(config: Config, noising: Noising) -> tuple[Plan, bool, tuple[str, ...]]:
    """(plan, whether the net's timesteps are rounded, notes) of a scheduler's config; with its pipelines' steps."""
    name = family_of(config)
    sampler, notes = sampler_of(config, name)
    grid, rounded, more = _grid(config, name, noising)
    total = schedule_of(noising.schedule).steps
    steps = total if name == "DDPMScheduler" else min(50, total - (name in MULTISTEP))
    return Plan(sampler, grid, max(1, steps), _guide(config, name)), rounded, (*notes, *more)


# ---- guides --------------------------------------------------------------------------------------------------


def _guide(config: Config, name: str) -> tuple[Part, ...]:
    """Clipping or dynamic thresholding, where the class has it."""
    on = name in ("DDIMScheduler", "DDPMScheduler")
    if name not in ("EDMEulerScheduler", "PNDMScheduler", *KARRAS, *FLOW) and config.flag("thresholding", False):
        ratio = config.number("dynamic_thresholding_ratio", 0.995, 1e-9, 1)
        most = config.number("sample_max_value", 1.0, 1, 1e9)
        return (Part("clip") if most == 1 else Part("threshold", {"percentile": ratio, "most": most}),)
    config.skip("dynamic_thresholding_ratio", "sample_max_value")
    if (on or name == "HeunDiscreteScheduler") and config.flag("clip_sample", on):
        bound = config.number("clip_sample_range", 1.0, 1e-9, 1e9)
        return (Part("clip", {} if bound == 1 else {"low": -bound, "high": bound}),)
    config.skip("clip_sample_range")
    return ()


# ---- grids ---------------------------------------------------------------------------------------------------


def _grid(config: Config, name: str, noising: Noising) -> tuple[Part, bool, tuple[str, ...]]:
    """(grid, whether the clock is rounded, notes)."""
    if name in FLOW:
        return _grid_of_flow(config, noising)
    if name in EDM:
        config.only("final_sigmas_type", "zero")
        beyond = {"rho_max": 2 * float(noising.schedule.knobs["rho_max"])}
        karras = config.choice("sigma_schedule", "karras", ("karras", "exponential")) == "karras"
        power = {"power": noising.schedule.knobs["power"]}
        note = "theirs starts from √(sigma_max² + 1) times the noise, ours from sigma_max times"
        return Part("karras", power | beyond) if karras else Part("loguniform", beyond), False, (note,)
    if name in MULTISTEP:
        config.only("use_flow_sigmas", False)
        config.only("use_dynamic_shifting", False)
        config.skip("time_shift_type", "sigma_min", "sigma_max")
        config.only("shift_terminal", None)
        _refuse_clipping(config, name, noising)
    if name not in PLAIN:
        config.only("use_beta_sigmas", False, None)
        spaced = _spaced_in_sigma(config, name, noising)
        if spaced is not None:
            return spaced
    return _spaced_in_time(config, name)


def _refuse_clipping(config: Config, name: str, noising: Noising) -> None:
    """lambda_min_clipped leaves out the noisiest levels, unless there are none beyond it."""
    if name.startswith("DPMSolver"):
        least = config.get("lambda_min_clipped", -math.inf)
        if not isinstance(least, (int, float)) or float(schedule_of(noising.schedule)(1.0).lam) < least:
            raise config.error("lambda_min_clipped", "a number below every log(alpha/sigma) of the table")


def _end(config: Config, name: str) -> dict[str, str]:
    """Where the grid ends, as a knob."""
    if name in ("DDIMScheduler", "PNDMScheduler"):
        clean = config.flag("set_alpha_to_one", name == "DDIMScheduler")
    elif name == "DEISMultistepScheduler":
        clean = False
    elif name in MULTISTEP or name == "EulerDiscreteScheduler":
        clean = config.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero"
    else:
        clean = True
    return {} if clean else {"end": "least"}


def _spaced_in_time(config: Config, name: str) -> tuple[Part, bool, tuple[str, ...]]:
    """leading, trailing or linspace timesteps."""
    own = "leading" if name in PLAIN else "linspace"
    singlestep = name == "DPMSolverSinglestepScheduler"
    spacing = "linspace" if singlestep else config.choice("timestep_spacing", own, ("leading", "trailing", "linspace"))
    offset = 0 if singlestep else config.integer("steps_offset", 0, 0, 100_000)
    end, skip = _end(config, name), {"skip_last": True} if name in MULTISTEP else {}
    if spacing == "linspace" and name in ("DDIMScheduler", "PNDMScheduler"):
        raise config.error(
            "timestep_spacing", "leading or trailing (at linspace its steps are not those between its timesteps)"
        )
    notes: tuple[str, ...] = ()
    if name in KARRAS and spacing != "leading":
        notes = (_START,)
    if name in ("DDIMScheduler", "PNDMScheduler") and spacing == "trailing":
        notes = ("theirs steps by T//n timesteps, which is ours where n divides T",)
    if name == "DDPMScheduler" and spacing == "trailing":
        notes = ("theirs adds noise in the step into clean, unless variance_type is fixed_small",)
    if spacing == "trailing":
        return Part("trailing", {**end}), False, notes
    if spacing == "leading":
        return Part("leading", {**({"offset": offset} if offset else {}), **skip, **end}), False, notes
    rounded = {"rounded": False} if name in KARRAS else {}
    return Part("linspace", {**rounded, **skip, **end}), False, notes


def _spaced_in_sigma(config: Config, name: str, noising: Noising) -> tuple[Part, bool, tuple[str, ...]] | None:
    """Karras's or exponential sigmas over the whole table; None where it asks for neither."""
    karras, log = config.flag("use_karras_sigmas", False), config.flag("use_exponential_sigmas", False)
    lu = name == "DPMSolverMultistepScheduler" and config.flag("use_lu_lambdas", False)
    key = "use_karras_sigmas" if karras else "use_lu_lambdas" if lu else "use_exponential_sigmas"
    if not (karras or log or lu):
        return None
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2" and name != "UniPCMultistepScheduler"
    cut = name in MULTISTEP and (cosine or not (karras or lu))
    if cut or name == "DEISMultistepScheduler" or (karras and name.startswith("KDPM2")):
        raise config.error(key, "false: the net is told timesteps that are not those of its sigmas")
    if name in KARRAS and config.get("timestep_spacing", "linspace") != "linspace":
        raise config.error("timestep_spacing", f"linspace beside {key}: else its sigmas begin inside of the table")
    config.skip("timestep_spacing", "steps_offset")
    config.only("final_sigmas_type", "zero")
    rho = float(schedule_of(noising.schedule)(1.0).rho)
    if math.isinf(rho):
        raise config.error(key, "false at zero terminal SNR")
    knobs = {"rho_max": 2 * rho} if rho > 80 else {}
    notes = (_START,) if name in KARRAS else ()
    return Part("karras" if karras else "loguniform", knobs), name in MULTISTEP, notes


def _grid_of_flow(config: Config, noising: Noising) -> tuple[Part, bool, tuple[str, ...]]:
    """n equal steps of time before the shift, from 1 to 1/T."""
    for key in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        config.only(key, False)
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        config.only(key, False, None)
    config.only("shift_terminal", None)
    config.only("num_train_timesteps", 1000)
    config.skip("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
    plain = noising.schedule.knobs["shift"] == 1
    notes = () if plain else ("theirs shifts its least level twice, so that its levels lie a little above ours",)
    return Part("linspace", {"rounded": False}), False, notes


# ---- and back ------------------------------------------------------------------------------------------------

_WRITTEN = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "plms": "PNDMScheduler"}


def write_scheduler(noising: Noising, plan: Plan) -> dict[str, Any]:
    """The scheduler_config.json of a model that is sampled by ddim, ddpm or plms; steps are the pipeline's to choose.

    Raises:
        BadCheckpoint: levels, a prediction or a way of sampling that none of those three classes has.
    """
    theirs = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    if noising.target.name not in theirs:
        raise BadCheckpoint(f"hub write: target {noising.target.name} is none of theirs, need eps, x0 or v")
    if noising.scale.name != "unit" or noising.clock.name != "table" or noising.clock.knobs.get("rounded"):
        raise BadCheckpoint(
            f"hub write: clock {noising.clock.name} and scale {noising.scale.name} are not theirs, need table and unit"
        )
    if plan.sampler.name not in _WRITTEN or plan.combine is not None:
        what = plan.sampler.name if plan.combine is None else plan.combine.name
        raise BadCheckpoint(
            f"hub write: {what} is no sampler of theirs; write with ddim, ddpm or plms (--sampler ddim)"
        )
    kind = _WRITTEN[plan.sampler.name]
    words = {"_class_name": kind, "prediction_type": theirs[noising.target.name], **write_betas(noising.schedule)}
    return {**words, **_written_sampler(plan.sampler), **_written_grid(plan.grid, kind), **_written_guide(plan, kind)}


def _written_sampler(part: Part) -> dict[str, Any]:
    """The knobs of a sampler; DDIM's eta is an argument of their pipeline."""
    if part.name == "ddpm":
        kind = part.knobs.get("variance", "beta-tilde")
        return {"variance_type": {"beta-tilde": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}[kind]}
    if part.knobs.get("eta"):
        raise BadCheckpoint("hub write: ddim's eta is an argument of their pipeline, and not in a config; set it to 0")
    return {"skip_prk_steps": True} if part.name == "plms" else {}


def _written_grid(part: Part, kind: str) -> dict[str, Any]:
    """leading, trailing or linspace timesteps."""
    known = ("leading", "trailing") if kind != "DDPMScheduler" else ("leading", "trailing", "linspace")
    if part.name not in known or part.knobs.get("skip_last") or not part.knobs.get("rounded", True):
        raise BadCheckpoint(f"hub write: grid {part.name} is not theirs beside this sampler; try --grid trailing")
    words = {"timestep_spacing": part.name, "steps_offset": part.knobs.get("offset", 0)}
    clean = part.knobs.get("end", "clean") == "clean"
    if kind == "DDPMScheduler":
        if not clean:
            raise BadCheckpoint("hub write: DDPMScheduler ends clean; set grid.end=clean")
        return words
    return {**words, "set_alpha_to_one": clean}


def _written_guide(plan: Plan, kind: str) -> dict[str, Any]:
    """Clipping or thresholding; cfg is an argument of their pipelines."""
    words: dict[str, Any] = {} if kind == "PNDMScheduler" else {"clip_sample": False}
    for part in plan.guide:
        low, high = part.knobs.get("low", -1.0), part.knobs.get("high", 1.0)
        if part.name == "cfg" and not set(part.knobs) - {"scale"}:
            continue
        if part.name == "clip" and low == -high and words:
            words = {"clip_sample": True, "clip_sample_range": high}
        elif part.name == "threshold" and words and part.knobs.get("bound", 1) == 1 and part.knobs.get("most"):
            ratio = part.knobs.get("percentile", 0.995)
            most = {"sample_max_value": part.knobs["most"]}
            words = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "clip_sample": False, **most}
        else:
            raise BadCheckpoint(f"hub write: guide {part.name} as it is set is not in {kind}; leave it out (--no-clip)")
    return words
