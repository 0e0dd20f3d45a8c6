import hashlib
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.wire import frame
from fedtide.wire.chunks import (
    MAX_CHUNK_BYTES,
    Assembler,
    blob_ref,
    check_ref,
    chunk_bytes,
    join_blob,
    split,
    update_chunks,
)
from fedtide.wire.envelope import update_digest
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, MalformedFrame, WireError
from fedtide.wire.ids import Counter
from fedtide.wire.messages import BlobRef, UpdateChunk

LARGE: Final = 1 << 20

contents = st.binary(max_size=300)
sizes = st.integers(1, 64)


def chunks_of(envelope: bytes, counter: int = 1, size_bytes: int = 10) -> list[UpdateChunk]:
    frames = update_chunks(envelope, Counter(counter), size_bytes)
    return [frame.from_frame(each, UpdateChunk) for each in frames]


@pytest.mark.parametrize(
    ("broker_maximum", "configured", "expected"),
    [
        (None, MAX_CHUNK_BYTES, 122_880),
        (1 << 20, MAX_CHUNK_BYTES, 122_880),
        (131_072, MAX_CHUNK_BYTES, 122_880),  # 131,072 - 1,024 = 130,048 is more than 120 KiB
        (65_536, MAX_CHUNK_BYTES, 64_512),  # 65,536 - 1,024
        (65_536, 30_000, 30_000),
        (None, 30_000, 30_000),
        (100, MAX_CHUNK_BYTES, 1),
    ],
)
def test_a_chunk_is_120_kib_or_what_broker_and_settings_allow(
    broker_maximum: int | None, configured: int, expected: int
) -> None:
    assert chunk_bytes(broker_maximum, configured) == expected


@given(content=contents, size_bytes=sizes)
def test_pieces_put_together_are_the_content(content: bytes, size_bytes: int) -> None:
    pieces = list(split(content, size_bytes))
    assert b"".join(pieces) == content
    assert all(len(piece) == size_bytes for piece in pieces[:-1])
    assert len(pieces) == max(1, -(-len(content) // size_bytes))


# Blobs.


@given(content=contents, size_bytes=sizes)
def test_a_blob_comes_back_from_its_chunks(content: bytes, size_bytes: int) -> None:
    ref = blob_ref(content, size_bytes)
    check_ref(ref, len(content))
    pieces = dict(enumerate(split(content, size_bytes)))
    assert len(pieces) == ref.chunks
    assert join_blob(ref, pieces) == content


def test_a_reference_names_size_hash_and_number_of_chunks() -> None:
    content = b"0123456789"
    digest = hashlib.sha256(content).digest()
    assert blob_ref(content, 4) == BlobRef(size_bytes=10, sha256=digest, chunk_bytes=4)
    assert blob_ref(content, 4).id == digest.hex()[:32]
    chunks = {length: blob_ref(content[:length], 4).chunks for length in (0, 1, 4, 5, 8, 9, 10)}
    assert chunks == {0: 1, 1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 10: 3}


def test_half_a_hash_names_the_same_blob_and_tells_other_bytes_apart() -> None:
    content = b"0123456789"
    whole = blob_ref(content, 10)
    half = BlobRef(10, whole.sha256[:16], 10)
    check_ref(half, 10)
    assert half.id == whole.id
    assert join_blob(half, {0: content}) == content
    with pytest.raises(BlobMismatch):
        join_blob(half, {0: b"0123456780"})


def test_a_blob_larger_than_accepted_is_refused_by_its_reference() -> None:
    with pytest.raises(FrameTooLarge, match="10 bytes; at most 9"):
        check_ref(blob_ref(b"0123456789", 4), 9)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": -4},
        {"size_bytes": -10},
        {"sha256": b""},
        {"sha256": bytes(15)},
        {"sha256": bytes(31)},
        {"sha256": bytes(33)},
    ],
)
def test_a_reference_that_no_blob_has_is_malformed(change: dict[str, object]) -> None:
    ref = msgspec.structs.replace(blob_ref(b"0123456789", 4), **change)
    with pytest.raises(MalformedFrame, match="with a SHA-256 of"):
        check_ref(ref, LARGE)


@pytest.mark.parametrize("last", [b"8", b"89!", b"98"])
def test_a_blob_of_other_bytes_is_refused(last: bytes) -> None:
    with pytest.raises(BlobMismatch):
        join_blob(blob_ref(b"0123456789", 4), {0: b"0123", 1: b"4567", 2: last})


