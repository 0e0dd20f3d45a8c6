"""What a device holds out it never trains on, however its data grow."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.data_sources import Csv, Sensor
from edge_agent.dataset import Dataset
from edge_agent.hold_out import HoldOut, split
from edge_agent.readings import Channel
from edge_agent.window_ring import WindowRing
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.parameters import TensorSpec


def dataset(numbers):
    """One example per number."""
    inputs = np.asarray(numbers, np.float32)[:, None] * np.ones(3, np.float32)
    return Dataset((inputs,), np.asarray(numbers, np.int64))


def numbers_of(part):
    return [] if part is None else part.targets.tolist()


def test_about_the_share_is_held_out_and_nothing_is_lost():
    parts = split(dataset(range(2000)), 0.2)
    held_out, training = numbers_of(parts.held_out), numbers_of(parts.training)
    assert sorted(held_out + training) == list(range(2000))
    # Binomial: 2000 × 0.2 = 400, standard deviation √(2000 × 0.2 × 0.8) = 17.9; five of them are 90.
    assert 310 < len(held_out) < 490


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_nothing_is_held_out_where_nothing_is_asked_for_or_there(share):
    examples = dataset([] if share else range(9))
    parts = split(examples, share)
    assert (parts.training, parts.held_out) == (examples, None)


@given(
    st.lists(st.integers(0, 200), max_size=60), st.lists(st.integers(0, 200), max_size=60),
    st.sampled_from([0.1, 0.3, 0.5]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_an_example_stays_on_its_side_whatever_comes_goes_or_moves(before, more, share, random):
    after = before + more
    random.shuffle(after)
    held_out = set(numbers_of(split(dataset(before), share).held_out))
    training = set(numbers_of(split(dataset(before), share).training))
    assert not held_out & set(numbers_of(split(dataset(after), share).training))
    assert not training & set(numbers_of(split(dataset(after), share).held_out))


def test_a_larger_share_holds_out_what_a_smaller_one_did():
    smaller = set(numbers_of(split(dataset(range(500)), 0.1).held_out))
    larger = set(numbers_of(split(dataset(range(500)), 0.4).held_out))
    assert smaller < larger


def test_copies_of_an_example_are_on_the_same_side():
    parts = split(dataset([7] * 50 + [8] * 50), 0.5)
    assert set(numbers_of(parts.held_out)) & set(numbers_of(parts.training)) == set()


def windows(first, count, length, stride):
    """Windows of ``length`` readings, one every ``stride``; each reading is its own position."""
    starts = (first + np.arange(count)) * stride
    readings = starts[:, None] + np.arange(length)
    overlap = -(-length // stride)  # windows further apart than this share nothing
    return Dataset((readings.astype(np.float32),), starts, arrived=first + np.arange(count), span=overlap)


@given(
    st.integers(0, 300), st.integers(1, 400), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from([0.1, 0.3, 0.5]),
)  # fmt: skip
def test_no_reading_of_a_window_held_out_is_ever_trained_on(first, count, length, stride, share):
    """Also where the device has since forgotten the oldest windows and got new ones."""
    earlier = split(windows(0, 300, length, stride), share)
    later = split(windows(first, count, length, stride), share)
    for part in (earlier, later):
        if part.held_out is not None:
            tested = set(part.held_out.inputs[0].ravel().tolist())
            for other in (earlier, later):
                assert not tested & set(other.training.inputs[0].ravel().tolist())


def test_windows_are_lost_only_at_the_edges_of_blocks():
    parts = split(windows(0, 6400, 20, 10), 0.2)  # a window overlaps the next: blocks of 8 × 2 windows
    kept = len(parts.training) + len(parts.held_out)
    # At most one window on either side of each block that is held out: about 80 of 400, surely not 120.
    assert 6400 - 2 * 120 < kept < 6400
    assert 0.1 < len(parts.held_out) / 6400 < 0.3


def test_the_windows_of_one_file_are_on_one_side():
    arrived = np.repeat(np.array([1_700_000_000_123_456_789, 1_700_000_060_123_456_789]), 40)
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        files = Dataset((rng.normal(size=(80, 4)),), arrived, arrived=arrived, span=1)
        parts = split(files, share)
        assert set(numbers_of(parts.held_out)) & set(numbers_of(parts.training)) == set()


def taking(length):
    wanted = TensorSpec(name="x0", dtype="float32", shape=(None, length))
    return msgspec.structs.replace(tiny_plan().manifest, inputs=(wanted,), targets=None)


def a_table(path, length, stride):
    (path / "t.csv").write_text("a\n" + "".join(f"{row}\n" for row in range(3000)))
    return Csv(path=path / "t.csv", window=length, stride=stride)


def a_sensor(path, length, stride):
    source = Sensor(path=path / "ring", channels=(Channel(topic="a"),), window=length, stride=stride)
    ring = WindowRing(source.path, source.layout, source.max_bytes, UNSYNCED_DISK)
    rows = np.arange(0, 3000 - length, stride)[:, None] + np.arange(length)
    ring.append(rows.astype(np.float32))
    return source


@pytest.mark.parametrize("source", [a_table, a_sensor])
@pytest.mark.parametrize(("length", "stride"), [(10, 1), (10, 3), (10, 10), (4, 7)])
def test_no_reading_of_a_source_is_on_both_sides(tmp_path, source, length, stride):
    parts = split(source(tmp_path, length, stride).load(taking(length)), 0.3)
    tested = set(parts.held_out.inputs[0].ravel().tolist())
    trained = set(parts.training.inputs[0].ravel().tolist())
    assert not tested & trained
    assert len(tested) > 300
    assert len(trained) > 900


def test_a_dataset_is_split_once():
    examples, hold_out = dataset(range(20)), HoldOut()
    first = hold_out.split(examples, 0.3)
    assert hold_out.split(examples, 0.3) is first
    assert hold_out.split(examples, 0.4) is not first
    assert hold_out.split(replace(examples), 0.4).training is not first.training
