"""Everything that reads a stranger's bytes, as one table: valid bytes, how to read them, and what must hold.

A subject's ``take`` reads bytes and says whether they were accepted. Rejections of the documented type are
its business; whatever else escapes from it is a bug, and so is a broken promise (an ``AssertionError``).
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Final

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt
from forged_payloads import forged_ecsq, forged_grid, forged_lowrank
from mutations import mutated, mutated_record
from wire_samples import COORDINATOR_KEY, DEVICE_KEY, HEAD, HEADER

from fedtide.wire import frame
from fedtide.wire.chunks import Assembler, check_ref, update_chunks
from fedtide.wire.codecs import CODECS, Codec
from fedtide.wire.codecs.entropy.tokens import choice_for
from fedtide.wire.codecs.grid import LARGEST as GRID_LARGEST
from fedtide.wire.codecs.grid import (
    decode_grid,
    decode_grid_parameters,
    encode_grid,
    grid_parameters,
    max_grid_bytes,
)
from fedtide.wire.codecs.matrix_contexts import DEFAULTS as ECSQ_TABLES
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.envelope import UpdateHeader, max_envelope_bytes, open_update, seal_update
from fedtide.wire.errors import MalformedPayload, WireError
from fedtide.wire.ids import Counter, ModelVersion
from fedtide.wire.messages import BlobRef, Head, ModelDelta, UpdateChunk
from fedtide.wire.model_blob import (
    SHORT_SHA256_BYTES,
    DeltaIndex,
    IndexRow,
    ModelBlob,
    ModelFormat,
    changed_parameters,
    keyframe_parameters,
    max_keyframe_bytes,
)
from fedtide.wire.parameters import FLOAT32, Schema, TensorSpec, Vector, fingerprint
from fedtide.wire.seal import seal, unseal
from fedtide.wire.signatures import HEAD_DOMAIN

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "codecs"
CODED_SHARE: Final = 0.1
LONGEST_BLOB: Final = 1 << 20
_UNTOUCHED: Final = np.float32(7)
_PAYLOAD: Final = bytes(range(200))


def schema_of(*shapes: tuple[int, ...]) -> Schema:
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"p.{index}", dtype="float32", shape=shape) for index, shape in enumerate(shapes)
        )
    )


SMALL: Final = schema_of((6, 1, 3, 3), (6,), (12, 40), (12,), (10, 12), (10,), ())
"""683 parameters: a convolution, two matrices, biases and a scalar."""
LARGE: Final = schema_of((32, 1, 5, 5), (32,), (500, 512), (500,), (10, 500), (10,))
"""262,342 parameters, where memory is the vectors' and not that of a codec's fixed work space."""
ONE: Final = schema_of((600,))
"""The schema of the golden files."""


@dataclass(frozen=True)
class Subject:
    """One reader of a stranger's bytes.

    Attributes:
        name: for test ids.
        seeds: valid bytes.
        take: reads bytes; whether they were accepted.
        most_bytes: the configured maximum: the longest input accepted, or what it decodes to if that is more.
        forged: bytes that are wrong in one field and right in the rest, so that no hash or length hides the
            field; None where mutated seeds do as well.
        forged_share: of the bytes to try; lower where forging is slow.
        read: the same as ``take`` without checks and without vectors made before, for measuring memory.
    """

    name: str
    seeds: tuple[bytes, ...]
    take: Callable[[bytes], bool]
    most_bytes: int
    forged: Callable[[random.Random], bytes] | None = None
    read: Callable[[bytes], object] | None = None
    forged_share: float = 0.5

    def hostile(self, draw: random.Random, found: bytes | None = None) -> bytes:
        """The next bytes to try; from bytes that a fuzzer found interesting, if there are any."""
        if self.forged is not None and draw.random() < self.forged_share:
            return self.forged(draw)
        return mutated(self.seeds if found is None else (found, found, draw.choice(self.seeds)), draw)


def taken(read: Callable[[bytes], object], content: bytes) -> bool:
    """Whether it is accepted; only the peer's faults are caught."""
    try:
        read(content)
    except WireError:
        return False
    return True


# Codecs.


