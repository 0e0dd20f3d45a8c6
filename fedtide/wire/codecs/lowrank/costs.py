"""What entries cost by class, about: for the encoder's choices.

A choice is good if it lowers error² + PRICE · bits, with the error in units of the step.
"""

from typing import Final

import numpy as np

from fedtide.wire.codecs.lowrank.contexts import MEAN_EXCESSES, MEAN_GAPS

PRICE: Final = 0.12
"""Of a bit, in squares of the step: the slope of error² over bits of a quantiser with a dead zone."""

_gaps = np.array(MEAN_GAPS)
_means = np.array(MEAN_EXCESSES)
ZERO_BITS: Final = np.log2(1 + 1 / _gaps)
ONE_BITS: Final = 1 + np.log2(1 + _gaps) + np.log2(1 + _means)
MORE_BITS: Final = np.log2(1 + 1 / _means)
"""What a zero, a magnitude of 1 (with its sign) and each further unit of magnitude cost, by class."""
