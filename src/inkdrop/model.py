"""Model: what can be sampled without further words; a Bundle is one, and a Plain another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn

from inkdrop.codec import Codec
from inkdrop.denoiser import Denoiser
from inkdrop.drive import Answerer
from inkdrop.edit.pairs import Pair
from inkdrop.errors import BadCheckpoint
from inkdrop.plan import Plan
from inkdrop.reader import Reader

__all__ = ["Examples", "Model", "Plain", "conditional", "examples_of", "state_shape"]


class Examples(NamedTuple):
    """Conditions of held-out data, which a model is sampled with in turn unless it is told others.

    Attributes:
        texts: captions; () where the model reads none.
        attributes: rows of attributes, each D long; () where it has none.
        labels: the classes of the same samples; () where the model has none, or nothing else that goes with them.
    """

    texts: tuple[str, ...] = ()
    attributes: tuple[tuple[float, ...], ...] = ()
    labels: tuple[int, ...] = ()


class Model(Protocol):
    """What can be sampled: a Bundle, or a Plain.

    Attributes are read only; see `Plain` for what each means.
    """

    @property
    def denoiser(self) -> Denoiser:
        """What answers."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *S) of one sample."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def plan(self) -> Plan:
        """How to sample unless told otherwise."""
        ...

    @property
    def guidable(self) -> bool:
        """Whether it has an unconditional branch."""
        ...

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of continuous attributes."""
        ...

    @property
    def reader(self) -> Reader | None:
        """How it reads text."""
        ...

    @property
    def pair(self) -> Pair | None:
        """How its image condition is made."""
        ...

    @property
    def codec(self) -> Codec | None:
        """The autoencoder in whose latents it works."""
        ...

    @property
    def examples(self) -> Examples:
        """What it is told unless its user says otherwise."""
        ...

    @property
    def parts(self) -> Mapping[str, Answerer]:
        """What else answers questions, by the name in Ask.of."""
        ...


@dataclass
class Plain:
    """A model of a denoiser and what is known of it, without a recipe: for networks that were trained elsewhere.

    Attributes:
        denoiser: what answers.
        shape: (C, *S) of one sample.
        classes: class names, label i being classes[i]; () if there are none.
        plan: how to sample unless told otherwise.
        guidable: whether it was trained with dropped conditions, so that it has an unconditional branch.
        attributes: the names of the continuous attributes that it takes, in order; () if there are none.
        reader: how it reads text; None if it reads none.
        pair: how its image condition is made; None if it takes none.
        codec: the autoencoder in whose latents it works; None if it works on samples themselves.
        examples: what it is told unless its user says otherwise.
        parts: what else answers questions, by the name in Ask.of ("weak", "classifier").
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    plan: Plan = field(default_factory=Plan)
    guidable: bool = False
    attributes: tuple[str, ...] = ()
    reader: Reader | None = None
    pair: Pair | None = None
    codec: Codec | None = None
    examples: Examples = field(default_factory=Examples)
    parts: dict[str, nn.Module] = field(default_factory=dict)


def examples_of(record: Any) -> Examples:
    """The examples that a manifest holds, from plain JSON.

    Raises:
        BadCheckpoint: they are of another form.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Examples).validate_python(record)
    except ValidationError as error:
        raise BadCheckpoint(f"got examples of another form ({error.errors()[0]['msg']})") from None


def state_shape(model: Model) -> tuple[int, ...]:
    """(C, *S) of what is noised and denoised: a latent, or a sample itself."""
    return model.shape if model.codec is None else model.codec.latent_shape


def conditional(model: Model) -> bool:
    """Whether a model is told anything that can be dropped: a class, attributes or a text."""
    return bool(model.classes or model.attributes or model.reader)
