"""Updates that must not count, each with the reason its sender is told. One table for every test of them.

A case is a function of a ``Forger`` that gives the messages to publish on the forger's ``up`` topic. The
forger is enrolled, knows the plan and the published base, and so can be wrong in one way at a time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
import msgspec
import numpy as np

from fedtide.wire import codecs, frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.envelope import MaskScheme, UpdateHeader, UpdateId, seal_update, update_digest
from fedtide.wire.ids import DeviceId, FleetId, PlanId
from fedtide.wire.messages import Reason, UpdateChunk
from fedtide.wire.parameters import Schema
from fedtide.wire.signatures import SigningKey


@dataclass(frozen=True)
class Forger:
    """What an enrolled device knows, and the counter it is going to use."""

    fleet: FleetId
    plan: PlanId
    schema: Schema
    device: DeviceId
    key: SigningKey
    base_version: int
    base_sha256: bytes
    counter: int

    def payload(self, value=1e-3):
        return codecs.get("float32").encode(np.full(self.schema.size, value, np.float32), self.schema)

    def header(self, payload, **changes):
        header = UpdateHeader(
            fleet=self.fleet,
            plan=self.plan,
            device=self.device,
            counter=self.counter,
            base_version=self.base_version,
            base_sha256=self.base_sha256,
            codec="float32",
            num_examples=5,
            local_steps=1,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).digest(),
        )
        return msgspec.structs.replace(header, **changes)

    def envelope(self, payload=None, *, key=None, **changes):
        """A signed envelope, honest but for the changes."""
        payload = self.payload() if payload is None else payload
        return seal_update(self.header(payload, **changes), payload, key or self.key)

    def chunks(self, envelope, counter=None):
        return update_chunks(envelope, self.counter if counter is None else counter, MAX_CHUNK_BYTES)

    def chunk(self, **changes):
        """One chunk that claims to be all of an envelope of four bytes."""
        values = {
            "index": 0,
            "count": 1,
            "size_bytes": 4,
            "content": b"junk",
            "digest": update_digest(b"junk"),
        }
        return frame.to_frame(UpdateChunk(counter=self.counter, **{**values, **changes}))


@dataclass(frozen=True)
class Case:
    """One way to be wrong.

    Attributes:
        name: says what is wrong.
        reason: what it is counted as.
        messages: to publish, given a forger.
        receipt: whether the device is told; not where the bytes may have been damaged on the way, because the
            device then sends the same update again.
    """

    name: str
    reason: Reason
    messages: Callable[[Forger], list[bytes]]
    receipt: bool = True


def _altered(forger, **changes):
    return forger.chunks(forger.envelope(**changes))


def _with_payload(payload_of, **changes):
    return lambda forger: forger.chunks(forger.envelope(payload_of(forger), **changes))


def _with_value(value):
    return _with_payload(lambda forger: np.full(forger.schema.size, value, "<f4").tobytes())


def _reassembled(forger, change):
    """The envelope's three parts, changed after they were signed."""
    version, parts = forger.envelope()[:1], msgpack.unpackb(forger.envelope()[1:])
    return forger.chunks(version + msgpack.packb(change(parts)))


def _flipped(content, place=0):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _header_with(forger, **fields):
    """A signed header with fields that ``UpdateHeader`` itself would not hold."""
    payload = forger.payload()
    short = dict(zip(UpdateHeader.__struct_fields__, UpdateHeader.__struct_encode_fields__, strict=True))
    changes = {short.get(name, name): value for name, value in fields.items()}
    signed = msgpack.packb({**msgspec.to_builtins(forger.header(payload), builtin_types=(bytes,)), **changes})
    signature = forger.key.sign(b"fedtide/1/update\0", signed)
    return forger.chunks(b"\x01" + msgpack.packb([signed, signature, payload]))


def _q8_with_endless_scale(forger):
    payload = bytearray(codecs.get("q8").encode(np.ones(forger.schema.size, np.float32), forger.schema))
    payload[:4] = np.array(np.inf, "<f4").tobytes()
    return forger.chunks(forger.envelope(bytes(payload), codec="q8"))


def _endless_header(forger):
    """One byte above the 8 KiB that a header may have."""
    spare = 8 * 1024 - len(frame.pack(forger.header(b"", metrics={"m" * 4096: 0.0})))
    return forger.chunks(forger.envelope(b"", metrics={"m" * (4096 + spare + 1): 0.0}))


def _too_many_bytes(forger):
    size_bytes = 10 * len(forger.envelope()) + 100_000
    return [forger.chunk(size_bytes=size_bytes, count=2)]


MALFORMED, NOT_FINITE, BASE = Reason.MALFORMED, Reason.NOT_FINITE, Reason.UNKNOWN_BASE

