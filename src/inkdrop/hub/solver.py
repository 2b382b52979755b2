"""Solver: their scheduler classes as samplers of ours, as tests/parity shows them to agree, noise for noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from inkdrop.find import Part
from inkdrop.hub.config import Config

__all__ = ["Sampler", "sampler_of"]

_FEW = "with fewer than 15 steps theirs lowers the order of the last ones"
_VARIANCES = {
    "fixed_small": "beta-tilde",
    "fixed_large": "beta",
    "learned_range": "learned",
}

Sampler: TypeAlias = tuple[Part, tuple[str, ...]]
"""A sampler with its knobs, and in what theirs differs from it."""


def sampler_of(config: Config, name: str) -> Sampler:
    """The sampler of a scheduler's config.

    Args:
        config: whose keys about the sampler are asked for.
        name: its class.

    Raises:
        BadCheckpoint: a value that has no counterpart here, naming the key.
    """
    return _SAMPLERS[name](config)


def _ddpm(config: Config) -> Sampler:
    kind = _VARIANCES[config.choice("variance_type", "fixed_small", tuple(_VARIANCES))]
    return Part("ddpm", {} if kind == "beta-tilde" else {"variance": kind}), ()


def _ddim(config: Config) -> Sampler:
    note = "clipping agrees with theirs at use_clipped_model_output=True, an argument of its pipeline"
    return Part("ddim"), (note,) if config.flag("clip_sample", True) else ()


def _pndm(config: Config) -> Sampler:
    if not config.flag("skip_prk_steps", False):
        raise config.error("skip_prk_steps", "true: its Runge–Kutta start has no counterpart here")
    config.choice("prediction_type", "epsilon", ("epsilon",))  # of v, theirs averages v and not eps
    return Part("plms"), ()


def _dpm(config: Config) -> Sampler:
    """DPM-Solver++ and its SDE kind, multistep."""
    kind = config.choice("algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++"))
    order = config.integer("solver_order", 2, 1, 3)
    config.choice("solver_type", "midpoint", {2: ("midpoint",), 3: ("heun",)}.get(order, ("midpoint", "heun")))
    config.only("variance_type", None, "learned", "learned_range")  # whose second half ours leaves out, too
    lowered = config.flag("lower_order_final", True)
    config.only("euler_at_final", False)
    if order > 1 and lowered and config.get("final_sigmas_type", "zero") != "zero":
        raise config.error("final_sigmas_type", "zero beside lower_order_final")
    if kind == "dpmsolver++":
        part = {1: Part("ddim"), 2: Part("dpmpp_2m"), 3: Part("dpmpp_3m")}[order]
    else:
        part = {1: Part("ddim", {"eta": 1.0}), 2: Part("dpmpp_2m_sde"), 3: Part("dpmpp_3m_sde")}[order]
    wrong = ("theirs of order 3 has a wrong factor, with which it is of lower order",) if order == 3 else ()
    return part, (*wrong, *((_FEW,) if order == 3 and lowered else ()))


def _singlestep(config: Config) -> Sampler:
    if config.integer("solver_order", 2, 1, 3) != 1:
        raise config.error("solver_order", "1: above, its steps share the levels of the grid, which ours do not")
    config.choice("algorithm_type", "dpmsolver++", ("dpmsolver++",))
    config.only("variance_type", None, "learned", "learned_range")
    config.skip("solver_type", "lower_order_final")
    return Part("ddim"), ()


def _unipc(config: Config) -> Sampler:
    config.only("predict_x0", True)
    config.only("disable_corrector", [])
    config.only("solver_p", None)
    config.only("lower_order_final", True)
    order, kind = config.integer("solver_order", 2, 1, 3), config.choice("solver_type", "bh2", ("bh1", "bh2"))
    return Part("unipc", {"predictor_order": order, "variant": kind.replace("h", "")}), ()


def _deis(config: Config) -> Sampler:
    config.only("algorithm_type", "deis")
    config.only("solver_type", "logrho")
    order = config.integer("solver_order", 2, 1, 3)
    few = order > 1 and config.flag("lower_order_final", True)
    return Part("deis", {"order": order}), (_FEW,) if few else ()


def _euler(config: Config) -> Sampler:
    config.only("interpolation_type", "linear")
    config.only("timestep_type", "discrete")
    config.only("sigma_min", None)
    config.only("sigma_max", None)
    return Part("euler"), ()


def _plain(part: Part, *notes: str) -> Callable[[Config], Sampler]:
    return lambda config: (part, notes)


_SAMPLERS: dict[str, Callable[[Config], Sampler]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSDEScheduler": _plain(Part("dpmpp_2s_sde")),
    "DPMSolverSinglestepScheduler": _singlestep,
    "EDMDPMSolverMultistepScheduler": _dpm,
    "EDMEulerScheduler": _plain(Part("euler")),
    "EulerAncestralDiscreteScheduler": _plain(Part("euler_ancestral")),
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _plain(Part("euler")),
    "FlowMatchHeunDiscreteScheduler": _plain(Part("heun")),
    "HeunDiscreteScheduler": _plain(Part("heun", {"space": "rho"})),
    "KDPM2AncestralDiscreteScheduler": _plain(Part("dpm2_ancestral")),
    "KDPM2DiscreteScheduler": _plain(Part("dpm2")),
    "LMSDiscreteScheduler": _plain(Part("lms"), "theirs keeps its order in the step into clean, ours steps to x0"),
    "PNDMScheduler": _pndm,
    "UniPCMultistepScheduler": _unipc,
}
