"""Power cuts and failing disks: whatever was committed is there, whole, exactly once, and nothing half is.

A run of a coordinator's storage, journal and models, goes on a simulated disk. After each operation of the
disk the power is cut in many ways, and each state that may be left is recovered.
"""

import errno
import os
from contextlib import suppress

import numpy as np
import pytest
from simulated_disk import SimulatedDisk, at
from small_fleet import DEVICES, PLAN, Bench, assert_same_state, constant, make_settings, make_update

from coordinator import recovery
from coordinator.aggregation import FedBuff
from coordinator.audit import audit
from coordinator.entries import UpdateEntry
from coordinator.journal import StorageFailed
from coordinator.journal.check import verify
from coordinator.recovery import recover
from coordinator.server_optimizers import Momentum
from coordinator.settings import Journal
from fedtide.wire.messages import Verdict
from fedtide.wire.parameters import fingerprint

SETTINGS = make_settings(
    aggregator=FedBuff(goal=3), server_optimizer=Momentum(), journal=Journal(keep_bytes=4_000)
)


@pytest.fixture(autouse=True)
def no_lock(monkeypatch):
    """What a cut leaves is recovered while the run goes on, under the same names on another disk."""
    monkeypatch.setattr(recovery, "lock_directory", lambda _directory: os.open(os.devnull, os.O_RDONLY))


class Run:
    """Two runs of a coordinator, one after the other.

    Attributes:
        sent: every update that may be in the journal, in order.
        acknowledged: those of them that have a receipt.
        offered: fingerprints of the versions on record before devices see them.
    """

    def __init__(self, directory, disk):
        self.directory, self.disk = directory, disk
        self.sent, self.acknowledged, self.offered = [], [], {}

    def whole(self):
        counter = 0
        for _ in range(2):
            bench = Bench(self.directory, SETTINGS, disk=self.disk)
            try:
                bench.journal.next_epoch()
                for _ in range(3):
                    counter += 1
                    self.send(bench, counter)
                    bench.publish()
                    self.offered.update(bench.writer.published)
                bench.snapshot()
                counter += 1
                self.send(bench, counter)
            finally:
                bench.close()

    def send(self, bench, counter):
        batch = [(device, counter) for device in DEVICES[:2]]
        self.sent += batch
        receipts = bench.send(
            *(make_update(constant(counter / 8), device=device, counter=counter) for device, counter in batch)
        )
        assert {receipt.verdict for receipt in receipts} <= {Verdict.APPLIED, Verdict.DUPLICATE}
        self.acknowledged += batch

    def check(self, disk):
        """Recover what is left and hold it against what was acknowledged."""
        recovered = recover(self.directory, SETTINGS, PLAN, disk)
        try:
            journal = recovered.journal
            if journal.oldest == 1:
                found = [
                    (entry.device, entry.counter)
                    for _, entry in journal.entries_after(0)
                    if isinstance(entry, UpdateEntry)
                ]
                assert found == self.sent[: len(found)]
            applied = journal.totals().get("applied", 0)
            assert len(self.acknowledged) <= applied <= len(self.sent)
            assert applied % 2 == 0, "half of a batch"
            marks = {(device, mark.counter) for device, mark in journal.marks().items()}
            assert marks == set(self.sent[max(0, applied - 2) : applied])
            for row in journal.published():
                assert fingerprint(recovered.models.parameters(row.version)) == row.fingerprint
            for version, sha256 in self.offered.items():
                if version in journal.ledger.published:
                    assert journal.ledger.published[version].fingerprint == sha256
            assert set(self.offered) <= set(journal.ledger.published)
            return recovered.state
        finally:
            recovered.close()


def crash_everywhere(tmp_path, seed, each):
    """How many states were recovered: ``each`` at most for every operation."""
    disk, rng = SimulatedDisk(), np.random.default_rng(seed)
    run, states = Run(tmp_path / "state", disk), 0

    def cut(_operation):
        nonlocal states
        for left in disk.crash_states(rng, most=each):
            state = run.check(left)
            if states % 10 == 0:
                twice(run, left, state)
            states += 1

    disk.watch(cut)
    run.whole()
    return states


def twice(run, left, state):
    """What was recovered verifies, replays to the same, and is recovered again as it was."""
    journal = run.directory / "journal"
    found = verify(journal, left)
    assert found.damages == []
    assert found.torn_bytes == 0
    recovered = recover(run.directory, SETTINGS, PLAN, left)
    try:
        audit(recovered.journal, recovered.models.base)
        assert_same_state(recovered.state, state)
    finally:
        recovered.close()


