"""Frames: one version byte, then a msgpack map. Sizes are checked before anything is parsed.

Messages are frozen structs. Unknown fields pass, so that an old coordinator survives a newer device; an
unknown version is refused with a reason. Correctness never depends on MQTT 5 properties, only on these bytes.
"""

import re
from typing import Any, Final, TypeVar, get_args

import msgpack
import msgspec

from fedtide.wire.errors import FrameTooLarge, MalformedFrame, UnsupportedVersion

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 64 * 1024
"""Control messages are a few hundred bytes; a signed head with many deltas is a few KB."""

_FIELD: Final = re.compile(r"(`\$\.|field `)(\w+)")  # as msgspec's error texts name one

M = TypeVar("M", bound="Message")
P = TypeVar("P", bound=tuple[bytes, ...])


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that travels: an immutable record with named, typed fields."""


def pack(message: Message) -> bytes:
    """Encode a message as a msgpack map, fields in declaration order: always the same bytes."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)), use_bin_type=True)
    return packed


def unpack(packed: bytes | memoryview, kind: type[M]) -> M:
    """Decode what :func:`pack` made, straight into the fields: what no field takes is never built.

    A byte of msgpack can be an object of 64 bytes, and strangers send such bytes by the hundred thousand.

    Raises:
        MalformedFrame: not msgpack, trailing bytes, or not the fields of ``kind``; the text names the field.
    """
    try:
        return msgspec.msgpack.decode(packed, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"not a {kind.__name__}: {_in_full(str(error), kind)}") from error


def unpack_builtins(packed: bytes | memoryview) -> Any:
    """Decode msgpack into plain Python values: for files of our own, since they take far more than the bytes.

    Raises:
        MalformedFrame: not msgpack, an extension type, or trailing bytes.
    """
    try:
        return msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own exceptions are ValueErrors
        raise MalformedFrame(f"not a msgpack frame: {error}") from error


def _in_full(text: str, kind: type[Message]) -> str:
    """An error text with the field's own name where it has a short one on the wire."""
    names = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
    return _FIELD.sub(lambda found: found[1] + names.get(found[2], found[2]), text)


def unpack_any(packed: bytes | memoryview, kinds: Any) -> Message:
    """Decode one message of a union of tagged ones.

    Raises:
        MalformedFrame: as :func:`unpack`; for an unknown tag the text names the known kinds.
    """
    try:
        message: Message = msgspec.msgpack.decode(packed, type=kinds)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        names = ", ".join(kind.__name__ for kind in get_args(kinds))
        raise MalformedFrame(f"none of {names}: {error}") from error
    return message


def unpack_byte_strings(packed: bytes | memoryview, shape: type[P]) -> P:
    """Decode an array of byte strings, stopping at the first element that is something else.

    For large input from strangers: a million empty maps, one byte each, would become a million objects.

    Args:
        packed: msgpack.
        shape: for example ``tuple[bytes, bytes]``.

    Raises:
        MalformedFrame: not msgpack, trailing bytes, or not exactly these byte strings.
    """
    try:
        return msgspec.msgpack.decode(packed, type=shape)
    except msgspec.DecodeError as error:
        raise MalformedFrame(str(error)) from error


def to_frame(message: Message) -> bytes:
    """Put the version byte before the packed message."""
    return bytes((PROTOCOL_VERSION,)) + pack(message)


def strip_version(frame: bytes, max_bytes: int) -> memoryview:
    """Check a frame's size and version byte and return what follows, without copying.

    Raises:
        FrameTooLarge: more than ``max_bytes``.
        MalformedFrame: empty.
        UnsupportedVersion: the version byte is not ours.
    """
    if len(frame) > max_bytes:
        raise FrameTooLarge(len(frame), max_bytes)
    if not frame:
        raise MalformedFrame("an empty frame")
    if frame[0] != PROTOCOL_VERSION:
        raise UnsupportedVersion(frame[0], (PROTOCOL_VERSION,))
    return memoryview(frame)[1:]


def from_frame(frame: bytes, kind: type[M], max_bytes: int = MAX_MESSAGE_BYTES) -> M:
    """Decode a whole frame.

    Raises:
        WireError: any of the ways in which the bytes are not a frame of ``kind``.
    """
    return unpack(strip_version(frame, max_bytes), kind)


def from_frame_any(frame: bytes, kinds: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Decode a whole frame of a union of tagged messages.

    Raises:
        WireError: any of the ways in which the bytes are not a frame of one of ``kinds``.
    """
    return unpack_any(strip_version(frame, max_bytes), kinds)
