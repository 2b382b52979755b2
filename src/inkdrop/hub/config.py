"""Config: a foreign config.json, asked key by key; what is asked is checked, and what nobody asked for is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from inkdrop.errors import BadCheckpoint

__all__ = ["Config"]


class Config:
    """A foreign configuration that must be understood whole.

    A key that is absent has the default that their class gives it. When all was asked, `done` refuses what is left:
    a setting that we do not know must not be passed over. Keys that begin with "_" are their own bookkeeping.

    Args:
        record: plain JSON.
        what: whose it is, for messages, as "UNet2DModel".

    Raises:
        BadCheckpoint: record is no JSON object.
    """

    def __init__(self, record: Mapping[str, Any], what: str) -> None:
        if not isinstance(record, Mapping):
            raise BadCheckpoint(f"{what} config: got {type(record).__name__}, need a JSON object")
        self.record, self.what = dict(record), what
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; whoever asks must check it."""
        self._asked.add(key)
        return self.record.get(key, default)

    def integer(self, key: str, default: int, low: int = 0, high: int = 65_536) -> int:
        """A whole number in [low, high]."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"a whole number in [{low}, {high}]")
        return value

    def number(self, key: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        value = self.get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high:
            raise self.error(key, f"a number in [{low:g}, {high:g}]")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null is false."""
        value = self.get(key, default)
        if not isinstance(value, bool) and value is not None:
            raise self.error(key, "true or false")
        return bool(value)

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """One of these words."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, " or ".join(allowed))
        return value

    def integers(
        self, key: str, default: Sequence[int], low: int = 0, high: int = 65_536, most: int = 16
    ) -> tuple[int, ...]:
        """One to `most` whole numbers in [low, high]."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= most:
            raise self.error(key, f"a list of 1 to {most} whole numbers")
        if any(isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in value):
            raise self.error(key, f"whole numbers in [{low}, {high}]")
        return tuple(value)

    def words(self, key: str, default: Sequence[str], allowed: Sequence[str], most: int = 16) -> tuple[str, ...]:
        """One to `most` of these words."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= most:
            raise self.error(key, f"a list of 1 to {most} names")
        for word in value:
            if word not in allowed:
                raise self.error(key, f"each one of {', '.join(allowed)}", got=word)
        return tuple(value)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse all but these values; absent is the first of them, and null among them is written None."""
        value = self.get(key, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed) and not self._equal(value, allowed):
            raise self.error(key, " or ".join("null" if one is None else repr(one) for one in allowed))

    @staticmethod
    def _equal(value: Any, allowed: Sequence[Any]) -> bool:
        """Whether a number is one of these numbers, 1 being 1.0."""
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain and any(isinstance(a, (int, float)) and not isinstance(a, bool) and a == value for a in allowed)

    def skip(self, *keys: str) -> None:
        """Keys that change nothing that is computed here."""
        self._asked.update(keys)

    def done(self) -> None:
        """Refuse keys that were never asked for; null and false say that something is off, and pass.

        Raises:
            BadCheckpoint: naming the first.
        """
        for key, value in self.record.items():
            if key not in self._asked and not key.startswith("_") and value is not None and value is not False:
                raise BadCheckpoint(
                    f"{self.what} config: {key} = {_short(value)} is not known here, and is not passed over"
                )

    def error(self, key: str, need: str, got: Any = None) -> BadCheckpoint:
        """What to raise of a key whose value cannot be taken."""
        value = self.record.get(key) if got is None else got
        shown = _short(value) if key in self.record else "nothing"
        return BadCheckpoint(f"{self.what} config: {key} is {shown}, need {need}")


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