# Updates.


@given(envelope=contents, counter=st.integers(0, 2**63 - 1), size_bytes=sizes)
def test_an_updates_chunks_say_what_they_are_part_of(envelope: bytes, counter: int, size_bytes: int) -> None:
    chunks = chunks_of(envelope, counter, size_bytes)
    assert b"".join(chunk.content for chunk in chunks) == envelope
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert {(chunk.counter, chunk.digest, chunk.size_bytes, chunk.count) for chunk in chunks} == {
        (counter, update_digest(envelope), len(envelope), len(chunks))
    }


@given(envelope=contents, size_bytes=sizes, data=st.data())
def test_an_envelope_is_whole_at_its_last_missing_chunk_whatever_the_order_and_repetition(
    envelope: bytes, size_bytes: int, data: st.DataObject
) -> None:
    chunks = chunks_of(envelope, 1, size_bytes)
    order = data.draw(st.permutations(chunks))
    *early, last = order
    repeated = data.draw(st.lists(st.sampled_from(early), max_size=5)) if early else []
    assembler = Assembler(LARGE, LARGE)
    for chunk in [*early, *repeated]:
        assert assembler.add("pump-1", chunk, 0.0) is None
    assert assembler.add("pump-1", last, 0.0) == envelope
    assert assembler.held_bytes == 0


@given(one=st.binary(min_size=11, max_size=100), other=st.binary(min_size=11, max_size=100), data=st.data())
def test_two_senders_do_not_disturb_each_other(one: bytes, other: bytes, data: st.DataObject) -> None:
    tagged = [("pump-1", chunk) for chunk in chunks_of(one)] + [
        ("pump-2", chunk) for chunk in chunks_of(other)
    ]
    assembler, whole = Assembler(LARGE, LARGE), {}
    for sender, chunk in data.draw(st.permutations(tagged)):
        envelope = assembler.add(sender, chunk, 0.0)
        if envelope is not None:
            assert sender not in whole
            whole[sender] = envelope
    assert whole == {"pump-1": one, "pump-2": other}
    assert assembler.held_bytes == 0


forged_chunks = st.builds(
    UpdateChunk,
    counter=st.integers(0, 2),
    digest=st.sampled_from([b"a", b"b"]),
    size_bytes=st.integers(-5, 150),
    index=st.integers(-2, 6),
    count=st.integers(-2, 6),
    content=st.binary(max_size=60),
)


@given(st.lists(st.tuples(st.sampled_from(["pump-1", "pump-2", "pump-3"]), forged_chunks), max_size=40))
def test_whatever_comes_no_more_is_held_than_allowed(arrivals: list[tuple[str, UpdateChunk]]) -> None:
    assembler = Assembler(max_envelope_bytes=100, max_total_bytes=120)
    for now, (sender, chunk) in enumerate(arrivals):
        try:
            envelope = assembler.add(sender, chunk, float(now))
        except WireError:
            envelope = None
        if envelope is not None:
            assert update_digest(envelope) == chunk.digest
        partial = assembler.silent_since(float("inf"))
        assert assembler.held_bytes == sum(
            len(content) for each in partial.values() for content in each.chunks.values()
        )
        assert assembler.held_bytes <= 120


def test_the_least_recently_touched_update_makes_room() -> None:
    assembler = Assembler(max_envelope_bytes=100, max_total_bytes=25)
    one, other, third = (chunks_of(bytes([number]) * 30) for number in range(3))
    assembler.add("pump-1", one[0], 1.0)
    assembler.add("pump-2", other[0], 2.0)
    assembler.add("pump-1", one[1], 3.0)  # 30 bytes held, 25 allowed: pump-2 was touched less recently
    assert set(assembler.silent_since(9.0)) == {"pump-1"}
    assembler.add("pump-3", third[0], 4.0)  # 30 again
    assert set(assembler.silent_since(9.0)) == {"pump-3"}
    assert assembler.held_bytes == 10