def test_after_a_power_cut_at_any_moment_every_committed_batch_is_there_once(tmp_path):
    assert crash_everywhere(tmp_path, seed=1, each=7) > 800


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
def test_after_ten_thousand_power_cuts_every_committed_batch_is_there_once(tmp_path, seed):
    assert crash_everywhere(tmp_path, seed=seed, each=40) > 3_000


def operations(tmp_path):
    disk = SimulatedDisk()
    Run(tmp_path / "whole", disk).whole()
    return disk.operations


def fail_everywhere(tmp_path, errors):
    """Let each operation fail in a run of its own, with each of its errors; how many runs ended by it."""
    rng, ended = np.random.default_rng(1), 0
    for index in range(operations(tmp_path)):
        for number in errors(index):
            disk = SimulatedDisk()
            run = Run(tmp_path / "state", disk)
            disk.fail(at(index, number))
            with suppress(StorageFailed):
                run.whole()
                ended -= 1
            ended += 1
            disk.fail(None)
            if index % 4 < 2 and not disk.is_read_only:  # else there is no start before the machine's
                run.check(disk.killed())
            else:
                run.check(next(disk.crash_states(rng, most=2)))
    return ended


def test_when_any_operation_of_the_disk_fails_nothing_acknowledged_is_lost(tmp_path):
    """And what failed says so, instead of going on."""
    assert fail_everywhere(tmp_path, lambda index: [(errno.ENOSPC, errno.EIO)[index % 2]]) > 100


@pytest.mark.long
def test_whatever_way_any_operation_fails_nothing_acknowledged_is_lost(tmp_path):
    assert fail_everywhere(tmp_path, lambda _index: [errno.ENOSPC, errno.EIO, errno.EDQUOT]) > 300


def test_a_batch_whose_sync_failed_is_taken_back_at_once(tmp_path):
    """The next start, on the same machine, must not take it for durable from the system's memory."""
    disk = SimulatedDisk()
    bench = Bench(tmp_path / "state", SETTINGS, disk=disk)
    bench.send(make_update(counter=1))
    disk.fail(lambda operation: errno.EIO if operation.kind == "sync" else None)
    with pytest.raises(
        StorageFailed, match=r"syncing \d+ bytes failed: Input/output error. Everything up to record"
    ):
        bench.send(make_update(counter=2))
    disk.fail(None)
    with pytest.raises(StorageFailed):  # for ever: no sync is tried again
        bench.send(make_update(counter=3))
    bench.close()
    again = Bench(tmp_path / "state", SETTINGS, disk=disk.killed())
    assert again.journal.totals() == {"applied": 1}
    again.close()


def assert_what_a_restart_receipts_survives_a_power_cut(tmp_path, killed):
    """The disk of a killed process shows a batch that was never synced."""
    again = Bench(tmp_path / "state", SETTINGS, disk=killed)
    (receipt,) = again.send(make_update(counter=1))
    assert receipt.verdict is Verdict.DUPLICATE
    for left in killed.crash_states(np.random.default_rng(0)):
        last = Bench(tmp_path / "state", SETTINGS, disk=left)
        assert last.journal.totals()["applied"] == 1
        last.close()
    again.close()


def test_what_was_written_but_not_synced_before_a_kill_is_on_the_disk_before_it_counts(tmp_path):
    """A kill between append and sync, a restart that finds the batch, a receipt for it, a power cut."""
    disk = SimulatedDisk()
    bench = Bench(tmp_path / "state", SETTINGS, disk=disk)
    log = bench.journal._log
    log.sync = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.send(make_update(counter=1))
    assert_what_a_restart_receipts_survives_a_power_cut(tmp_path, disk.killed())
    bench.close()


def test_what_a_failed_sync_left_is_written_anew_before_it_counts(tmp_path):
    """The machine's memory still shows the batch, and no later sync of that file would write it."""
    disk = SimulatedDisk()
    bench = Bench(tmp_path / "state", SETTINGS, disk=disk)
    disk.fail(lambda operation: errno.EIO if operation.kind in {"sync", "truncate"} else None)
    with pytest.raises(StorageFailed):
        bench.send(make_update(counter=1))
    bench.close()
    disk.fail(None)
    assert_what_a_restart_receipts_survives_a_power_cut(tmp_path, disk.killed())