def deltas(schema: Schema) -> Iterator[Vector]:
    """Typical and extreme ones: low rank with outliers, dense noise, zeros, one spike, huge, tiny."""
    rng = np.random.default_rng(schema.size)
    yield _low_rank(schema, rng)
    yield (rng.standard_normal(schema.size) * 1e-3).astype(np.float32)
    yield np.zeros(schema.size, np.float32)
    spike = np.zeros(schema.size, np.float32)
    spike[schema.size // 2] = -0.5
    yield spike
    yield (rng.standard_normal(schema.size) * 1e37).astype(np.float32)
    yield (rng.standard_normal(schema.size) * 1e-38).astype(np.float32)


def _low_rank(schema: Schema, rng: np.random.Generator) -> Vector:
    delta = rng.laplace(0, 1e-5, schema.size)
    for tensor, place in schema.slices():
        rows = tensor.shape[0] if tensor.shape else 1
        assert rows is not None
        columns = tensor.size // rows
        if min(rows, columns) >= 4:
            factors = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
            delta[place] += 1e-3 * factors.ravel()
    outliers = rng.integers(0, schema.size, 5)
    delta[outliers] += 0.05
    return delta.astype(np.float32)


def requests(codec: Codec) -> tuple[Request, ...]:
    """From the finest to the coarsest."""
    if not codec.adjustable:
        return (Request(),)
    return tuple(Request(Rate(step=step)) for step in (2.0**-10, 0.5, 2.0, 8.0, 64.0))


def payloads(codec: Codec, schema: Schema, most_deltas: int | None = None) -> tuple[bytes, ...]:
    """Of all those deltas, or the first few, at all those rates; each once."""
    chosen = islice(deltas(schema), most_deltas)
    made = (codec.encode(delta, schema, request) for delta in chosen for request in requests(codec))
    return tuple(dict.fromkeys(made))


def _forger(codec: Codec, schema: Schema) -> Callable[[random.Random], bytes] | None:
    """Of payloads that are wrong behind the entropy coder."""
    match codec.codec_id:
        case "ecsq":
            return partial(forged_ecsq, schema, ECSQ_TABLES)
        case "lowrank":
            return partial(forged_lowrank, schema)
        case _:
            return None


def codec_subject(codec: Codec, schema: Schema, name: str, seeds: tuple[bytes, ...]) -> Subject:
    """A codec's ``decode``: malformed payloads leave ``out`` alone, all others fill it with finite values."""
    out = np.empty(schema.size, np.float32)

    def take(payload: bytes) -> bool:
        out.fill(_UNTOUCHED)
        try:
            decoded = codec.decode(payload, schema, out)
        except MalformedPayload:
            assert (out == _UNTOUCHED).all(), "a rejected payload changed out"
            return False
        assert decoded is out
        assert np.isfinite(out).all(), "decoded to something that is not finite"
        return True

    return Subject(
        name,
        seeds,
        take,
        most_bytes=_most_bytes(codec.max_bytes(schema), schema),
        forged=_forger(codec, schema),
        forged_share=CODED_SHARE,
        read=lambda payload: codec.decode(payload, schema),
    )


def _small(codec: Codec) -> Subject:
    return codec_subject(codec, SMALL, f"{codec.codec_id}-small", payloads(codec, SMALL))


def _golden(codec: Codec) -> Subject:
    golden = (GOLDEN / f"{codec.codec_id}.bin").read_bytes()
    seeds = (golden, *payloads(codec, ONE, most_deltas=1))
    return codec_subject(codec, ONE, f"{codec.codec_id}-golden", seeds)


@cache
def large(codec_id: str) -> Subject:
    """For memory: as many parameters as make the interpreter's own objects negligible."""
    codec = CODECS[codec_id]
    return codec_subject(codec, LARGE, codec_id, payloads(codec, LARGE, most_deltas=2))


# Messages.


def header_for(payload: bytes) -> UpdateHeader:
    return msgspec.structs.replace(
        HEADER, payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).digest()
    )


def _envelope_subject() -> Subject:
    most_bytes = max_envelope_bytes(1000)
    seeds = tuple(
        seal_update(header_for(payload), payload, DEVICE_KEY) for payload in (_PAYLOAD, b"", _PAYLOAD[:16])
    )
    record = msgpack.unpackb(frame.pack(header_for(_PAYLOAD)))

    def read(content: bytes) -> None:
        opened = open_update(content, most_bytes)
        assert len(opened.payload) == opened.header.payload_bytes
        assert hashlib.sha256(opened.payload).digest() == opened.header.payload_sha256

    def forged(draw: random.Random) -> bytes:
        signed = mutated_record(record, draw)
        signature = DEVICE_KEY.sign(b"", signed) if draw.random() < 0.1 else bytes(64)
        return b"\x01" + bytes(msgpack.packb([signed, signature, _PAYLOAD]))

    return Subject("envelope", seeds, lambda content: taken(read, content), most_bytes, forged, read)


