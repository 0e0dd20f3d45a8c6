"""From any of the last 128 published versions there is a way of at most three deltas, and it can be found."""

import hashlib

import pytest

from coordinator.model_deltas import REACH, SEGMENT, Catalogue, Published, sources, sources_anew
from fedtide.wire import frame
from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import BlobRef, ModelDelta
from fedtide.wire.model_blob import DeltaIndex


def test_a_version_has_deltas_from_the_eight_before_it():
    assert sources(0) == ()
    assert sources(1) == (0,)
    assert sources(5) == (4, 3, 2, 1, 0)
    assert sources(9) == (8, 7, 6, 5, 4, 3, 2, 1)
    assert sources(35) == (34, 33, 32, 31, 30, 29, 28, 27)


def test_the_last_of_a_segment_also_has_deltas_from_the_ends_of_earlier_ones():
    assert sources(8) == (7, 6, 5, 4, 3, 2, 1, 0)
    assert sources(24) == (*range(23, 15, -1), 8, 0)
    assert sources(320) == (*range(319, 311, -1), *range(304, 191, -8))


def test_where_nothing_is_left_of_earlier_deltas_there_are_direct_ones():
    assert sources_anew(0) == ()
    assert sources_anew(3) == (2, 1, 0)
    assert sources_anew(28) == (*range(27, 19, -1), 16, 8, 0)
    assert sources_anew(300) == (*range(299, 291, -1), *range(288, 175, -8))


@pytest.mark.parametrize("newest", [1, 7, 8, 9, 100, 128, 129, 255, 256, 257, 300])
def test_three_deltas_lead_from_any_version_within_reach_to_the_newest(newest):
    ends = {end for end in range(newest + 1) if end % SEGMENT == 0}
    leads = {newest: 0}  # by version: over how many deltas; indexes of other versions than ends do not stay
    for _ in range(3):
        for here, hops in list(leads.items()):
            if here in ends | {newest}:
                leads |= {place: hops + 1 for place in sources(here) if place not in leads}
    assert set(range(max(0, newest - REACH), newest)) <= set(leads)
    assert max(leads.values()) <= 3


def blob(name):
    return BlobRef(300, hashlib.sha256(name.encode()).digest(), 4096)


def published(sequence):
    """Version numbers are three times the sequence numbers: publishing is paced."""
    deltas = tuple(
        ModelDelta(ModelVersion(3 * start), ModelVersion(3 * sequence), blob(f"{start}-{sequence}"))
        for start in sources(sequence)
    )
    return Published(sequence, ModelVersion(3 * sequence), deltas, blob(f"index {sequence}"))


def filled(newest):
    """A catalogue to which all versions before ``newest`` were added, and the index of ``newest``."""
    catalogue = Catalogue()
    for sequence in range(newest):
        catalogue.add(published(sequence))
    content = catalogue.index(published(newest), 4096)
    return catalogue, content and frame.from_frame(content, DeltaIndex)


def test_an_index_lists_a_versions_deltas_and_the_end_of_the_segment_before():
    _, index = filled(35)
    assert index.model_deltas() == tuple(
        ModelDelta(3 * start, 105, BlobRef(300, blob(f"{start}-35").sha256[:16], 4096))
        for start in range(34, 26, -1)
    )
    assert index.indexes() == {96: BlobRef(300, blob("index 32").sha256[:16], 4096)}


def test_the_index_of_a_segments_end_names_those_of_all_ends_within_reach():
    _, index = filled(320)
    assert sorted(index.indexes()) == [3 * end for end in range(192, 320, SEGMENT)]


def test_a_head_issued_anew_has_the_same_index():
    catalogue, index = filled(16)
    catalogue.add(published(16))
    again = frame.from_frame(catalogue.index(published(16), 4096), DeltaIndex)
    assert again == index
    assert sorted(again.indexes()) == [0, 24]


def test_there_is_no_index_that_would_say_no_more_than_the_head():
    catalogue = Catalogue()
    assert catalogue.index(published(0), 4096) is None
    assert catalogue.index(published(1), 4096) is None
    assert catalogue.index(published(2), 4096) is not None


def test_what_is_out_of_reach_is_named_no_longer():
    catalogue, _ = filled(400)
    ends = range(272, 400, SEGMENT)  # 399 − 128 = 271
    expected = {blob(f"index {end}") for end in ends}
    expected |= {blob(f"{start}-{end}") for end in ends for start in sources(end)}
    assert set(catalogue.blobs()) == expected


def test_a_catalogue_that_was_cleared_names_nothing():
    catalogue, _ = filled(40)
    catalogue.clear()
    assert list(catalogue.blobs()) == []


def test_an_index_of_a_hundred_and_twenty_eight_versions_is_small():
    catalogue, _ = filled(320)
    # 8 + 15 deltas and 16 indexes, 25 bytes each: 16 of hash, 3 of size, 3 of version, 3 of framing.
    assert len(catalogue.index(published(320), 4096)) < 39 * 26 + 20
