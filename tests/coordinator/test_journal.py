"""The journal: a batch happens wholly or not at all, and everything comes back after a restart."""

import os
import sqlite3
import subprocess
import sys
import textwrap

import pytest
from small_fleet import DEVICES, PLAN, make_settings

from coordinator.aggregation import FedAsync, FedAvg, FedBuff
from coordinator.entries import FlushEntry, RulesEntry, UpdateEntry
from coordinator.journal import Batch, EvaluationResult, Journal, JournalDamaged, Published, SnapshotRow
from coordinator.marks import Mark
from coordinator.recovery import AlreadyRunning, recover
from coordinator.server_optimizers import SGD, Adam, Yogi
from coordinator.settings import Rules
from fedtide.wire.messages import Reason, Verdict

PUMP, OTHER = DEVICES[:2]
APPLIED = Mark(PUMP, 5, 0b101, Verdict.APPLIED, None, "", 2, 1, 3, 1.5)
REJECTED = Mark(OTHER, 2**63 - 1, 2**63 - 1, Verdict.REJECTED, Reason.TOO_STALE, "é", 0, 1, 0, 0.0)


def update(counter=1, device=PUMP, weight=0.5):
    return UpdateEntry(device, counter, 3, weight, 7.0, b"\x00\xff" * 10)


@pytest.fixture
def open_journal(tmp_path):
    opened = []

    def open_one():
        opened.append(Journal(tmp_path / "journal.sqlite"))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(open_journal):
    return open_journal()


def test_a_new_journal_is_empty(journal):
    assert list(journal.entries_after(0)) == []
    assert (journal.marks(), journal.totals(), journal.published()) == ({}, {}, [])
    assert (journal.snapshots(), journal.evaluations(), journal.last_sequence()) == ([], [], 0)


def test_a_batch_comes_back_after_a_restart(open_journal):
    entries = [
        RulesEntry(Rules(aggregator=FedBuff(goal=3), server_optimizer=Adam(learning_rate=0.1))),
        RulesEntry(Rules(aggregator=FedAsync(mixing=0.1), server_optimizer=Yogi())),
        RulesEntry(Rules(aggregator=FedAvg(cohort=2), server_optimizer=SGD())),
        update(counter=2**63 - 1, weight=1 / 3),
        FlushEntry(),
    ]
    first = open_journal()
    first.commit(Batch(entries, [APPLIED, REJECTED], {"applied": 1, "duplicate": 2}))
    first.close()

    second = open_journal()
    assert list(second.entries_after(0)) == list(enumerate(entries, start=1))
    assert list(second.entries_after(3)) == [(4, entries[3]), (5, entries[4])]
    assert second.marks() == {PUMP: APPLIED, OTHER: REJECTED}
    assert second.totals() == {"applied": 1, "duplicate": 2}
    assert second.last_sequence() == 5


def test_totals_add_up_over_batches(journal):
    journal.commit(Batch(totals={"applied": 2, "duplicate": 1}))
    journal.commit(Batch(totals={"applied": 40}))
    assert journal.totals() == {"applied": 42, "duplicate": 1}


def test_a_mark_replaces_its_devices_earlier_one(journal):
    journal.commit(Batch(marks=[APPLIED]))
    newer = Mark(PUMP, 6, 0, Verdict.REJECTED, Reason.NOT_FINITE, "NaN", 2, 2, 3, 1.5)
    journal.commit(Batch(marks=[newer]))
    assert journal.marks() == {PUMP: newer}


def test_an_entry_that_fails_takes_its_whole_batch_with_it(journal):
    journal.commit(Batch([update(1)], [], {"applied": 1}))
    same_again = Batch([update(2), FlushEntry(), update(1)], [APPLIED], {"applied": 2})
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit(same_again)
    assert list(journal.entries_after(0)) == [(1, update(1))]
    assert (journal.marks(), journal.totals()) == ({}, {"applied": 1})


def test_a_total_that_fails_takes_its_whole_batch_with_it(journal):
    with pytest.raises(sqlite3.Error):
        journal.commit(Batch([update(1)], [APPLIED], {"applied": None}))
    assert (list(journal.entries_after(0)), journal.marks(), journal.totals()) == ([], {}, {})


def test_after_a_failed_batch_the_next_one_is_committed(journal):
    journal.commit(Batch([update(1)]))
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit(Batch([update(1)]))
    journal.commit(Batch([update(2)]))
    assert [entry.counter for _, entry in journal.entries_after(0)] == [1, 2]


def test_one_counter_of_two_devices_is_two_updates(journal):
    journal.commit(Batch([update(1, PUMP), update(1, OTHER)]))
    assert journal.last_sequence() == 2


