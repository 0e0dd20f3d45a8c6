"""The journal: a batch happens wholly or not at all, and everything comes back after a restart."""

import os
import subprocess
import sys
import textwrap
import zlib

import pytest
from small_fleet import DEVICES, PLAN, constant, make_settings, make_update

from coordinator.aggregation import FedAsync, FedAvg, FedBuff
from coordinator.entries import FlushEntry, RulesEntry, UpdateEntry
from coordinator.journal import (
    Batch,
    Counted,
    EvaluationResult,
    History,
    Journal,
    JournalDamaged,
    JudgedTwice,
    Published,
    Rejected,
)
from coordinator.journal.facts import to_body
from coordinator.journal.format import HEADER_BYTES, SegmentHeader, encode
from coordinator.journal.ledger import Ledger
from coordinator.marks import Mark
from coordinator.recovery import AlreadyRunning, lock_directory, recover
from coordinator.server_optimizers import SGD, Adam, Yogi
from coordinator.settings import Rules
from fedtide.wire.messages import Reason, Verdict

PUMP, OTHER = DEVICES[:2]
LARGEST = 2**63 - 1


def update(counter=1, device=PUMP, weight=0.5, staleness=3):
    return UpdateEntry(device, counter, 3, weight, 7.0, b"\x00\xff" * 10, staleness)


@pytest.fixture
def open_journal(tmp_path):
    opened = []

    def open_one():
        opened.append(Journal(tmp_path / "journal"))
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
    assert (list(journal.snapshots()), journal.evaluations(), journal.last_sequence()) == ([], [], 0)


def test_a_batch_comes_back_after_a_restart(open_journal):
    records = [
        RulesEntry(Rules(aggregator=FedBuff(goal=3), server_optimizer=Adam(learning_rate=0.1))),
        RulesEntry(Rules(aggregator=FedAsync(mixing=0.1), server_optimizer=Yogi())),
        RulesEntry(Rules(aggregator=FedAvg(cohort=2), server_optimizer=SGD())),
        update(counter=LARGEST, weight=1 / 3),
        Rejected(OTHER, LARGEST, Reason.TOO_STALE, "é"),
        FlushEntry(),
        Counted("duplicate", 2),
    ]
    first = open_journal()
    first.commit(Batch(records))
    first.close()

    second = open_journal()
    entries = [(number, record) for number, record in enumerate(records, start=1) if number not in (5, 7)]
    assert list(second.records_after(0)) == list(enumerate(records, start=1))
    assert list(second.entries_after(0)) == entries
    assert list(second.entries_after(3)) == entries[3:]
    assert second.marks() == {
        PUMP: Mark(PUMP, LARGEST, 1, Verdict.APPLIED, None, "", 1, 0, 3, 1 / 3 * 7),
        OTHER: Mark(OTHER, LARGEST, 0, Verdict.REJECTED, Reason.TOO_STALE, "é", 0, 1, 0, 0.0),
    }
    assert second.totals() == {"applied": 1, "rejected:too-stale": 1, "duplicate": 2}
    assert second.last_sequence() == 7


def test_totals_add_up_over_batches(journal):
    journal.add(update(1), update(2), Counted("duplicate", 1))
    journal.add(*(update(counter) for counter in range(3, 43)))
    assert journal.totals() == {"applied": 42, "duplicate": 1}


def test_a_mark_follows_its_devices_updates_in_order(journal):
    journal.add(update(5), Rejected(PUMP, 6, Reason.NOT_FINITE, "NaN"), update(8))
    assert journal.marks() == {PUMP: Mark(PUMP, 8, 0b1001, Verdict.APPLIED, None, "", 2, 1, 6, 7.0)}


