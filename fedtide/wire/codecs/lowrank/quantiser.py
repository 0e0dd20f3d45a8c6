"""How many components of each matrix are encoded, with which entries: those that pay, see ``costs``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.lowrank.contexts import Classes, Integers, Predictor, waves
from fedtide.wire.codecs.lowrank.costs import MORE_BITS, ONE_BITS, PRICE, ZERO_BITS
from fedtide.wire.codecs.lowrank.factors import Decomposition, Floats
from fedtide.wire.codecs.lowrank.layout import LARGEST_EXPONENT, LARGEST_FACTOR, Place
from fedtide.wire.codecs.lowrank.products import ALONG, NO_TRANSFORM, prior_of, transform

_COMPONENT_BITS: Final = 4
"""What a component adds to the headers."""
_SMALLEST_VALUE: Final = 1.5
"""Of a singular value that is worth a look, in steps: its square, the error it saves, pays for 19 bits."""
_LEADING: Final = 4
"""Vectors of a matrix that its transform is chosen by."""
_SMOOTH: Final = 0.2
"""Correlation of neighbours from which on a transform is worth a look."""
_FIRST_BITS: Final = ONE_BITS - MORE_BITS - ZERO_BITS
"""What a nonzero costs beyond a zero, less its magnitude times what each unit costs."""
_OFFSETS: Final = (0.5 - PRICE / 2 * np.minimum(MORE_BITS, 3)).astype(np.float32)
"""Added to magnitudes before they are cut to whole numbers."""
_THRESHOLDS: Final = np.maximum(0.5 + PRICE / 2 * (ONE_BITS - ZERO_BITS), 0.5).astype(np.float32)
"""Magnitudes below become 0: x² - (x - 1)² = 2x - 1 is what a 1 saves."""


@dataclass(frozen=True)
class QuantisedMatrix:
    """Quantised factors.

    Attributes:
        exponents: of the components.
        kind: of the transform.
        entries: the a_k and, behind each, the transformed b_k: int32, shape ``(rank, rows + columns)``.
        classes: of the entries, same shape.
        profit: error² saved, less the price of the bits.
    """

    exponents: tuple[int, ...]
    kind: int
    entries: Integers
    classes: Classes
    profit: float


@dataclass(frozen=True)
class _Factors:
    """A matrix's factors as real numbers, to be rounded: a component's square is its energy, times 2^e_k.

    Attributes:
        place: the matrix's.
        kind: of the transform.
        exponents: of the components.
        vectors: left ones and, behind each, the transformed right one: shape ``(rank, rows + columns)``.
    """

    place: Place
    kind: int
    exponents: Integers
    vectors: Floats


def quantise_factors(
    matrices: Sequence[tuple[Place, Decomposition]], step: float
) -> list[QuantisedMatrix | None]:
    """Quantise as many components of each matrix as pay; None where none does.

    All matrices are worked on at once: most of them are so small that calls cost more than numbers.

    Args:
        matrices: with their decompositions.
        step: in the matrices' units.
    """
    factors = [_factors_of(place, decomposition, step) for place, decomposition in matrices]
    order = sorted(range(len(factors)), key=lambda number: -len(factors[number].exponents))
    ranked = [factors[number] for number in order if factors[number].exponents.size]
    quantised: list[QuantisedMatrix | None] = [None] * len(matrices)
    for number, matrix in zip(order, _all_quantised(ranked), strict=False):
        quantised[number] = matrix
    return quantised


def _factors_of(place: Place, decomposition: Decomposition, step: float) -> _Factors:
    values = decomposition.values / step
    rank = min(int((values > _SMALLEST_VALUE).sum()), place.widest_rank)
    values = values[:rank]
    exponents = np.minimum(np.maximum(np.rint(np.log2(values)), 0), LARGEST_EXPONENT).astype(np.int32)
    norms = np.sqrt(values * np.exp2(exponents)).astype(np.float32)[:, None]
    right = decomposition.right[:rank] * norms
    kind, right = _best_transform(right, place)
    vectors = np.concatenate([decomposition.left[:rank] * norms, right], axis=1)
    return _Factors(place, kind, exponents, vectors)


def _all_quantised(matrices: Sequence[_Factors]) -> list[QuantisedMatrix | None]:
    """The same, of matrices of descending rank, from 1 on."""
    if not matrices:
        return []
    lengths = [length for each in matrices for length in (each.place.rows, each.place.columns)]
    predictor = Predictor(lengths, np.concatenate([prior_of(each.place, each.kind) for each in matrices]))
    ends = [0, *accumulate(each.vectors.shape[1] for each in matrices)]
    kept = [_Kept() for _ in matrices]
    for wave in waves(len(matrices[0].exponents)):
        having = sum(len(each.exponents) > wave.start for each in matrices)
        vectors = np.zeros((wave.stop - wave.start, ends[having]), np.float32)
        exponents = np.zeros((len(vectors), having), np.int32)
        for number, each in enumerate(matrices[:having]):
            rank = len(each.exponents[wave])
            vectors[:rank, ends[number] : ends[number + 1]] = each.vectors[wave]
            exponents[:rank, number] = each.exponents[wave]
        classes = predictor.classes(exponents.repeat(2, axis=1))
        entries, profits = _quantised(vectors, classes, exponents, predictor.starts[: 2 * having])
        for number, chosen in enumerate(kept[:having]):
            own = slice(ends[number], ends[number + 1])
            chosen.take(exponents[:, number], entries[:, own], classes[:, own], profits[:, number])
        if all(chosen.is_done for chosen in kept[:having]):
            break
        predictor.learn(entries)
    return [chosen.matrix(each.kind) for chosen, each in zip(kept, matrices, strict=True)]


class _Kept:
    """The components of a matrix that pay: up to the first wave with one that does not."""

    def __init__(self) -> None:
        self.is_done = False
        self._exponents: list[int] = []
        self._entries: list[Integers] = []
        self._classes: list[Classes] = []
        self._profit = 0.0

    def take(
        self, exponents: Integers, entries: Integers, classes: Classes, profits: npt.NDArray[np.float64]
    ) -> None:
        """Take those of a wave's components that pay."""
        if self.is_done:
            return
        pays = profits > 0
        self._exponents += exponents[pays].tolist()
        self._entries.append(entries[pays])
        self._classes.append(classes[pays])
        self._profit += float(profits[pays].sum())
        self.is_done = not pays.all()

    def matrix(self, kind: int) -> QuantisedMatrix | None:
        """All that was kept."""
        if not self._exponents:
            return None
        entries, classes = np.concatenate(self._entries), np.concatenate(self._classes)
        return QuantisedMatrix(tuple(self._exponents), kind, entries, classes, self._profit)