def _chunk_subject() -> Subject:
    most_bytes, sender = 1000, "device"
    assembler = Assembler(max_envelope_bytes=most_bytes, max_total_bytes=2 * most_bytes)
    seeds = tuple(update_chunks(_PAYLOAD, Counter(3), 90)) + tuple(update_chunks(b"whole", Counter(4), 90))
    records = [msgpack.unpackb(seed[1:]) for seed in seeds]

    def read(content: bytes) -> None:
        chunk = frame.from_frame(content, UpdateChunk, most_bytes)
        envelope = assembler.add(sender, chunk, now=0.0)
        assert assembler.held_bytes <= 2 * most_bytes
        assert envelope is None or len(envelope) == chunk.size_bytes
        for waiting in assembler.silent_since(1.0).values():
            assert len(waiting.missing()) <= 256

    def forged(draw: random.Random) -> bytes:
        return b"\x01" + mutated_record(draw.choice(records), draw)

    return Subject("chunk", seeds, lambda content: taken(read, content), most_bytes, forged, read)


def _head_subject() -> Subject:
    """The head inside its signature: what a coordinator whose key was stolen could send."""
    seeds = (frame.pack(HEAD), frame.pack(msgspec.structs.replace(HEAD, deltas=(), release=None)))
    record = msgpack.unpackb(seeds[0])

    def read(content: bytes) -> None:
        head = frame.unpack(content, Head)
        blobs = [head.plan_blob, head.full_blob, *(delta.blob for delta in head.deltas)]
        for blob in blobs + ([head.release.blob] if head.release else []):
            check_ref(blob, LONGEST_BLOB)
            assert 0 < blob.chunks <= max(1, LONGEST_BLOB)
        assert isinstance(head.order[0], int)
        assert isinstance(head.order[1], int)

    return Subject(
        "head",
        seeds,
        lambda content: taken(read, content),
        frame.MAX_MESSAGE_BYTES,
        lambda draw: mutated_record(record, draw),
        read,
    )


def _sealed_head_subject() -> Subject:
    seeds = (seal(HEAD, COORDINATOR_KEY, HEAD_DOMAIN),)

    def read(content: bytes) -> None:
        assert unseal(content, Head, COORDINATOR_KEY.public, HEAD_DOMAIN) == HEAD, "a forged head"

    def forged(draw: random.Random) -> bytes:
        parts = msgpack.unpackb(seeds[0][1:])
        return b"\x01" + mutated_record(parts, draw)

    return Subject(
        "sealed-head", seeds, lambda content: taken(read, content), frame.MAX_MESSAGE_BYTES, forged, read
    )


KEYFRAME_VERSION: Final = ModelVersion(41)
MODEL_DELTA: Final = ModelDelta(ModelVersion(40), KEYFRAME_VERSION, BlobRef(100, bytes(32), 100))


def model_blob(payload: bytes, parameters: Vector, form: ModelFormat, start: ModelVersion | None) -> bytes:
    """A blob that leads to version 41."""
    result = fingerprint(parameters)[:SHORT_SHA256_BYTES]
    return frame.to_frame(ModelBlob(form, start, KEYFRAME_VERSION, result, payload))


def _grid_integers(schema: Schema, rng: np.random.Generator, scale: float) -> npt.NDArray[np.int32]:
    return np.rint(rng.laplace(0, scale, schema.size)).astype(np.int32)


def _grid_payloads(schema: Schema) -> tuple[bytes, ...]:
    """Dense, sparse, empty and extreme integers on grids of their own."""
    rng = np.random.default_rng(1)
    exponents = [-12 - index % 5 for index in range(len(schema.tensors))]
    extreme = rng.integers(-GRID_LARGEST, GRID_LARGEST, schema.size, endpoint=True).astype(np.int32)
    integers = [*(_grid_integers(schema, rng, scale) for scale in (200, 3, 0.1)), extreme]
    integers.append(np.zeros(schema.size, np.int32))
    return tuple(encode_grid(values, exponents, schema) for values in integers)


def _grid_subject() -> Subject:
    def read(content: bytes) -> None:
        values, exponents = decode_grid(content, SMALL)
        assert values.shape == (SMALL.size,)
        assert values.dtype == np.int32
        assert values.flags.writeable
        assert len(exponents) == len(SMALL.tensors)
        assert np.abs(values.astype(np.int64)).max() <= GRID_LARGEST
        parameters = decode_grid_parameters(content, SMALL)
        assert np.isfinite(parameters).all()
        assert parameters.tobytes() == grid_parameters(values, exponents, SMALL).tobytes()

    def take(content: bytes) -> bool:
        try:
            read(content)
        except MalformedPayload:
            return False
        return True

    most_bytes = _most_bytes(max_grid_bytes(SMALL), SMALL)
    forged = partial(forged_grid, SMALL, choice_for(mean_gap=16, mean_excess=0.5))
    return Subject("grid", _grid_payloads(SMALL), take, most_bytes, forged, read, CODED_SHARE)