@pytest.mark.parametrize(
    "batch",
    [
        [update(2), FlushEntry(), update(1)],
        [update(2), update(2)],
        [Rejected(PUMP, 1, Reason.TOO_STALE, "")],
    ],
)
def test_an_update_that_was_judged_before_takes_its_whole_batch_with_it(journal, batch):
    journal.add(update(1))
    with pytest.raises(
        JudgedTwice, match=r"update \d of pump-0 was judged before: its highest counter is \d"
    ):
        journal.commit(Batch([Counted("duplicate", 1), *batch]))
    assert list(journal.records_after(0)) == [(1, update(1))]
    assert journal.totals() == {"applied": 1}
    journal.add(update(2))
    assert [entry.counter for _, entry in journal.entries_after(0)] == [1, 2]


def test_one_counter_of_two_devices_is_two_updates(journal):
    journal.commit(Batch([update(1, PUMP), update(1, OTHER)]))
    assert journal.last_sequence() == 2


def test_an_empty_batch_writes_nothing(journal, tmp_path):
    journal.commit(Batch())
    assert (tmp_path / "journal" / "000000000001.segment").stat().st_size == HEADER_BYTES


def test_what_was_not_whole_when_the_process_was_killed_never_happened(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from coordinator.entries import FlushEntry
        from coordinator.journal import Batch, Counted, Journal
        journal = Journal(Path({str(tmp_path / "journal")!r}))
        journal.commit(Batch([FlushEntry(), Counted("applied", 1)]))
        append = journal._log.append
        journal._log.append = lambda content: (append(content[:-1]), os.kill(os.getpid(), signal.SIGKILL))
        journal.commit(Batch([FlushEntry(), Counted("applied", 1)]))
    """)
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert killed.returncode == -9
    journal = Journal(tmp_path / "journal")
    assert list(journal.entries_after(0)) == [(1, FlushEntry())]
    assert journal.totals() == {"applied": 1}
    journal.close()


def test_epochs_grow_by_one_with_every_start(open_journal):
    first = open_journal()
    assert (first.next_epoch(), first.next_epoch()) == (1, 2)
    first.close()
    assert open_journal().next_epoch() == 3


def test_the_journal_remembers_its_plan(tmp_path):
    first = recover(tmp_path, make_settings(), PLAN)
    assert first.journal.plan_id() == PLAN.plan.id
    first.close()
    journal = Journal(tmp_path / "journal")
    assert journal.plan_id() == PLAN.plan.id
    journal.close()


def test_only_the_last_published_versions_are_kept(open_journal):
    journal = open_journal()
    for version in range(5):
        journal.add_published(Published(version, bytes([version]) * 32, float(version)), keep=3)
    expected = [Published(v, bytes([v]) * 32, float(v)) for v in (2, 3, 4)]
    assert journal.published() == expected
    journal.close()
    assert open_journal().published() == expected


def test_a_published_version_keeps_the_fingerprint_of_its_own_parameters(journal):
    row = Published(1, b"rounded", 1.0, b"exact")
    journal.add_published(row, keep=3)
    assert journal.published() == [row]


def test_a_version_published_again_keeps_its_first_moment(journal):
    journal.add_published(Published(1, b"first", 1.0), keep=3)
    journal.add_published(Published(1, b"first", 2.0), keep=3)
    assert journal.published() == [Published(1, b"first", 1.0)]


def test_evaluations_come_back_in_order_and_the_last_thousand_are_kept(open_journal):
    results = [EvaluationResult(1, 0.5, None, 10.0), EvaluationResult(4, 0.25, 0.9, 11.0)]
    first = open_journal()
    for result in reversed(results):
        first.add_evaluation(result)
    assert first.evaluations() == results
    first.add(*(EvaluationResult(version, None, None, 0.0) for version in range(5, 1004)))
    assert [result.version for result in first.evaluations()] == list(range(4, 1004))
    first.close()
    assert open_journal().evaluations()[0] == results[1]


def test_the_ledger_comes_back_from_its_bytes(journal):
    journal.add(update(1), Rejected(OTHER, 2, Reason.TOO_STALE, ""), Counted("duplicate", 2))
    journal.add_published(Published(0, b"x" * 32, 1.0), keep=3)
    journal.add_evaluation(EvaluationResult(0, 1.0, None, 2.0))
    journal.next_epoch()
    assert Ledger.from_bytes(journal.ledger.to_bytes()) == journal.ledger
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger.from_bytes(b"\x93")


def test_another_process_sees_what_was_committed_while_it_is_written(journal, tmp_path):
    for number in range(1, 4):
        journal.add(update(number))
        seen = History(tmp_path / "journal")
        assert [entry.counter for _, entry in seen.entries_after(0)] == list(range(1, number + 1))
        assert seen.totals() == {"applied": number}


def test_reading_changes_nothing(journal, tmp_path):
    journal.add(update(1))
    segment = tmp_path / "journal" / "000000000001.segment"
    segment.write_bytes(segment.read_bytes() + b"\xf5rec half of a batch")
    before = {file.name: file.read_bytes() for file in (tmp_path / "journal").iterdir()}
    assert History(tmp_path / "journal").totals() == {"applied": 1}
    assert {file.name: file.read_bytes() for file in (tmp_path / "journal").iterdir()} == before


def test_where_there_is_no_journal_a_reader_finds_an_empty_one(tmp_path):
    assert History(tmp_path / "nowhere").totals() == {}
    assert list(History(tmp_path / "nowhere").entries_after(0)) == []


def test_a_journal_of_another_format_is_refused(tmp_path):
    Journal(tmp_path).close()
    segment = tmp_path / "000000000001.segment"
    fields = bytearray(segment.read_bytes()[: HEADER_BYTES - 4])
    fields[11] = 3
    segment.write_bytes(bytes(fields) + zlib.crc32(bytes(fields)).to_bytes(4, "big"))
    with pytest.raises(JournalDamaged, match="has format 3; this build reads format 1"):
        Journal(tmp_path)


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "000000000001.segment").write_bytes(b"these are not records" * 1000)
    with pytest.raises(JournalDamaged, match=r"000000000001.segment, byte 0: the header"):
        Journal(tmp_path)


def test_a_record_of_an_unknown_kind_is_refused(tmp_path):
    header = SegmentHeader(1, 0, None)
    batch = encode([to_body(FlushEntry()), (99, b"\x90")], sequence=1, chain=0, salt=header.salt)
    (tmp_path / "000000000001.segment").write_bytes(header.to_bytes() + batch.content)
    with pytest.raises(JournalDamaged, match=r"byte 95, record 2: the unknown kind 99"):
        Journal(tmp_path)


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
        from coordinator.recovery import AlreadyRunning, lock_directory
        try:
            lock_directory(Path({str(tmp_path)!r}))
        except AlreadyRunning:
            print("kept out")
    """)
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, text=True).strip() == "kept out"
    first.close()
    assert subprocess.check_output(command, text=True).strip() == ""


def test_a_recovery_that_fails_keeps_nobody_out(tmp_path):
    recover(tmp_path, make_settings(), PLAN).close()
    segment = tmp_path / "journal" / "000000000001.segment"
    segment.write_bytes(bytes(100))
    for _ in range(2):
        with pytest.raises(JournalDamaged, match="byte 0"):
            recover(tmp_path, make_settings(), PLAN)
    os.close(lock_directory(tmp_path))


def test_a_fleets_memory_of_an_update_is_what_its_journal_says(open_bench):
    """The writer's marks, made live, and the ledger's, folded from records, are the same."""
    bench = open_bench()
    bench.send(
        make_update(constant(1.0), counter=1),
        make_update(constant(1.0), counter=1),
        make_update(counter=2, plan="0" * 32),
        make_update(constant(2.0), counter=3),
    )
    assert bench.journal.marks() == bench.writer.marks
    bench.close()
    assert open_bench().journal.marks() == bench.writer.marks