CASES = (
    Case("nothing at all", MALFORMED, lambda _: [b""]),
    Case("noise", MALFORMED, lambda _: [b"\x01" + bytes(range(256))]),
    Case("a truncated chunk", MALFORMED, lambda f: [f.chunks(f.envelope())[0][:-7]]),
    Case("a chunk with bytes behind it", MALFORMED, lambda f: [f.chunks(f.envelope())[0] + b"\0"]),
    Case("a chunk of another protocol version", Reason.UNSUPPORTED_VERSION, lambda _: [b"\x02\x80"]),
    Case("a chunk above the size of chunks", Reason.TOO_LARGE, lambda f: [f.chunk(content=bytes(130_000))]),
    Case("an envelope above the size of envelopes", Reason.TOO_LARGE, _too_many_bytes),
    Case("a chunk beyond its count", MALFORMED, lambda f: [f.chunk(index=2, count=2)]),
    Case("a chunk before the first", MALFORMED, lambda f: [f.chunk(index=-1)]),
    Case("more chunks than bytes", MALFORMED, lambda f: [f.chunk(count=5)]),
    Case("chunks that do not add up", MALFORMED, lambda f: [f.chunk(content=b"junk ")], receipt=False),
    Case("a digest of other bytes", MALFORMED, lambda f: [f.chunk(digest=bytes(32))], receipt=False),
    Case("a digest that is none", MALFORMED, lambda f: [f.chunk(digest=bytes(100_000), count=2)]),
    Case("a chunk without content", MALFORMED,
         lambda f: [f.chunk(content=b"", count=2, size_bytes=4000)]),
    Case("crumbs", MALFORMED, lambda f: [f.chunk(content=b"j", count=9, size_bytes=4000)]),
    Case("an envelope that is none", MALFORMED, lambda f: f.chunks(b"\x01junk")),
    Case("an empty envelope", MALFORMED, lambda f: f.chunks(b"")),
    Case("a truncated envelope", MALFORMED, lambda f: f.chunks(f.envelope()[:-1])),
    Case("an envelope with a fourth part", MALFORMED, lambda f: _reassembled(f, lambda p: [*p, b""])),
    Case("a short signature", MALFORMED, lambda f: _reassembled(f, lambda p: [p[0], p[1][:63], p[2]])),
    Case("a header that is none", MALFORMED, lambda f: _reassembled(f, lambda p: [b"\xc1", p[1], p[2]])),
    Case("an endless header", MALFORMED, _endless_header),
    Case("a negative counter", MALFORMED, lambda f: _header_with(f, counter=-1)),
    Case("a base version beyond 63 bits", MALFORMED, lambda f: _header_with(f, base_version=2**63)),
    Case("a number of examples in words", MALFORMED, lambda f: _header_with(f, num_examples="many")),
    Case("an envelope of another version", Reason.UNSUPPORTED_VERSION,
         lambda f: f.chunks(b"\x02" + f.envelope()[1:])),
    Case("a flipped payload", MALFORMED,
         lambda f: _reassembled(f, lambda p: [p[0], p[1], _flipped(p[2])]), receipt=False),
    Case("a shortened payload", MALFORMED,
         lambda f: _reassembled(f, lambda p: [p[0], p[1], p[2][:-4]]), receipt=False),
    Case("a flipped signature", Reason.BAD_SIGNATURE,
         lambda f: _reassembled(f, lambda p: [p[0], _flipped(p[1]), p[2]])),
    Case("a forged signature", Reason.BAD_SIGNATURE, lambda f: _altered(f, key=SigningKey.generate())),
    Case("another device in the header", Reason.WRONG_DEVICE, lambda f: _altered(f, device="somebody-else")),
    Case("another counter in the chunk", Reason.WRONG_DEVICE,
         lambda f: f.chunks(f.envelope(), f.counter + 1000)),
    Case("another fleet", Reason.WRONG_FLEET, lambda f: _altered(f, fleet="valves")),
    Case("another plan", Reason.UNKNOWN_PLAN, lambda f: _altered(f, plan="0" * 32)),
    Case("a masked payload", Reason.UNSUPPORTED_FIELD,
         lambda f: _altered(f, mask=MaskScheme(id="pairs", sealed_seed=b"seed"))),
    Case("a sum of updates", Reason.UNSUPPORTED_FIELD,
         lambda f: _altered(f, inner=(UpdateId(device="somebody", counter=1),))),
    Case("an unknown codec", Reason.UNKNOWN_CODEC, lambda f: _altered(f, codec="zip")),
    Case("no examples", MALFORMED, lambda f: _altered(f, num_examples=0)),
    Case("a version of the future", Reason.FUTURE_VERSION, lambda f: _altered(f, base_version=10**6)),
    Case("other base parameters", BASE, lambda f: _altered(f, base_sha256=bytes(32))),
    Case("the payload of a smaller plan", Reason.WRONG_SHAPE, _with_payload(lambda f: f.payload()[:-4])),
    Case("the payload of a larger plan", Reason.WRONG_SHAPE, _with_payload(lambda f: f.payload() + bytes(4))),
    Case("an empty payload", Reason.WRONG_SHAPE, _with_payload(lambda _: b"")),
    Case("another codec's payload", Reason.WRONG_SHAPE, _with_payload(Forger.payload, codec="q8")),
    Case("not a number", NOT_FINITE, _with_value(np.nan)),
    Case("infinity", NOT_FINITE, _with_value(np.inf)),
    Case("a scale without end", NOT_FINITE, _q8_with_endless_scale),
)  # fmt: skip
"""What an enrolled device can get wrong at any moment. Not here, because they need a history or a stranger:
``UNKNOWN_DEVICE``, ``REPLAYED_COUNTER``, ``TOO_STALE``, ``TOO_MANY``, ``STOPPED``; nor ``UNREADABLE``, which
needs a fault of ours."""

NEED_A_HISTORY = {
    Reason.UNKNOWN_DEVICE,
    Reason.REPLAYED_COUNTER,
    Reason.TOO_STALE,
    Reason.TOO_MANY,
    Reason.STOPPED,
    Reason.UNREADABLE,
}


def names(case):
    return case.name.replace(" ", "-")
