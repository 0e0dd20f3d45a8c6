"""What the encoder does with one matrix: a truncated singular value decomposition, deterministic.

Source: Halko, Martinsson, Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithm 4.4
(subspace iteration); with fixed signs in place of random numbers, so that a delta has one encoding.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_NARROW: Final = 64
"""Rows or columns up to which the Gram matrix's eigenvectors are cheaper than an iteration."""
_SPARE: Final = 4
"""Directions beyond those asked for: they make the last of those accurate."""
_NOISE: Final = 1e-10
"""Of the largest eigenvalue of a Gram matrix: what is below is rounding."""


@dataclass(frozen=True)
class Decomposition:
    """Σ_k s_k u_k v_kᵀ, the s_k descending.

    Attributes:
        left: u_k, float32, shape ``(components, rows)``.
        values: s_k, float64, shape ``(components,)``.
        right: v_k, float32, shape ``(components, columns)``.
        complete: whether that is all of the matrix.
    """

    left: Floats
    values: npt.NDArray[np.float64]
    right: Floats
    complete: bool


def decompose(matrix: Floats, components: int) -> Decomposition:
    """The leading components of a matrix, all of them if it is narrow.

    Args:
        matrix: float32, shape ``(rows, columns)``, magnitudes of about 1.
        components: how many.
    """
    rows, columns = matrix.shape
    if min(rows, columns) > max(_NARROW, components + _SPARE):
        return _within(matrix, _leading_directions(matrix, components + _SPARE), components)
    if columns <= rows:
        return _within(matrix, None, components)
    turned = _within(matrix.T, None, components)
    return Decomposition(turned.right, turned.values, turned.left, turned.complete)


def _within(matrix: Floats, basis: Floats | None, components: int) -> Decomposition:
    """The leading components of a matrix times the projection onto the span of an orthonormal basis.

    Args:
        matrix: float32, shape ``(rows, columns)``.
        basis: shape ``(columns, directions)``, or None: all of the space.
        components: how many.
    """
    projected = matrix if basis is None else matrix @ basis
    squares, directions = np.linalg.eigh((projected.T @ projected).astype(np.float64))
    nonzero = int((squares > _NOISE * squares.max(initial=0)).sum())
    used = slice(-1, -1 - min(nonzero, components), -1)
    squares, directions = squares[used], directions[:, used].astype(np.float32)
    values = np.sqrt(squares)
    left = (directions * (1 / values).astype(np.float32)).T @ projected.T
    right = directions.T if basis is None else directions.T @ basis.T
    return Decomposition(left, values, right, basis is None and nonzero <= components)


def _leading_directions(matrix: Floats, count: int) -> Floats:
    """About the span of the leading right singular vectors, shape ``(columns, count)``."""
    directions = _orthonormal(matrix @ _signs(matrix.shape[1], count))
    return _orthonormal(matrix.T @ directions)


def _orthonormal(vectors: Floats) -> Floats:
    """An orthonormal basis of the columns' span."""
    squares, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    used = squares > _NOISE * squares.max(initial=0)
    directions = directions[:, used] / np.sqrt(squares[used])
    basis: Floats = vectors @ directions.astype(np.float32)
    return basis


@lru_cache(maxsize=8)
def _signs(rows: int, columns: int) -> Floats:
    """Ones and minus ones without a pattern: one bit of a multiplicative hash of the place."""
    hashed = np.arange(1, rows * columns + 1, dtype=np.uint32) * np.uint32(2654435761)
    hashed ^= hashed >> np.uint32(15)
    hashed *= np.uint32(2246822519)
    signs = 1 - 2 * (hashed >> np.uint32(31)).astype(np.float32)
    return signs.reshape(rows, columns).astype(np.float32)
