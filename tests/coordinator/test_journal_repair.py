"""Repairs: a wrong bit costs nothing, old damage costs history, new damage costs what is listed."""

import json
import os

import numpy as np
import pytest
from journal_files import DIRECTORY, some_files, with_files
from small_fleet import DEVICES, Bench, assert_same_state, constant, make_settings, make_update

from coordinator.aggregation import FedBuff
from coordinator.audit import audit
from coordinator.entries import ResetEntry
from coordinator.journal import History, JournalDamaged
from coordinator.journal.check import verify
from coordinator.journal.files import end_file, segment_file, snapshot_file
from coordinator.recovery import AlreadyRunning, unfinished_repair
from coordinator.repair import repair
from coordinator.server_optimizers import Momentum
from fedtide.wire.messages import Reason, Verdict

SETTINGS = make_settings(aggregator=FedBuff(goal=2), server_optimizer=Momentum())


def a_fleet(directory, *, snapshots=2, after=3):
    """A run with so many snapshots, so many updates after the last, and a version for each two updates."""
    bench, counter = Bench(directory, SETTINGS), 0
    for part in range(snapshots + 1):
        for _ in range(4 if part < snapshots else after):
            counter += 1
            bench.send(make_update(constant(counter / 8), counter=counter))
            bench.publish()
        if part < snapshots:
            bench.snapshot()
    bench.close()
    return bench


def segments(directory):
    return sorted(int(file.stem) for file in (directory / "journal").glob("*.segment"))


def spoil(path, offset, count=8):
    """More wrong bits than can be put right."""
    content = bytearray(path.read_bytes())
    for place in range(offset, offset + count):
        content[place] ^= 0x5A
    path.write_bytes(bytes(content))


def offset_of(directory, number):
    """Where a record begins in its segment."""
    stored = (each for each in History(directory / "journal").stored_after(number - 1))
    path, record = next(stored)
    return path, record.offset


def update_records(directory):
    history = History(directory / "journal")
    return [
        number for number, entry in history.entries_after(history.oldest - 1) if hasattr(entry, "counter")
    ]


def test_nothing_is_done_to_a_whole_journal(tmp_path):
    a_fleet(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "journal").iterdir()}
    done = repair(tmp_path)
    assert (done.damages, done.set_aside, done.directory, done.version) == ([], [], None, None)
    assert {file: file.read_bytes() for file in (tmp_path / "journal").iterdir()} == before


