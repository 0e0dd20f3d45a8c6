import errno
import logging
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan
from coarse_codec import TABLE
from hypothesis import given
from hypothesis import strategies as st
from simulated_disk import Operation, PowerCut, SimulatedDisk

from edge_agent.error_feedback import MOST_CARRIED, Feedback, corrected, residual_of, settled
from edge_agent.feedback_file import FeedbackFile
from fedtide.wire import codecs
from fedtide.wire.codecs import WrongLength
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.errors import UnknownCodec
from fedtide.wire.ids import Counter
from fedtide.wire.parameters import Schema, TensorSpec, Vector
from fedtide.wire.plan import Plan

SCHEMA: Final = Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(2, 2)),))
SENT: Final = (4, 0, 0, 8)
WHOLE: Final = (5, -3, 1, 8)
LEFT_OUT: Final = (1, -3, 1, 0)
"""``WHOLE`` in steps of 4, rounded towards zero, is ``SENT``; the rest is left out."""


@pytest.fixture(autouse=True)
def with_a_coarse_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", TABLE)


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def plan(name: str = "line", schema: Schema = SCHEMA) -> Plan:
    tiny = tiny_plan(name)
    return Plan(msgspec.structs.replace(tiny.manifest, schema=schema), tiny.train, tiny.evaluation)


def feedback(counter: int = 7, *, codec: str = "coarse", of: Plan | None = None) -> Feedback:
    payload = codecs.get(codec).encode(vector(*WHOLE), SCHEMA)
    return Feedback((of or plan()).id, Counter(counter), vector(*WHOLE), codec, payload)


# What goes into the codec.


def test_without_a_residual_the_delta_goes_as_it_is_and_the_codec_measures_it() -> None:
    delta = vector(3, -4, 0, 0)
    found = corrected(delta, None)
    assert found.vector is delta
    assert found.request(Rate(step=8.0)) == Request(Rate(step=8.0), None)


def test_the_residual_is_added_and_the_step_follows_the_delta_alone() -> None:
    # The delta's norm is 5, so its rms over 4 parameters is 5 / sqrt(4) = 2.5. The residual's norm is 2.
    found = corrected(vector(3, -4, 0, 0), vector(1, 1, -1, 1))
    assert found.vector.tolist() == [4, -3, -1, 1]
    assert found.request(Rate(step=8.0)) == Request(Rate(step=8.0), 2.5)
    assert found.share == 1


@pytest.mark.parametrize(
    ("times", "carried"),
    # The delta is 1, 1, 1, 1: its rms is 1. The residual is so many times as long.
    [(0, 0), (1, 1), (4, 4), (8, 4), (1e6, 4)],
)
def test_no_more_than_four_deltas_are_carried(times: float, carried: float) -> None:
    found = corrected(np.ones(4, np.float32), np.full(4, times, np.float32))
    assert found.rms == 1
    assert found.vector.tolist() == [carried + 1] * 4
    assert found.share == pytest.approx(carried / times if times else 1)


@pytest.mark.parametrize("residual", [(3, -1, 0, 0), (1e6, 0, 0, 0), (0, 0, 0, 0)])
def test_a_delta_of_zeros_sends_the_residual_by_its_own_measure(residual: tuple[float, ...]) -> None:
    found = corrected(np.zeros(4, np.float32), vector(*residual))
    assert found.vector.tolist() == list(residual)
    assert (found.rms, found.share) == (None, 1.0)


@pytest.mark.parametrize("residual", [(math.nan, 0, 0, 0), (0, math.inf, 0, 0), (0, 3e38, 0, 0)])
def test_a_residual_that_would_spoil_the_update_is_given_up(residual: tuple[float, ...]) -> None:
    found = corrected(vector(1, 3e38, 1, 1), vector(*residual))  # 3e38 + 3e38 is beyond float32
    assert found.vector.tolist() == vector(1, 3e38, 1, 1).tolist()
    assert found.share == 0


finite: Final = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_what_goes_out_is_finite_and_the_residual_bounded(pairs: list[tuple[float, float]]) -> None:
    delta, residual = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    length = float(np.linalg.norm(delta.astype(np.float64)))
    found = corrected(delta.copy(), residual.copy())
    carried = found.vector.astype(np.float64) - delta
    assert np.isfinite(found.vector).all()
    assert 0 < found.share <= 1
    if length:
        assert np.linalg.norm(carried) <= (MOST_CARRIED * length + np.linalg.norm(residual) * 1e-6) * 1.00001
        assert found.rms == pytest.approx(length / math.sqrt(len(pairs)))


# What is left for the next update.


def test_until_a_receipt_everything_is_carried_on() -> None:
    residual = residual_of(feedback(), SCHEMA)
    assert residual is not None
    assert residual.tolist() == list(WHOLE)


