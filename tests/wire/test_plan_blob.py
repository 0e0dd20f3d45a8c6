"""A plan as a signed blob; what is inside its graphs is the business of the tests of plans."""

import hashlib
import zlib

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_samples import COORDINATOR_KEY, DEVICE_KEY, GRAPHS, MANIFEST, sample_plan

from fedtide.wire import frame
from fedtide.wire.errors import BadSignature, BlobMismatch, FrameTooLarge, MalformedFrame, WireError
from fedtide.wire.plan import (
    MAX_GRAPH_BYTES,
    MAX_PLAN_BYTES,
    PlanManifest,
    inflate_graph,
    open_plan,
    seal_plan,
)
from fedtide.wire.signatures import HEAD_DOMAIN, PLAN_DOMAIN, PublicKey

KEY: PublicKey = COORDINATOR_KEY.public
BLOB = seal_plan(sample_plan(), COORDINATOR_KEY)


def assembled(*parts: object) -> bytes:
    return b"\x01" + bytes(msgpack.packb(list(parts)))


def signed(manifest: PlanManifest, train: bytes, evaluation: bytes) -> bytes:
    """A plan blob with a good signature whose compressed graphs are given as they are."""
    packed = frame.pack(manifest)
    return assembled(zlib.compress(packed), COORDINATOR_KEY.sign(PLAN_DOMAIN, packed), train, evaluation)


def test_a_plan_comes_back_from_its_blob() -> None:
    assert open_plan(BLOB, KEY) == sample_plan()


def test_a_plan_is_named_by_its_manifest_which_names_its_graphs() -> None:
    plan = sample_plan()
    assert plan.id == hashlib.sha256(frame.pack(MANIFEST)).hexdigest()[:32]
    other = msgspec.structs.replace(MANIFEST, train_sha256=hashlib.sha256(b"other").digest())
    assert type(plan)(other, *GRAPHS).id != plan.id


def test_a_plan_signed_by_another_key_is_refused() -> None:
    with pytest.raises(BadSignature):
        open_plan(BLOB, DEVICE_KEY.public)


def test_a_plan_signed_for_another_purpose_is_refused() -> None:
    packed = frame.pack(MANIFEST)
    graphs = [zlib.compress(graph) for graph in GRAPHS]
    with pytest.raises(BadSignature):
        open_plan(assembled(zlib.compress(packed), COORDINATOR_KEY.sign(HEAD_DOMAIN, packed), *graphs), KEY)


def test_a_changed_manifest_is_refused() -> None:
    packed = frame.pack(msgspec.structs.replace(MANIFEST, name="lime"))
    _, signature, train, evaluation = msgpack.unpackb(BLOB[1:])
    with pytest.raises(BadSignature):
        open_plan(assembled(zlib.compress(packed), signature, train, evaluation), KEY)


def test_a_changed_graph_is_refused_and_the_error_says_which() -> None:
    train, evaluation = (zlib.compress(graph) for graph in GRAPHS)
    other = zlib.compress(b"another graph")
    with pytest.raises(BlobMismatch, match="the train graph"):
        open_plan(signed(MANIFEST, other, evaluation), KEY)
    with pytest.raises(BlobMismatch, match="the evaluation graph"):
        open_plan(signed(MANIFEST, train, other), KEY)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda graph: b"no deflate" + graph, MalformedFrame),
        (lambda graph: graph[:-1], MalformedFrame),
        (lambda graph: graph + b"\0", MalformedFrame),
        (lambda graph: graph[:-1] + bytes((graph[-1] ^ 1,)), MalformedFrame),  # its Adler-32
        (lambda _: b"", MalformedFrame),
        (lambda _: zlib.compress(b"another graph"), BlobMismatch),
    ],
)
def test_a_graph_that_does_not_inflate_to_its_end_is_refused(damage: object, error: type[WireError]) -> None:
    assert callable(damage)
    with pytest.raises(error, match="train graph"):
        inflate_graph(damage(zlib.compress(GRAPHS[0])), MANIFEST.train_sha256, "train")


def test_a_graph_that_inflates_without_end_is_stopped_at_its_bound() -> None:
    bomb = zlib.compress(bytes(4 * MAX_GRAPH_BYTES), 9)  # 32 MiB in 33 KB
    assert len(bomb) < MAX_PLAN_BYTES
    manifest = msgspec.structs.replace(MANIFEST, train_sha256=hashlib.sha256(b"").digest())
    with pytest.raises(FrameTooLarge) as refused:
        open_plan(signed(manifest, bomb, zlib.compress(GRAPHS[1])), KEY)
    assert refused.value.size_bytes == MAX_GRAPH_BYTES + 1


def test_a_manifest_that_inflates_without_end_is_stopped_before_its_signature_is_checked() -> None:
    bomb = zlib.compress(bytes(64 * MAX_PLAN_BYTES), 9)
    with pytest.raises(FrameTooLarge) as refused:
        open_plan(assembled(bomb, bytes(64), b"", b""), KEY)
    assert refused.value.size_bytes == MAX_PLAN_BYTES + 1


def test_a_plan_larger_than_accepted_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FrameTooLarge):
        open_plan(b"\xff" * (MAX_PLAN_BYTES + 1), KEY)
    with pytest.raises(FrameTooLarge):
        open_plan(BLOB, KEY, max_bytes=len(BLOB) - 1)


@pytest.mark.parametrize(
    "parts", [(), (b"",) * 3, (b"",) * 5, (b"", bytes(64), "text", b""), (b"", bytes(64), [b""], b"")]
)
def test_anything_but_four_byte_strings_is_malformed(parts: tuple[object, ...]) -> None:
    with pytest.raises(MalformedFrame, match="four byte strings"):
        open_plan(assembled(*parts), KEY)


def test_every_truncation_of_a_plan_is_malformed() -> None:
    for length in range(len(BLOB)):
        with pytest.raises(MalformedFrame):
            open_plan(BLOB[:length], KEY)


@given(place=st.integers(0, len(BLOB) - 1), bit=st.integers(0, 7))
def test_flipping_any_bit_of_a_plan_never_gives_another_plan(place: int, bit: int) -> None:
    flipped = bytearray(BLOB)
    flipped[place] ^= 1 << bit
    try:
        plan = open_plan(bytes(flipped), KEY)
    except WireError:
        return
    assert plan == sample_plan()  # zlib's header has a bit that means nothing