def test_a_single_wrong_bit_anywhere_in_a_segment_is_put_right_and_nothing_is_lost(tmp_path, monkeypatch):
    files, rng = some_files(batches=2, segments=2, size=30), np.random.default_rng(1)
    for path in [path for path in files if path.suffix == ".segment"]:
        for bit in rng.integers(8 * len(files[path]), size=60):
            content = bytearray(files[path])
            content[bit // 8] ^= 1 << int(bit) % 8
            disk = with_files({**files, path: bytes(content)})
            monkeypatch.setattr("coordinator.repair.lock_directory", lambda _: no_lock())
            done = repair(DIRECTORY.parent, disk)
            assert [damage.file for damage in done.corrected] == [path]
            assert disk.files()[path] == files[path]
            assert disk.files()[done.directory / path.name] == bytes(content)
            assert verify(DIRECTORY, disk).damages == []


def no_lock():
    return os.open(os.devnull, os.O_RDONLY)


def test_two_wrong_bits_in_two_records_are_both_put_right(tmp_path):
    bench = a_fleet(tmp_path)
    numbers = update_records(tmp_path)
    for path, offset in [offset_of(tmp_path, number) for number in (numbers[1], numbers[-1])]:
        content = bytearray(path.read_bytes())
        content[offset + 60] ^= 1
        path.write_bytes(bytes(content))
    done = repair(tmp_path)
    assert len(done.corrected) == 2
    assert_same_state(Bench(tmp_path, SETTINGS).state, bench.state)


def test_damage_before_a_whole_snapshot_costs_history_and_nothing_else(tmp_path):
    bench = a_fleet(tmp_path)
    path, offset = offset_of(tmp_path, update_records(tmp_path)[1])
    spoil(path, offset + 50)
    done = repair(tmp_path)
    assert (done.version, done.lost, done.corrected) == (None, [], [])
    assert done.history_from == segments(tmp_path)[0] > 1
    assert [file.name for file in done.set_aside] == ["end", path.name]
    assert verify(tmp_path / "journal").damages == []
    again = Bench(tmp_path, SETTINGS)
    assert_same_state(again.state, bench.state)
    assert again.journal.marks() == bench.journal.marks()
    assert audit(again.journal, again.recovered.models.base).snapshots == 1
    again.close()


@pytest.mark.parametrize("which", [0, 1], ids=["older", "newest"])
def test_a_damaged_snapshot_costs_at_most_history(tmp_path, which):
    bench = a_fleet(tmp_path)
    first = segments(tmp_path)[1 + which]
    spoil(snapshot_file(tmp_path / "journal", first), 300)
    done = repair(tmp_path)
    assert (done.version, done.lost) == (None, [])
    assert verify(tmp_path / "journal").damages == []
    again = Bench(tmp_path, SETTINGS)
    assert_same_state(again.state, bench.state)
    again.close()


def test_a_damaged_note_of_the_end_costs_nothing(tmp_path):
    bench = a_fleet(tmp_path)
    spoil(end_file(tmp_path / "journal"), 4)
    assert verify(tmp_path / "journal").damages
    repair(tmp_path)
    assert verify(tmp_path / "journal").damages == []
    again = Bench(tmp_path, SETTINGS)
    assert_same_state(again.state, bench.state)
    again.close()


def test_damage_after_the_newest_snapshot_goes_back_to_before_it_under_a_higher_version(tmp_path):
    bench = a_fleet(tmp_path, after=5)
    numbers = update_records(tmp_path)
    path, offset = offset_of(tmp_path, numbers[-3])  # updates 11, 12 and 13 come to nothing
    spoil(path, offset + 50)
    with pytest.raises(JournalDamaged, match=rf"record {numbers[-3]}: the body does not have its checksum"):
        Bench(tmp_path, SETTINGS)
    before = Bench(tmp_path / "before", SETTINGS)
    for counter in range(1, 11):
        before.send(make_update(constant(counter / 8), counter=counter))
    done = repair(tmp_path)
    assert done.version == 7  # six versions had been offered
    assert [(update.device, update.counter) for update in done.lost] == [(DEVICES[0], 12), (DEVICES[0], 13)]
    assert done.unreadable == 1
    listed = (done.directory / "lost-updates.jsonl").read_text().splitlines()
    assert [json.loads(line)["counter"] for line in listed] == [12, 13]
    assert verify(tmp_path / "journal").damages == []

    again = Bench(tmp_path, SETTINGS)
    assert again.state.version == 7
    assert again.state.parameters.tobytes() == before.state.parameters.tobytes()
    assert again.journal.totals()["applied"] == 10
    assert again.journal.marks()[DEVICES[0]].counter == 10
    (stale,) = again.send(make_update(counter=20))  # on a version from before
    assert (stale.verdict, stale.reason) == (Verdict.REJECTED, Reason.UNKNOWN_BASE)
    again.publish()
    (applied,) = again.send(make_update(counter=21, base_version=7, base_sha256=again.writer.published[7]))
    assert applied.verdict is Verdict.APPLIED
    again.close()
    before.close()
    assert bench.state.version == 6


def test_an_update_in_a_partly_full_buffer_before_the_damage_counts(tmp_path):
    a_fleet(tmp_path, after=4)
    path, offset = offset_of(tmp_path, update_records(tmp_path)[-3])  # update 9 waits in the buffer before it
    spoil(path, offset + 50)
    before = Bench(tmp_path / "before", SETTINGS)
    for counter in range(1, 10):
        before.send(make_update(constant(counter / 8), counter=counter))
    before.journal.commit(before.writer.flush())
    repair(tmp_path)
    again = Bench(tmp_path, SETTINGS)
    assert again.state.parameters.tobytes() == before.state.parameters.tobytes()
    again.close()
    before.close()


@pytest.mark.parametrize("what", ["header", "head", "cut", "zeros", "missing"])
def test_whatever_the_damage_to_the_last_segment_it_verifies_afterwards_and_goes_on(tmp_path, what):
    a_fleet(tmp_path)
    path = segment_file(tmp_path / "journal", segments(tmp_path)[-1])
    content = path.read_bytes()
    match what:
        case "header":
            spoil(path, 10)
        case "head":
            spoil(path, 62)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "zeros":
            path.write_bytes(content[:200] + bytes(len(content) - 200))
        case "missing":
            path.unlink()
    done = repair(tmp_path)
    assert verify(tmp_path / "journal").damages == []
    again = Bench(tmp_path, SETTINGS)
    assert again.state.version == done.version > 5  # which is what devices had been offered
    assert again.state.parameters.size == 8
    again.send(make_update(counter=100))
    again.close()
    resets = [entry for _, entry in History(tmp_path / "journal").entries_after(done.history_from - 1)
              if isinstance(entry, ResetEntry)]  # fmt: skip
    assert all("were damaged" in entry.why for entry in resets[1:])


def test_where_nothing_is_left_to_begin_from_the_repair_says_so(tmp_path):
    a_fleet(tmp_path, snapshots=0)
    spoil(segment_file(tmp_path / "journal", 1), 10)
    with pytest.raises(JournalDamaged, match="restore the directory from a copy"):
        repair(tmp_path)


def test_beside_a_running_coordinator_nothing_is_repaired(tmp_path):
    bench = Bench(tmp_path, SETTINGS)
    with pytest.raises(AlreadyRunning):
        repair(tmp_path)
    bench.close()


def test_a_second_repair_has_a_directory_of_its_own(tmp_path):
    a_fleet(tmp_path)
    for number in (1, 2):
        spoil(end_file(tmp_path / "journal"), 4)
        assert repair(tmp_path).directory == tmp_path / "set-aside" / f"{number:04d}"
        Bench(tmp_path, SETTINGS).close()


def test_a_repair_that_is_interrupted_keeps_coordinators_out_until_it_is_run_again(monkeypatch):
    """The power is cut after each operation of the disk; afterwards a second repair finishes the first."""
    monkeypatch.setattr("coordinator.repair.lock_directory", lambda _: no_lock())
    files = some_files(batches=2, segments=2, size=30)
    last = max(path for path in files if path.suffix == ".segment")
    spoiled = files[last][:150] + bytes(40) + files[last][190:]
    disk, left, rng = with_files({**files, last: spoiled}), [], np.random.default_rng(1)
    disk.watch(lambda _operation: left.extend(disk.crash_states(rng, most=2)))
    expected = repair(DIRECTORY.parent, disk)
    assert expected.version == 2  # versions 0 and 1 had been offered
    finished = 0
    for state in left:
        if verify(DIRECTORY, state).damages or unfinished_repair(DIRECTORY.parent, state) is not None:
            repair(DIRECTORY.parent, state)
        finished += 1
        assert verify(DIRECTORY, state).damages == []
        history = History(DIRECTORY, state)
        assert history.totals() == History(DIRECTORY, disk).totals()
        assert history.ledger.line_since in (2, 3)  # 3 where the reset was durable and its end was not
    assert finished > 40


def test_the_next_run_claims_a_higher_epoch_than_those_whose_claims_were_lost(tmp_path):
    """The broker keeps the last run's state: one of a lower epoch would take it for another coordinator's."""
    bench = a_fleet(tmp_path)
    spoiled = bench.journal.last_sequence() + 1
    bench = Bench(tmp_path, SETTINGS)
    for counter in (90, 91):
        bench.journal.next_epoch()
        bench.send(make_update(counter=counter))
    last = bench.journal.next_epoch()
    bench.close()
    path, offset = offset_of(tmp_path, spoiled)
    spoil(path, offset + 40)
    repair(tmp_path)
    again = Bench(tmp_path, SETTINGS)
    assert again.journal.next_epoch() > last == 3
    again.close()
