"""One value of a table or a sensor, as text or JSON, becomes one number or is refused. Pure."""

import math
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta

_WORDS: Final = {"on": 1.0, "true": 1.0, "off": 0.0, "false": 0.0}
LARGEST: Final = float(np.finfo(np.float32).max)
"""Of the numbers that float32 can hold."""
_SHOWN: Final = 60


class BadValue(ValueError):
    """A value that is no use.

    Attributes:
        reason: what is wrong with it, the same words for all of its kind.
    """

    def __init__(self, reason: str, text: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason if text is None else text)

    @classmethod
    def of(cls, value: object, reason: str) -> "BadValue":
        """That this value is bad for this reason."""
        return cls(reason, f"{_short(value)} is {reason}")

    def at(self, place: str) -> "BadValue":
        """The same, with where it stands."""
        return BadValue(self.reason, f"{place}: {self}")


NOT_A_NUMBER: Final = "not a number"
NOT_FINITE: Final = "NaN, infinite or too large"
NOT_WHOLE: Final = "not a whole number"
MISSING: Final = "missing"
UNKNOWN_CLASS: Final = "not among the classes"


class Scale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one column or channel is scaled by: ``(value − mean) / deviation``, the same in the whole fleet.

    Attributes:
        mean: its mean, or what is to become 0.
        deviation: its standard deviation, or what is to become 1 above that.
    """

    mean: float = 0.0
    deviation: Annotated[float, Meta(gt=0)] = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation)):
            raise ValueError(f"mean {self.mean} and deviation {self.deviation} must be finite")


def number_of(value: Any) -> float:
    """A finite number that float32 can hold, of a number, a bool, or a text that says one.

    ``on`` and ``true`` are 1, ``off`` and ``false`` 0, in any case.

    Raises:
        BadValue: it is none.
    """
    if isinstance(value, str):
        value = number = _number_of_text(value)
    elif isinstance(value, bool | int | float):
        number = value
    else:
        raise BadValue(MISSING) if value is None else BadValue.of(value, NOT_A_NUMBER)
    if not -LARGEST <= number <= LARGEST:
        raise BadValue.of(value, NOT_FINITE)
    return float(number)


def _number_of_text(text: str) -> float:
    if "_" in text:  # which Python allows between digits, and nobody else writes
        raise BadValue.of(text, NOT_A_NUMBER)
    try:
        return float(text)
    except ValueError:
        word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    raise BadValue.of(text, NOT_A_NUMBER) if word else BadValue(MISSING)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