def test_once_applied_what_the_codec_left_out_is_carried_on() -> None:
    residual = residual_of(settled(feedback(7), Counter(7)), SCHEMA)
    assert residual is not None
    assert residual.tolist() == list(LEFT_OUT)
    assert (np.array(SENT) + np.array(LEFT_OUT)).tolist() == list(WHOLE)


@pytest.mark.parametrize("applied", [None, Counter(6), Counter(8)])
def test_another_updates_receipt_says_nothing_of_this_one(applied: Counter | None) -> None:
    residual = residual_of(settled(feedback(7), applied), SCHEMA)
    assert residual is not None
    assert residual.tolist() == list(WHOLE)


@pytest.mark.parametrize("codec", ["float32", "float16", "q8"])
def test_a_codec_without_a_rate_ends_it(codec: str) -> None:
    assert residual_of(feedback(7, codec=codec), SCHEMA) is not None
    assert residual_of(settled(feedback(7, codec=codec), Counter(7)), SCHEMA) is None


def test_a_payload_that_the_codec_did_not_make_is_an_error() -> None:
    broken = Feedback(plan().id, Counter(7), vector(*WHOLE), "coarse", b"?", applied=True)
    with pytest.raises(WrongLength):
        residual_of(broken, SCHEMA)
    with pytest.raises(UnknownCodec):
        residual_of(Feedback(plan().id, Counter(7), vector(*WHOLE), "gone", b"", applied=True), SCHEMA)


# On disk.


def kept(path: Path, *, counter: int = 7, codec: str = "coarse") -> FeedbackFile:
    file = FeedbackFile(path, UNSYNCED_DISK)
    file.keep(feedback(counter, codec=codec))
    return file


def carried(file: FeedbackFile, of: Plan | None = None) -> list[float] | None:
    residual = file.residual(of or plan())
    return None if residual is None else residual.tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "error-feedback"


def test_at_first_there_is_nothing_and_no_file(path: Path) -> None:
    file = FeedbackFile(path)
    assert carried(file) is None
    file.settle(Counter(7))
    assert list(path.parent.iterdir()) == []


def test_it_survives_a_restart_before_and_after_the_receipt(path: Path) -> None:
    file = kept(path)
    for each in (file, FeedbackFile(path)):
        assert (each.counter, carried(each)) == (7, list(WHOLE))
    file.settle(Counter(7))
    for each in (file, FeedbackFile(path)):
        assert (each.counter, carried(each)) == (7, list(LEFT_OUT))


def test_an_update_is_settled_once_and_only_by_its_own_receipt(path: Path) -> None:
    file = kept(path)
    file.settle(Counter(6))
    assert carried(file) == list(WHOLE)
    for each in (file, file, FeedbackFile(path)):
        each.settle(Counter(7))
        assert carried(FeedbackFile(path)) == list(LEFT_OUT)


def test_the_next_update_is_not_settled_by_the_last_ones_receipt(path: Path) -> None:
    file = kept(path, counter=7)
    file.settle(Counter(7))
    file.keep(feedback(8))
    for each in (file, FeedbackFile(path)):
        assert (each.counter, carried(each)) == (8, list(WHOLE))


def test_a_receipt_writes_few_bytes(path: Path) -> None:
    file = kept(path)
    before = path.stat()
    file.settle(Counter(7))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert path.with_name("error-feedback.applied").stat().st_size == 16


def test_another_plan_starts_without_it_and_the_file_goes(path: Path) -> None:
    file = kept(path)
    assert carried(file, plan("other")) is None
    assert (file.counter, path.exists()) == (None, False)
    assert carried(file) is None


def test_after_a_codec_without_a_rate_was_applied_nothing_is_kept(path: Path) -> None:
    file = kept(path, codec="float32")
    assert carried(file) == list(WHOLE)
    file.settle(Counter(7))
    assert carried(file) is None
    assert (file.counter, path.exists()) == (None, False)


def test_a_power_cut_that_brings_the_file_back_does_not_bring_back_what_was_applied(path: Path) -> None:
    file = kept(path, codec="float32")
    content = path.read_bytes()
    file.settle(Counter(7))
    carried(file)
    path.write_bytes(content)
    assert carried(FeedbackFile(path)) is None


def test_every_flipped_byte_and_every_truncation_is_found(path: Path) -> None:
    kept(path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    damaged += [
        whole[:place] + bytes((whole[place] ^ flip,)) + whole[place + 1 :]
        for place in range(len(whole))
        for flip in (1, 128)
    ]
    for content in damaged:
        path.write_bytes(content)
        assert FeedbackFile(path, UNSYNCED_DISK).counter is None
        assert not path.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"\x07", lambda _: b""])