def test_what_was_not_committed_when_the_process_was_killed_never_happened(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from coordinator.entries import FlushEntry
        from coordinator.journal import Batch, Journal
        journal = Journal(Path({str(tmp_path / "journal.sqlite")!r}))
        journal.commit(Batch([FlushEntry()], [], {{"applied": 1}}))
        class KilledInTheMiddle:
            def __iter__(self):
                yield FlushEntry()
                os.kill(os.getpid(), signal.SIGKILL)
        journal.commit(Batch(KilledInTheMiddle(), [], {{"applied": 1}}))
    """)
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert killed.returncode == -9
    journal = Journal(tmp_path / "journal.sqlite")
    assert list(journal.entries_after(0)) == [(1, FlushEntry())]
    assert journal.totals() == {"applied": 1}
    journal.close()


def test_epochs_grow_by_one_with_every_start(open_journal):
    first = open_journal()
    assert (first.next_epoch(), first.next_epoch()) == (1, 2)
    first.close()
    assert open_journal().next_epoch() == 3


def test_the_journal_remembers_its_plan(open_journal):
    first = open_journal()
    assert first.plan_id("a") == "a"
    first.close()
    assert open_journal().plan_id("b") == "a"


def test_only_the_last_published_versions_are_kept(journal):
    for version in range(5):
        journal.add_published(Published(version, bytes([version]) * 32, float(version)), keep=3)
    assert journal.published() == [Published(v, bytes([v]) * 32, float(v)) for v in (2, 3, 4)]


def test_a_published_version_keeps_the_fingerprint_of_its_own_parameters(journal):
    row = Published(1, b"rounded", 1.0, b"exact")
    journal.add_published(row, keep=3)
    assert journal.published() == [row]


def test_a_version_published_again_keeps_its_first_moment(journal):
    journal.add_published(Published(1, b"first", 1.0), keep=3)
    journal.add_published(Published(1, b"first", 2.0), keep=3)
    assert journal.published() == [Published(1, b"first", 1.0)]


def test_evaluations_and_snapshots_come_back_in_order(journal):
    results = [EvaluationResult(1, 0.5, None, 10.0), EvaluationResult(4, 0.25, 0.9, 11.0)]
    for result in reversed(results):
        journal.add_evaluation(result)
    assert journal.evaluations() == results
    for sequence in (3, 9, 5):
        journal.add_snapshot(SnapshotRow(sequence, 1, b"digest"))
    journal.forget_snapshot(5)
    assert [row.sequence for row in journal.snapshots()] == [9, 3]


def test_a_journal_of_another_format_is_refused(tmp_path):
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = 3 WHERE name = 'format'")
    database.close()
    with pytest.raises(JournalDamaged, match="has format 3; this build reads format 2"):
        Journal(path)


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"these are not the pages of a database" * 1000)
    with pytest.raises(JournalDamaged, match="cannot be opened"):
        Journal(path)


def test_an_entry_of_an_unknown_kind_is_refused(journal):
    journal._database.execute("INSERT INTO entries (kind) VALUES ('teleport')")
    with pytest.raises(JournalDamaged, match="entry 1 has the unknown kind 'teleport'"):
        list(journal.entries_after(0))


def test_two_coordinators_on_one_directory_are_one_too_many(tmp_path):
    first = recover(tmp_path, make_settings(), PLAN)
    with pytest.raises(AlreadyRunning, match="another coordinator is running"):
        recover(tmp_path, make_settings(), PLAN)
    first.close()
    recover(tmp_path, make_settings(), PLAN).close()


def test_two_processes_on_one_directory_are_one_too_many(tmp_path):
    first = recover(tmp_path, make_settings(), PLAN)
    program = textwrap.dedent(f"""
        from pathlib import Path
        from coordinator.recovery import AlreadyRunning, _lock
        try:
            _lock(Path({str(tmp_path / "lock")!r}))
        except AlreadyRunning:
            print("kept out")
    """)
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, text=True).strip() == "kept out"
    first.close()
    assert subprocess.check_output(command, text=True).strip() == ""


def test_a_recovery_that_fails_keeps_nobody_out(tmp_path):
    recover(tmp_path, make_settings(), PLAN).close()
    journal = Journal(tmp_path / "journal.sqlite")
    journal._database.execute("UPDATE meta SET value = 'another' WHERE name = 'plan'")
    journal.close()
    for _ in range(2):
        with pytest.raises(JournalDamaged, match="of plan another"):
            recover(tmp_path, make_settings(), PLAN)