def _most_bytes(payload_bytes: int, schema: Schema) -> int:
    return max(payload_bytes, FLOAT32.itemsize * schema.size)


def _keyframe_subject() -> Subject:
    rng = np.random.default_rng(2)
    values = rng.standard_normal(SMALL.size).astype(np.float32)
    grids = [(payload, decode_grid_parameters(payload, SMALL)) for payload in _grid_payloads(SMALL)]
    seeds = (
        model_blob(values.tobytes(), values, ModelFormat.FLOAT32, None),
        *(model_blob(payload, parameters, ModelFormat.GRID, None) for payload, parameters in grids),
    )
    records = [msgpack.unpackb(seed[1:]) for seed in seeds]

    def read(content: bytes) -> None:
        parameters = keyframe_parameters(content, KEYFRAME_VERSION, SMALL)
        assert parameters.shape == (SMALL.size,)
        assert np.isfinite(parameters).all(), "a keyframe that is not finite"

    def forged(draw: random.Random) -> bytes:
        """A float32 keyframe of any bytes with the fingerprint of these, or one with another field wrong."""
        if draw.random() < 0.5:
            return b"\x01" + mutated_record(draw.choice(records), draw)
        content = bytearray(values.tobytes())
        content[(place := 4 * draw.randrange(SMALL.size)) : place + 4] = draw.randbytes(4)
        if draw.random() < 0.5:
            content[place + 2 : place + 4] = draw.choice((b"\x80\x7f", b"\xc0\x7f", b"\x80\xff"))
        return model_blob(bytes(content), np.frombuffer(content, np.float32), ModelFormat.FLOAT32, None)

    return Subject(
        "keyframe",
        seeds,
        lambda content: taken(read, content),
        max_keyframe_bytes(SMALL),
        forged,
        read,
    )


def _model_delta_subject() -> Subject:
    base = decode_grid_parameters(_grid_payloads(SMALL)[0], SMALL)
    seeds = tuple(
        model_blob(
            payload, base + decode_grid_parameters(payload, SMALL), ModelFormat.GRID, MODEL_DELTA.from_version
        )
        for payload in _grid_payloads(SMALL)[1:3]
    )
    records = [msgpack.unpackb(seed[1:]) for seed in seeds]
    before = base.tobytes()

    def read(content: bytes) -> None:
        after = changed_parameters(content, MODEL_DELTA, base, SMALL)
        assert after.shape == (SMALL.size,)
        assert np.isfinite(after).all()

    def take(content: bytes) -> bool:
        accepted = taken(read, content)
        assert base.tobytes() == before, "the parameters of the earlier version changed"
        return accepted

    def forged(draw: random.Random) -> bytes:
        return b"\x01" + mutated_record(draw.choice(records), draw)

    return Subject("model-delta", seeds, take, max_keyframe_bytes(SMALL), forged, read)


def _delta_index_subject() -> Subject:
    rows = tuple(IndexRow(ModelVersion(9 - row), 100 + row, bytes(16)) for row in range(5))
    seeds = (frame.to_frame(DeltaIndex(KEYFRAME_VERSION, 1000, rows, rows[:2])),)
    record = msgpack.unpackb(seeds[0][1:])

    def read(content: bytes) -> None:
        index = frame.from_frame(content, DeltaIndex)
        for blob in [*(delta.blob for delta in index.model_deltas()), *index.indexes().values()]:
            check_ref(blob, LONGEST_BLOB)

    return Subject(
        "delta-index",
        seeds,
        lambda content: taken(read, content),
        frame.MAX_MESSAGE_BYTES,
        lambda draw: b"\x01" + mutated_record(record, draw),
        read,
    )


_MAKERS: Final[dict[str, Callable[[], Subject]]] = {
    **{f"{name}-small": partial(_small, codec) for name, codec in CODECS.items()},
    **{f"{name}-golden": partial(_golden, codec) for name, codec in CODECS.items()},
    "envelope": _envelope_subject,
    "chunk": _chunk_subject,
    "head": _head_subject,
    "sealed-head": _sealed_head_subject,
    "delta-index": _delta_index_subject,
    "grid": _grid_subject,
    "keyframe": _keyframe_subject,
    "model-delta": _model_delta_subject,
}

NAMES: Final = tuple(_MAKERS)
"""Of all subjects."""


@cache
def subject_of(name: str) -> Subject:
    """The subject of a name.

    Raises:
        ValueError: no such subject; the text lists the names.
    """
    if name not in _MAKERS:
        raise ValueError(f"no target {name!r}; there are: {', '.join(NAMES)}")
    return _MAKERS[name]()
