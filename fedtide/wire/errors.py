"""What a peer can do wrong. The exception's type says who is at fault.

``WireError``: the peer broke the contract; count it, acknowledge it, drop it.
Anything else that escapes is our own failure; then nothing is acknowledged and the broker delivers again.

    WireError
    ├── MalformedId
    ├── MalformedFrame
    ├── FrameTooLarge
    ├── UnsupportedVersion
    ├── BadSignature
    ├── UnknownCodec
    ├── MalformedPayload
    ├── PayloadDamaged
    └── BlobMismatch
"""


class WireError(Exception):
    """The peer broke the contract."""


class MalformedId(WireError):
    """An identifier has characters or a length that the topics cannot carry."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(
            f"{kind} id {text[:80]!r} is not allowed; use 1 to 64 of lower-case letters, digits, '_' "
            "and '-', and not 'coordinator'"
        )


class MalformedFrame(WireError):
    """Bytes that are not one of our frames."""


class FrameTooLarge(WireError):
    """A frame above the size this receiver accepts. Refused before it is parsed."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
        super().__init__(f"frame of {size_bytes:,} bytes; at most {limit_bytes:,} are accepted")


class UnsupportedVersion(WireError):
    """The sender speaks a protocol version that the receiver does not know."""

    def __init__(self, version: int, known: tuple[int, ...]) -> None:
        self.version = version
        known_text = ", ".join(str(number) for number in known) or "none"
        older = "receiver" if version > max(known, default=0) else "sender"
        super().__init__(
            f"sent in protocol version {version}; the receiver speaks {known_text}: "
            f"upgrade fedtide at the {older}"
        )


class BadSignature(WireError):
    """The signature does not match the bytes and the expected key."""


class UnknownCodec(WireError):
    """A codec id that is not in this build's table."""

    def __init__(self, codec_id: str, known: tuple[str, ...]) -> None:
        self.codec_id = codec_id
        super().__init__(f"unknown codec {codec_id[:80]!r}; this build has {', '.join(known)}")


class MalformedPayload(WireError):
    """An update's payload that its codec cannot decode to the plan's schema."""


class PayloadDamaged(WireError):
    """A payload without the length or SHA-256 its header was signed with: damaged on the way."""


class BlobMismatch(WireError):
    """A blob whose bytes do not have the announced size or SHA-256."""
