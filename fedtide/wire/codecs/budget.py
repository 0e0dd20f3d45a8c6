"""The finest step whose payload stays within a budget."""

from collections.abc import Callable
from math import log, log2
from typing import Final

from fedtide.wire.codecs.rate import COARSEST_STEP, FINEST_STEP

_PER_OCTAVE: Final = 512
"""Steps to choose from: neighbours differ by 0.14 %, and payloads by about as much."""
_FINEST: Final = round(log2(FINEST_STEP) * _PER_OCTAVE)
_COARSEST: Final = round(log2(COARSEST_STEP) * _PER_OCTAVE)
_CLOSE: Final = 0.998
"""The part of a budget from which on a search for more does not pay."""


def finest_within(encoded: Callable[[float], bytes], budget_bytes: int, guess: float) -> bytes:
    """The payload of the finest step that takes at most ``budget_bytes``, or else that of the coarsest step.

    Payloads shrink as steps grow, though not strictly: a finer step that fits may be missed, but what is
    returned is never above the budget where the coarsest step's payload is not.

    Args:
        encoded: the payload of a step, in units of the delta's rms.
        budget_bytes: of the payload; one of 0 bytes is met by none.
        guess: the first step tried.
    """
    place = min(max(round(log2(guess) * _PER_OCTAVE), _FINEST), _COARSEST)
    too_fine, fitting = _FINEST - 1, _COARSEST + 1
    too_many, best = 0, b""
    stride = _PER_OCTAVE // 2
    interpolate = True
    while fitting - too_fine > 1 and not _CLOSE * budget_bytes <= len(best) > 0:
        payload = encoded(2.0 ** (place / _PER_OCTAVE))
        if len(payload) <= budget_bytes:
            fitting, best = place, payload
        elif place == _COARSEST:
            return payload
        else:
            too_fine, too_many = place, len(payload)
        # From the guess outwards, ever faster, until there is a step on both sides of the budget.
        stride *= 2
        if fitting > _COARSEST:
            place = min(too_fine + stride, _COARSEST)
        elif too_fine < _FINEST:
            place = max(fitting - stride, _FINEST)
        else:
            share = log(too_many / budget_bytes) / log(too_many / len(best)) if interpolate else 0.5
            place = too_fine + round(share * (fitting - too_fine))
            place = min(max(place, too_fine + 1), fitting - 1)
            interpolate = not interpolate  # halves in between: an interpolation can stay at one side
    return best