def test_without_knowing_what_was_applied_nothing_is_carried(
    path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    kept(path).settle(Counter(7))
    small = path.with_name("error-feedback.applied")
    small.write_bytes(damage(small.read_bytes()))
    with caplog.at_level(logging.WARNING):
        file = FeedbackFile(path, UNSYNCED_DISK)
    assert "error-feedback.applied is not usable" in caplog.text
    assert file.counter is None
    file.keep(feedback(8))
    file.settle(Counter(8))
    assert carried(FeedbackFile(path)) == list(LEFT_OUT)


def test_a_damaged_file_is_left_out_with_a_log_line(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(path)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert carried(FeedbackFile(path)) is None
    assert [getattr(record, "event", "") for record in caplog.records] == ["feedback.damaged"]


def test_a_codec_that_an_earlier_build_had_is_no_reason_to_stop(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept(path).settle(Counter(7))
    monkeypatch.setattr(codecs, "CODECS", {"float32": TABLE["float32"]})
    with caplog.at_level(logging.WARNING):
        assert carried(FeedbackFile(path)) is None
    assert "unknown codec 'coarse'" in caplog.text
    assert not path.exists()


def test_a_header_that_promises_more_parameters_than_the_file_has_allocates_nothing(path: Path) -> None:
    big = Feedback(plan().id, Counter(7), np.zeros(1 << 20, np.float32), "coarse", b"")
    FeedbackFile(path, UNSYNCED_DISK).keep(big)
    path.write_bytes(path.read_bytes()[:500])
    tracemalloc.start()
    try:
        assert FeedbackFile(path, UNSYNCED_DISK).counter is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()


def test_both_files_are_synced_and_those_of_simulated_devices_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    file = FeedbackFile(path)
    file.keep(feedback())
    file.settle(Counter(7))
    file.residual(plan("other"))
    folder = path.parent.name
    assert synced.pop(0) == folder  # at the start, for what a killed process has left
    assert synced == ["error-feedback.new", folder, "error-feedback.applied.new", folder, folder]
    synced.clear()
    kept(path).settle(Counter(7))
    assert synced == []


def test_what_a_killed_process_has_settled_is_durable_before_the_update_leaves_the_outbox() -> None:
    disk, path = SimulatedDisk(), Path("/state/error-feedback")
    disk.make_directory(path.parent)
    file = FeedbackFile(path, disk)
    file.keep(feedback())

    def kill(operation: Operation) -> None:
        if operation.kind == "replace":
            raise PowerCut

    disk.watch(kill)
    with pytest.raises(PowerCut):
        file.settle(Counter(7))
    started = disk.killed()
    assert carried(FeedbackFile(path, started)) == list(LEFT_OUT)
    for state in started.crash_states(np.random.default_rng(1)):
        assert carried(FeedbackFile(path, state)) == list(LEFT_OUT)


@pytest.mark.parametrize("name", ["error-feedback", "error-feedback.applied"])
def test_a_file_that_cannot_be_read_at_the_start_is_a_damaged_one(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk, path = SimulatedDisk(), Path("/state/error-feedback")
    disk.make_directory(path.parent)
    file = FeedbackFile(path, disk)
    file.keep(feedback())
    file.settle(Counter(7))
    disk.fail(
        lambda operation: errno.EIO if operation.kind == "read" and operation.path.name == name else None
    )
    with pytest.raises(OSError, match="Input/output error"):  # now nothing is given up: it may pass
        file.residual(plan())
    with caplog.at_level(logging.WARNING):
        again = FeedbackFile(path, disk)
    assert [getattr(record, "event", "") for record in caplog.records] == ["feedback.damaged"]
    assert (again.counter, carried(again)) == (None, None)
    disk.fail(None)
    again.keep(feedback(8))
    assert carried(FeedbackFile(path, disk)) == list(WHOLE)


def test_it_takes_the_memory_of_two_vectors_at_most(path: Path) -> None:
    size = 1 << 18
    schema = Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(size,)),))
    wide = plan("wide", schema)
    file = FeedbackFile(path, UNSYNCED_DISK)
    values = np.arange(size, dtype=np.float32)
    made = Feedback(wide.id, Counter(7), values, "coarse", TABLE["coarse"].encode(values, schema))

    def peak(work: Callable[[], object]) -> float:
        """In vectors, beyond what there was before."""
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        work()
        return (tracemalloc.get_traced_memory()[1] - before) / values.nbytes

    tracemalloc.start()
    try:
        # The test codec's payload is as large as a vector itself, and one more in each of these figures.
        assert peak(lambda: file.keep(made)) < 1 + 1.1
        assert peak(lambda: file.residual(wide)) < 1 + 1.1
        file.settle(Counter(7))
        assert peak(lambda: file.residual(wide)) < 1 + 2.1
        residual = file.residual(wide)
        assert (
            peak(lambda: corrected(values, residual)) < 0.3
        )  # the check for infinities is a byte a parameter
    finally:
        tracemalloc.stop()