def test_an_envelope_larger_than_accepted_is_refused_at_its_first_chunk() -> None:
    assembler = Assembler(max_envelope_bytes=29, max_total_bytes=LARGE)
    with pytest.raises(FrameTooLarge, match="30 bytes; at most 29"):
        assembler.add("pump-1", chunks_of(bytes(30))[0], 0.0)
    assert assembler.held_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        {"index": 3},
        {"index": -1},
        {"count": 0},
        {"count": -1},
        {"count": 31},  # more chunks than bytes
        {"size_bytes": 0},
        {"size_bytes": -30},
        {"content": b""},  # would be held for ever at no cost in bytes
    ],
)
def test_a_chunk_whose_numbers_do_not_fit_is_malformed(change: dict[str, object]) -> None:
    assembler = Assembler(LARGE, LARGE)
    with pytest.raises(MalformedFrame):
        assembler.add("pump-1", msgspec.structs.replace(chunks_of(bytes(30))[0], **change), 0.0)
    assert assembler.held_bytes == 0
    assert assembler.silent_since(1.0) == {}


def test_chunks_that_add_up_to_more_than_announced_are_a_mismatch_and_forgotten() -> None:
    """Not a malformed frame: the last to come may be right, and an earlier one forged."""
    assembler = Assembler(LARGE, LARGE)
    first, second, _ = chunks_of(bytes(30))
    assembler.add("pump-1", first, 0.0)
    with pytest.raises(BlobMismatch, match="more than the announced 30 bytes"):
        assembler.add("pump-1", msgspec.structs.replace(second, content=bytes(21)), 0.0)
    assert assembler.held_bytes == 0


@pytest.mark.parametrize("last", [b"1", b"x" * 9], ids=["shorter", "other bytes"])
def test_chunks_that_are_not_the_announced_bytes_are_a_mismatch_and_forgotten(last: bytes) -> None:
    assembler = Assembler(LARGE, LARGE)
    *early, final = chunks_of(bytes(29))
    for chunk in early:
        assembler.add("pump-1", chunk, 0.0)
    with pytest.raises(BlobMismatch):
        assembler.add("pump-1", msgspec.structs.replace(final, content=last), 0.0)
    assert assembler.held_bytes == 0


def test_an_update_of_one_chunk_is_checked_too() -> None:
    (only,) = chunks_of(b"whole", size_bytes=10)
    assembler = Assembler(LARGE, LARGE)
    assert assembler.add("pump-1", only, 0.0) == b"whole"
    with pytest.raises(BlobMismatch):
        assembler.add("pump-1", msgspec.structs.replace(only, content=b"whale"), 0.0)


@pytest.mark.parametrize("size_bytes", [10, 100])
def test_a_newer_update_replaces_the_senders_partial_one(size_bytes: int) -> None:
    assembler = Assembler(LARGE, LARGE)
    old, new = chunks_of(b"o" * 30, counter=1), chunks_of(b"n" * 30, counter=2, size_bytes=size_bytes)
    assembler.add("pump-1", old[0], 0.0)
    assembler.add("pump-1", old[1], 0.0)
    arrived = [assembler.add("pump-1", chunk, 0.0) for chunk in new]
    assert arrived[-1] == b"n" * 30
    assert assembler.held_bytes == 0
    assert assembler.add("pump-1", old[2], 0.0) is None  # its siblings are gone


def test_missing_chunks_are_named_once_the_sender_was_silent() -> None:
    assembler = Assembler(LARGE, LARGE)
    chunks = chunks_of(bytes(50))
    assembler.add("pump-1", chunks[1], 1.0)
    assembler.add("pump-1", chunks[3], 2.0)
    assert assembler.silent_since(2.0) == {}
    assert assembler.silent_since(2.5)["pump-1"].missing() == (0, 2, 4)
    assert assembler.silent_since(2.5)["pump-1"].gaps() == (0, 2)


def test_a_list_of_missing_chunks_is_short_however_many_are_announced() -> None:
    size_bytes = 1 << 21
    claim = UpdateChunk(
        counter=Counter(1), digest=b"", size_bytes=size_bytes, index=1, count=size_bytes, content=b"x"
    )
    assembler = Assembler(size_bytes, LARGE)
    assembler.add("pump-1", claim, 0.0)
    missing = assembler.silent_since(1.0)["pump-1"].missing()
    assert missing[:3] == (0, 2, 3)
    assert len(missing) == 256


def test_dropping_forgets_a_sender_and_an_unknown_one_does_not_matter() -> None:
    assembler = Assembler(LARGE, LARGE)
    assembler.add("pump-1", chunks_of(bytes(30))[0], 0.0)
    assembler.drop("pump-1")
    assembler.drop("stranger")
    assert assembler.held_bytes == 0
