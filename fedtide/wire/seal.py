"""Sealed messages: a frame that holds a packed message and a signature over it, bound to a domain."""

from typing import Any, TypeVar

import msgpack

from fedtide.wire import frame
from fedtide.wire.errors import MalformedFrame
from fedtide.wire.frame import MAX_MESSAGE_BYTES, Message
from fedtide.wire.signatures import PublicKey, SigningKey

M = TypeVar("M", bound=Message)


def seal(message: Message, key: SigningKey, domain: bytes) -> bytes:
    """Version byte, then [packed message, signature]."""
    packed = frame.pack(message)
    parts = [packed, key.sign(domain, packed)]
    return bytes((frame.PROTOCOL_VERSION,)) + bytes(msgpack.packb(parts, use_bin_type=True))


def unseal(sealed: bytes, kind: type[M], key: PublicKey, domain: bytes) -> M:
    """Check the signature, then decode.

    Raises:
        WireError: too large, malformed, another version, or not signed by ``key`` for ``domain``.
    """
    return frame.unpack(verified(sealed, key, domain), kind)


def unseal_any(sealed: bytes, kinds: Any, key: PublicKey, domain: bytes) -> Message:
    """The same for a union of tagged messages.

    Raises:
        WireError: as :func:`unseal`; an unknown tag is a ``MalformedFrame`` that names the known ones.
    """
    return frame.unpack_any(verified(sealed, key, domain), kinds)


def verified(sealed: bytes, key: PublicKey, domain: bytes) -> bytes:
    """The packed message inside, once its signature is checked.

    Raises:
        WireError: as :func:`unseal`.
    """
    content = frame.strip_version(sealed, MAX_MESSAGE_BYTES)
    try:
        packed, signature = frame.unpack_byte_strings(content, tuple[bytes, bytes])
    except MalformedFrame as error:
        raise MalformedFrame(
            f"a sealed message is two byte strings, message and signature: {error}"
        ) from error
    key.verify(domain, packed, signature)
    return packed