def _best_transform(vectors: Floats, place: Place) -> tuple[int, Floats]:
    """The transform after which the leading vectors are cheapest, by a rough measure, and all after it."""
    joined = vectors[:_LEADING].reshape(-1)
    smooth = _SMOOTH * float(joined @ joined)
    kinds = [kind for kind in (ALONG, *place.widths) if joined[:-kind] @ joined[kind:] > smooth]
    best, best_vectors = NO_TRANSFORM, vectors
    best_bits = _rough_bits(vectors) if kinds else 0.0
    for kind in kinds:
        transformed = transform(vectors, kind)
        bits = _rough_bits(transformed) * 1.02 + 8
        if bits < best_bits:
            best, best_vectors, best_bits = kind, transformed, bits
    return best, best_vectors


def _rough_bits(vectors: Floats) -> float:
    return float(np.log2(1 + np.abs(vectors[:_LEADING])).sum())


def _quantised(
    vectors: Floats, classes: Classes, exponents: Integers, starts: npt.NDArray[np.int64]
) -> tuple[Integers, npt.NDArray[np.float64]]:
    """Entries of some components, and each one's profit in each matrix, shape ``(components, matrices)``.

    A component is left · rightᵀ 2^(−e) and orthogonal to all others, so that a · bᵀ 2^(−e) in its place saves
    (2 ⟨left, a⟩⟨right, b⟩ − |a|²|b|²) 4^(−e).
    """
    magnitudes = np.abs(vectors)
    (places,) = (magnitudes >= _THRESHOLDS.take(classes)).reshape(-1).nonzero()
    magnitudes, numbers = magnitudes.take(places), classes.take(places)
    quantised = np.floor(magnitudes + _OFFSETS.take(numbers))
    np.minimum(np.maximum(quantised, 1, out=quantised), LARGEST_FACTOR, out=quantised)
    entries = np.zeros(vectors.shape, np.int32)
    entries.reshape(-1)[places] = np.copysign(quantised, vectors.take(places))

    # Sums of each side: differences of running sums.
    sums = np.zeros((3, places.size + 1))
    np.multiply(quantised, magnitudes, out=sums[0, 1:])
    np.multiply(quantised, quantised, out=sums[1, 1:])
    np.multiply(MORE_BITS.take(numbers), quantised, out=sums[2, 1:])
    sums[2, 1:] += _FIRST_BITS.take(numbers)
    np.cumsum(sums, axis=1, out=sums)
    sides = np.arange(len(vectors))[:, None] * vectors.shape[1] + starts
    ends = places.searchsorted(np.append(sides, vectors.size))
    overlaps, squares, bits = np.diff(sums.take(ends, axis=1)).reshape(3, *exponents.shape, 2)
    saved = 2 * overlaps[..., 0] * overlaps[..., 1] - squares[..., 0] * squares[..., 1]
    zero_bits = np.add.reduceat(ZERO_BITS.take(classes), starts[::2], axis=1)
    costs = bits[..., 0] + bits[..., 1] + zero_bits + _COMPONENT_BITS
    return entries, saved * np.exp2(-2.0 * exponents) - PRICE * costs
