"""How finely a delta is encoded: what a head asks for, and what devices and benchmarks pass to a codec."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

FINEST_STEP: Final = 2.0**-10
COARSEST_STEP: Final = 64.0
"""Bounds of a step, in units of the delta's rms. Beyond 64, next to nothing of a delta is left."""


@dataclass(frozen=True)
class Rate:
    """A step, or a size to be met by choosing one; without any of them, the codec's own step.

    Attributes:
        step: of the quantiser, in units of the delta's rms: 1 is fine, 8 the usual, 16 coarse.
        bits_per_parameter: the payload's size at most, in bits over the number of parameters.
        bytes_per_update: the payload's size at most.

    Raises:
        ValueError: more than one is given, or one is out of range.
    """

    step: float | None = None
    bits_per_parameter: float | None = None
    bytes_per_update: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a rate is one of them")
        for name, value in given.items():
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} = {value:g}; it must be above 0")
        if self.step is not None and not FINEST_STEP <= self.step <= COARSEST_STEP:
            raise ValueError(f"step = {self.step:g}; it must be from {FINEST_STEP:g} to {COARSEST_STEP:g}")

    def budget_bytes(self, parameters: int) -> int | None:
        """The most bytes a payload of so many parameters shall have, or None: the step decides."""
        if self.bytes_per_update is not None:
            return int(self.bytes_per_update)
        if self.bits_per_parameter is not None:
            return int(self.bits_per_parameter * parameters / 8)
        return None


def rate_of(codec_id: str, parameters: Mapping[str, float], *, adjustable: bool) -> Rate:
    """The rate that a head's or a settings file's codec parameters ask for.

    Args:
        codec_id: for the error text.
        parameters: by name.
        adjustable: whether the codec has a rate at all.

    Raises:
        ValueError: a name that the codec does not have, or a value out of range.
    """
    names = [field.name for field in fields(Rate)] if adjustable else []
    unknown = sorted(set(parameters) - set(names))
    if unknown:
        known = ", ".join(names) or "none"
        raise ValueError(f"codec {codec_id} has no parameter {unknown[0]!r}; it has: {known}")
    return Rate(**parameters)


@dataclass(frozen=True)
class Request:
    """What is asked of one encoding.

    Attributes:
        rate: how finely.
        rms: what the step is measured in; None: the rms of the vector that is encoded. With error feedback
            that is delta + residual, but the step must follow the delta alone, or the residual starves.
    """

    rate: Rate = Rate()
    rms: float | None = None
