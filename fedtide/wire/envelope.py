"""Update envelope v1: a device's contribution as one signed message.

    version byte 0x01
    msgpack [header: bin, signature: bin 64, payload: bin]

The Ed25519 signature covers the domain string and the header's bytes; the header holds the payload's length
and SHA-256. The format cannot be changed cheaply, so fields that nothing uses yet are here already.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final

import msgpack
from msgspec import Meta

from fedtide.wire import frame
from fedtide.wire.errors import MalformedFrame, PayloadDamaged
from fedtide.wire.frame import Message
from fedtide.wire.ids import Counter, DeviceId, FleetId, ModelVersion, PlanId
from fedtide.wire.signatures import SIGNATURE_BYTES, UPDATE_DOMAIN, PublicKey, SigningKey

U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # a counter that signed 64-bit integers can hold, too
MAX_HEADER_BYTES: Final = 8 * 1024
_DIGESTED_BYTES: Final = 2 * MAX_HEADER_BYTES  # always holds the whole header and the signature
_OVERHEAD_BYTES: Final = 1 + 3 * 5 + 1 + SIGNATURE_BYTES


class UpdateId(Message, frozen=True, kw_only=True):
    """Names an update: one device's counter."""

    device: DeviceId
    counter: Counter


class MaskScheme(Message, frozen=True, kw_only=True):
    """How a payload is masked for secure aggregation; reserved, version 1 coordinators reject it."""

    id: str
    sealed_seed: bytes


_SHORT: Final = {
    "fleet": "f",
    "plan": "p",
    "device": "d",
    "counter": "n",
    "base_version": "bv",
    "base_sha256": "bs",
    "codec": "c",
    "codec_parameters": "cp",
    "num_examples": "ex",
    "local_steps": "st",
    "metrics": "m",
    "payload_bytes": "pb",
    "payload_sha256": "ps",
    "mask": "mk",
    "inner": "in",
    "created": "t",
}
"""Names on the wire: written out, they would take as many bytes as a small payload."""


class UpdateHeader(Message, frozen=True, kw_only=True, omit_defaults=True, rename=_SHORT):
    """What an update is about. On the wire fields have short names, and those at their default are left out.

    Attributes:
        fleet: which fleet.
        plan: id of the training plan the delta belongs to.
        device: who trained.
        counter: monotone per device.
        base_version: the model version the device started from.
        base_sha256: fingerprint of that version's parameters.
        codec: id of the payload's codec.
        codec_parameters: the codec's own parameters by name.
        num_examples: labelled examples trained on in one epoch.
        local_steps: optimizer steps done.
        metrics: of the local training, by name.
        payload_bytes: length of the payload.
        payload_sha256: its hash.
        mask: how the payload is masked; None.
        inner: ids of the updates summed in this one, for hierarchical aggregation; empty.
        created: seconds since 1970 on the device's clock; advisory, never used for a decision.
    """

    fleet: FleetId
    plan: PlanId
    device: DeviceId
    counter: Annotated[Counter, Meta(ge=0, le=2**63 - 1)]
    base_version: Annotated[ModelVersion, Meta(ge=0, le=2**63 - 1)]
    base_sha256: bytes
    codec: str
    codec_parameters: dict[str, float] = {}
    num_examples: U64
    local_steps: U64
    metrics: dict[str, float] = {}
    payload_bytes: U64
    payload_sha256: bytes
    mask: MaskScheme | None = None
    inner: tuple[UpdateId, ...] = ()
    created: float = 0.0


@dataclass(frozen=True)
class Envelope:
    """An opened envelope whose signature has not been checked yet: the key depends on the header's device."""

    header: UpdateHeader
    signed: bytes
    """The header's exact bytes."""
    signature: bytes
    payload: bytes

    def verify(self, key: PublicKey) -> None:
        """Check that ``key`` signed this header.

        Raises:
            BadSignature: it did not.
        """
        key.verify(UPDATE_DOMAIN, self.signed, self.signature)


def max_envelope_bytes(max_payload_bytes: int) -> int:
    """The largest envelope that can hold a payload of this size."""
    return max_payload_bytes + MAX_HEADER_BYTES + _OVERHEAD_BYTES


def seal_update(header: UpdateHeader, payload: bytes, key: SigningKey) -> bytes:
    """Sign and assemble an envelope."""
    signed = frame.pack(header)
    parts = [signed, key.sign(UPDATE_DOMAIN, signed), payload]
    return bytes((frame.PROTOCOL_VERSION,)) + bytes(msgpack.packb(parts, use_bin_type=True))


def update_digest(envelope: bytes) -> bytes:
    """The identity of an envelope's bytes: SHA-256 of its length and its first 16 KiB.

    That covers the header, which holds the payload's SHA-256; hashing megabytes twice would buy nothing.
    A payload that does not match its header is damage in transit and never earns a receipt.
    """
    return hashlib.sha256(len(envelope).to_bytes(8, "little") + envelope[:_DIGESTED_BYTES]).digest()


def open_update(envelope: bytes, max_bytes: int) -> Envelope:
    """Take an envelope apart and check its payload's length and hash.

    Raises:
        PayloadDamaged: the payload is not the one the header was made for: damage in transit.
        WireError: too large, another version, or malformed.
    """
    content = frame.strip_version(envelope, max_bytes)
    try:
        signed, signature, payload = frame.unpack_byte_strings(content, tuple[bytes, bytes, bytes])
    except MalformedFrame as error:
        raise MalformedFrame(
            f"an envelope is three byte strings, header, signature, payload: {error}"
        ) from error
    if len(signature) != SIGNATURE_BYTES:
        raise MalformedFrame(f"a signature of {len(signature)} bytes; it has {SIGNATURE_BYTES}")
    if len(signed) > MAX_HEADER_BYTES:
        raise MalformedFrame(f"a header of {len(signed):,} bytes; at most {MAX_HEADER_BYTES:,} are accepted")
    header = frame.unpack(signed, UpdateHeader)
    if len(payload) != header.payload_bytes:
        raise PayloadDamaged(f"a payload of {len(payload):,} bytes; its header says {header.payload_bytes:,}")
    if hashlib.sha256(payload).digest() != header.payload_sha256:
        raise PayloadDamaged("the payload does not have the SHA-256 its header was signed with")
    return Envelope(header, signed, signature, payload)
