"""Whole numbers of a schema's tensors on power-of-two grids, without loss: what a published model is made of.

A parameter is integer × 2^exponent, with one exponent per tensor.

    payload = for each tensor: exponent, shift | tensors
    exponent = 1 (as of the tensor before) | 0, exponent + 60 (7 bits)
    shift    = 1 (as of the tensor before) | 0, shift (5 bits)

A tensor's coefficients are its integers over 2^shift, which divides them all, encoded by
:mod:`matrix_contexts`.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.matrix_contexts import TensorReader, encode_tensors
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, Vector

FINEST_EXPONENT: Final = -60
COARSEST_EXPONENT: Final = 20
LARGEST: Final = 2**24 - 1
"""Of the integers' magnitudes: float32 holds every one of them exactly."""

Integers = npt.NDArray[np.int32]

_EXPONENT_BITS: Final = 7
_SHIFT_BITS: Final = 5
_LARGEST_SHIFT: Final = 23
"""2^23 is the highest power of two up to ``LARGEST``."""


def max_grid_bytes(schema: Schema) -> int:
    """The longest payload that is made or accepted for ``schema``, in bytes."""
    return 5 * schema.size + 32 * len(schema.tensors) + 64


def encode_grid(values: Integers, exponents: Sequence[int], schema: Schema) -> bytes:
    """Encode int32 of shape ``(schema.size,)`` with one exponent per tensor.

    Raises:
        ValueError: another shape or dtype, a magnitude above ``LARGEST``, another number of exponents than
            tensors, or an exponent out of range.
    """
    _check(values, exponents, schema)
    header = BitWriter()
    coefficients: list[Integers] = []
    exponent_before, shift_before = 0, 0
    for exponent, (_, place) in zip(exponents, schema.slices(), strict=True):
        shift = _common_shift(values[place], shift_before)
        _put_changed(header, exponent - FINEST_EXPONENT, exponent_before - FINEST_EXPONENT, _EXPONENT_BITS)
        _put_changed(header, shift, shift_before, _SHIFT_BITS)
        coefficients.append(values[place] >> shift)
        exponent_before, shift_before = exponent, shift
    return encode_tensors(coefficients, schema, header)


def decode_grid(payload: bytes | memoryview, schema: Schema) -> tuple[Integers, tuple[int, ...]]:
    """The integers, new and writeable, and the exponents of their tensors.

    Raises:
        MalformedPayload: anything is wrong with the payload.
    """
    payload = memoryview(payload).cast("B")
    if payload.nbytes > max_grid_bytes(schema):
        raise MalformedPayload(
            f"a grid of {payload.nbytes:,} bytes; this plan's takes at most {max_grid_bytes(schema):,}"
        )
    header = BitReader(payload)
    exponents, shifts = [0], [0]
    for _ in schema.tensors:
        exponents.append(
            FINEST_EXPONENT + _get_changed(header, exponents[-1] - FINEST_EXPONENT, _EXPONENT_BITS)
        )
        shifts.append(_get_changed(header, shifts[-1], _SHIFT_BITS))
    if max(exponents) > COARSEST_EXPONENT or max(shifts) > _LARGEST_SHIFT:
        raise MalformedPayload(
            f"a grid's exponent {max(exponents)} and shift {max(shifts)}; "
            f"they must be up to {COARSEST_EXPONENT} and {_LARGEST_SHIFT}"
        )
    reader = TensorReader(header, schema)
    values = np.empty(schema.size, np.int32)
    reader.read(values)
    for shift, (_, place) in zip(shifts[1:], schema.slices(), strict=True):
        _shift(values[place], shift)
    return values, tuple(exponents[1:])


def grid_parameters(values: Integers, exponents: Sequence[int], schema: Schema) -> Vector:
    """Float32 of shape ``(schema.size,)``: integer × 2^exponent, exact, so equal to the bit everywhere.

    Raises:
        ValueError: as :func:`encode_grid`.
    """
    _check(values, exponents, schema)
    parameters = values.astype(np.float32)
    for exponent, (_, place) in zip(exponents, schema.slices(), strict=True):
        parameters[place] *= np.float32(2.0**exponent)
    return parameters


def decode_grid_parameters(payload: bytes | memoryview, schema: Schema) -> Vector:
    """:func:`decode_grid` and :func:`grid_parameters` in one.

    Raises:
        MalformedPayload: anything is wrong with the payload.
    """
    return grid_parameters(*decode_grid(payload, schema), schema)


def _check(values: Integers, exponents: Sequence[int], schema: Schema) -> None:
    if values.shape != (schema.size,) or values.dtype != np.int32:
        raise ValueError(f"a grid of {values.dtype} {values.shape}; this plan needs int32 {(schema.size,)}")
    if values.size and not -LARGEST <= int(values.min()) <= int(values.max()) <= LARGEST:
        raise ValueError(
            f"integers from {values.min()} to {values.max()}; magnitudes may be up to {LARGEST:,}"
        )
    if len(exponents) != len(schema.tensors):
        raise ValueError(f"{len(exponents)} exponents; this plan has {len(schema.tensors)} tensors")
    for exponent in exponents:
        if not FINEST_EXPONENT <= exponent <= COARSEST_EXPONENT:
            raise ValueError(
                f"an exponent of {exponent}; it must be from {FINEST_EXPONENT} to {COARSEST_EXPONENT}"
            )


def _common_shift(values: Integers, shift_of_zeros: int) -> int:
    """The highest power of two that divides all the integers; zeros have any."""
    union = int(np.bitwise_or.reduce(values))  # of two's complements: the lowest bits are those of magnitudes
    return (union & -union).bit_length() - 1 if union else shift_of_zeros


def _shift(coefficients: Integers, shift: int) -> None:
    """Multiply the coefficients by 2^shift.

    Raises:
        MalformedPayload: one is above ``LARGEST`` then.
    """
    peak = max(int(coefficients.max(initial=0)), -int(coefficients.min(initial=0))) << shift
    if peak > LARGEST:
        raise MalformedPayload(f"an integer of magnitude {peak:,} in a grid; at most {LARGEST:,} is allowed")
    coefficients <<= shift


def _put_changed(header: BitWriter, value: int, before: int, width: int) -> None:
    header.put(value == before, 1)
    if value != before:
        header.put(value, width)


def _get_changed(header: BitReader, before: int, width: int) -> int:
    return before if header.get(1) else header.get(width)
