"""The bytes of a segment, by hand; and whatever is encoded comes back."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregation import FedAsync, FedAvg, FedBuff
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal.correction import corrected_header, corrected_record
from coordinator.journal.facts import (
    Batch,
    Counted,
    EpochClaimed,
    EvaluationResult,
    Published,
    Rejected,
    VersionPublished,
    from_body,
    is_entry,
    to_body,
)
from coordinator.journal.format import (
    END_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    End,
    SegmentHeader,
    damaged_ends,
    encode,
    read_head,
)
from coordinator.server_optimizers import SGD, Adam, Momentum, Yogi
from coordinator.settings import Rules
from fedtide.wire.messages import Reason
from fedtide.wire.parameters import Schema, TensorSpec

LARGEST = 2**63 - 1
SCHEMA = Schema(tensors=(TensorSpec(name="p", dtype="float32", shape=(2, 3)),))


def crc32_by_bits(content, value=0):
    """IEEE 802.3, one bit at a time, as in the standard and nowhere in our code."""
    value ^= 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_the_checksum_by_bits_is_the_one_everybody_knows():
    assert crc32_by_bits(b"123456789") == 0xCBF43926


def test_a_header_by_hand():
    fields = (
        b"\x89ftj\r\n\x1a\n"
        + bytes.fromhex("00000001")  # format
        + bytes.fromhex("0000000000000007")  # first record
        + bytes.fromhex("cafe0001")  # checksum of record 6
        + b"\x11" * 32  # SHA-256 of the snapshot
    )
    content = fields + struct.pack(">I", crc32_by_bits(fields))
    assert len(content) == HEADER_BYTES == 60
    assert SegmentHeader(7, 0xCAFE0001, b"\x11" * 32).to_bytes() == content
    assert SegmentHeader.from_bytes(content) == SegmentHeader(7, 0xCAFE0001, b"\x11" * 32)


def test_a_batch_of_two_records_by_hand():
    """A flush, whose body is an empty msgpack array, and two duplicates: ["duplicate", 2]."""
    header = SegmentHeader(1, 0, None)
    salt = crc32_by_bits(header.to_bytes())
    flush, counted = b"\x90", b"\x92\xa9duplicate\x02"
    first = (
        b"\xf5rec\x02\x00"  # kind 2, not the last of its batch
        + bytes.fromhex("00000000 00000001 0000000000000001 00000000")  # place, length, number, chain
    )
    first_crc = crc32_by_bits(first, salt)
    flush_crc = crc32_by_bits(flush, first_crc)
    second = (
        b"\xf5rec\x11\x01"  # kind 17, the last
        + bytes.fromhex("00000001 0000000c 0000000000000002")
        + struct.pack(">I", flush_crc)
    )
    second_crc = crc32_by_bits(second, salt)
    counted_crc = crc32_by_bits(counted, second_crc)
    expected = (
        first + struct.pack(">II", first_crc, flush_crc) + flush
        + second + struct.pack(">II", second_crc, counted_crc) + counted
    )  # fmt: skip
    bodies = [to_body(FlushEntry()), to_body(Counted("duplicate", 2))]
    encoded = encode(bodies, sequence=1, chain=0, salt=header.salt)
    assert (encoded.content, encoded.chain) == (expected, counted_crc)
    assert len(expected) == 2 * HEAD_BYTES + 1 + 12 == 81


def test_the_journal_of_a_new_build_is_the_one_of_this_build():
    """Golden: a change of these bytes makes journals unreadable and needs a new format number."""
    header = SegmentHeader(1, 0, None)
    encoded = encode([to_body(FlushEntry())], sequence=1, chain=0, salt=header.salt)
    assert header.to_bytes().hex() == (
        "8966746a0d0a1a0a00000001000000000000000100000000" + "00" * 32 + "c72ddcfd"
    )
    assert encoded.content.hex() == "f572656302010000000000000001000000000000000100000000b2543b5049d4790690"


counters = st.integers(0, LARGEST)
devices = st.sampled_from(["a", "pump-1", "x" * 64])
floats = st.floats(allow_nan=False)
versions = st.integers(0, LARGEST)
records = st.one_of(
    st.builds(UpdateEntry, devices, counters, versions, floats, floats, st.binary(max_size=200), versions),
    st.just(FlushEntry()),
    st.builds(
        RulesEntry,
        st.builds(
            Rules,
            aggregator=st.sampled_from([FedBuff(goal=3), FedAsync(mixing=0.1), FedAvg(cohort=2)]),
            server_optimizer=st.sampled_from([SGD(), Momentum(), Adam(learning_rate=0.1), Yogi()]),
        ),
    ),
    st.builds(ResetEntry, st.text(max_size=32), st.just(SCHEMA), versions, st.binary(max_size=24), st.text()),
    st.builds(Rejected, devices, counters, st.sampled_from(Reason), st.text()),
    st.builds(Counted, st.text(), counters),
    st.builds(EpochClaimed, counters),
    st.builds(
        VersionPublished,
        st.builds(Published, versions, st.binary(), floats, st.none() | st.binary()),
        st.integers(1, LARGEST),
    ),
    st.builds(EvaluationResult, versions, st.none() | floats, st.none() | floats, floats),
)


@given(st.lists(records, min_size=1, max_size=5), st.integers(1, 2**60), st.integers(0, 2**32 - 1))
def test_whatever_is_encoded_comes_back(batch, sequence, chain):
    salt = SegmentHeader(sequence, chain, None).salt
    content = encode([to_body(record) for record in batch], sequence=sequence, chain=chain, salt=salt).content
    offset, found = 0, []
    while offset < len(content):
        head = read_head(content, offset, salt)
        assert (head.sequence, head.batch, head.place) == (sequence + len(found), sequence, len(found))
        assert head.last == (len(found) == len(batch) - 1)
        body = content[offset + HEAD_BYTES : offset + HEAD_BYTES + head.length]
        found.append(from_body(head.kind, body))
        assert is_entry(head.kind) == isinstance(
            found[-1], UpdateEntry | FlushEntry | RulesEntry | ResetEntry
        )
        offset += HEAD_BYTES + head.length
    assert found == batch


@pytest.mark.parametrize("kind", [0, 5, 15, 21, 255])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"the unknown kind {kind}"):
        from_body(kind, b"\x90")


@pytest.mark.parametrize("body", [b"", b"\x91\x01", b"\xc1", msgspec.msgpack.encode(["pump", "one"])])
def test_a_body_that_is_none_of_its_kind_is_refused(body):
    with pytest.raises(ValueError, match="not of its kind 1"):
        from_body(1, body)


def test_every_flipped_bit_of_a_header_is_noticed_and_put_right():
    whole = SegmentHeader(12, 34, b"\x56" * 32).to_bytes()
    for bit in range(8 * HEADER_BYTES):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="header"):
            SegmentHeader.from_bytes(bytes(content))
        assert corrected_header(bytes(content)) == whole


@given(st.binary(max_size=300), st.data())
def test_every_flipped_bit_of_a_record_is_put_right(body, data):
    salt, other = 99, to_body(FlushEntry())
    whole = encode([(1, body), other], sequence=5, chain=77, salt=salt).content
    length = HEAD_BYTES + len(body)
    content = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * length - 1))
    content[bit // 8] ^= 1 << bit % 8
    assert corrected_record(bytes(content), salt=salt, sequence=5, chain=77) == whole[:length]


@given(st.binary(min_size=40, max_size=300), st.data())
def test_two_flipped_bits_of_a_body_are_never_taken_for_one(body, data):
    whole = encode([(1, body)], sequence=5, chain=77, salt=99).content
    bits = data.draw(
        st.lists(st.integers(8 * HEAD_BYTES, 8 * len(whole) - 1), min_size=2, max_size=2, unique=True)
    )
    content = bytearray(whole)
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    assert corrected_record(bytes(content), salt=99, sequence=5, chain=77) is None


def test_the_end_is_the_last_note_that_is_whole():
    notes = [End(1, 100 * number, number).to_bytes() for number in range(1, 4)]
    assert len(notes[0]) == END_BYTES == 24
    assert End.last_in(b"".join(notes)) == End(1, 300, 3)
    assert End.last_in(b"".join(notes)[:-1]) == End(1, 200, 2)
    assert End.last_in(notes[0] + bytes(END_BYTES)) == End(1, 100, 1)
    assert End.last_in(b"") is None
    assert damaged_ends(b"".join(notes)) == []
    assert damaged_ends(notes[0] + bytes(END_BYTES) + notes[2][:-1]) == [24, 48]


def test_a_batch_adds_up_its_fates():
    batch = Batch(
        [
            UpdateEntry("a", 1, 0, 1.0, 1.0, b"", 0),
            UpdateEntry("b", 1, 0, 1.0, 1.0, b"", 0),
            Rejected("c", 1, Reason.TOO_STALE, ""),
            Counted("duplicate", 3),
            Counted("rejected:too-stale", 2),
            FlushEntry(),
        ]
    )
    assert batch.totals == {"applied": 2, "rejected:too-stale": 3, "duplicate": 3}
    assert len(batch.entries) == 3
