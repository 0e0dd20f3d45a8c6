"""Defects that each break a promise, as exact replacements in the source, and the tests that must notice.

Most of them have been in somebody's software: the order of two effects the wrong way round, a sync left out,
a memory that does not outlive a restart.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Defect:
    """One planted mistake.

    Attributes:
        name: one word for the command line.
        says: what it does wrong.
        file: below the repository.
        text: stands there exactly once.
        planted: takes its place.
        tests: what pytest is given; at least one of these must fail.
    """

    name: str
    says: str
    file: str
    text: str
    planted: str
    tests: tuple[str, ...]


_SERVICE: Final = "tests/coordinator/test_coordinator_service.py"
_NOTHING_SENT: Final = f"{_SERVICE}::test_when_the_disk_is_full_the_coordinator_ends_and_acknowledges_nothing"
_JOURNAL_CRASHES: Final = (
    "tests/coordinator/test_journal_crashes.py::"
    "test_after_a_power_cut_at_any_moment_every_committed_batch_is_there_once"
)
_TAKEN_BACK: Final = (
    "tests/coordinator/test_journal_crashes.py::test_a_batch_whose_sync_failed_is_taken_back_at_once"
)
_WRITTEN_ANEW: Final = (
    "tests/coordinator/test_journal_crashes.py::test_what_a_failed_sync_left_is_written_anew_before_it_counts"
)
_WRITE_DURABLY: Final = "tests/wire/test_disk.py"
_OUTBOX: Final = "tests/edge_agent/test_outbox.py"

DEFECTS: Final = (
    Defect(
        "acknowledged-before-sync",
        "the coordinator acknowledges to the broker before the journal is durable",
        "coordinator/committer.py",
        """\
            reached(Step.UPDATES_FOLDED)
            await self._commit(batch)
            self.accounting.judged(batch.totals)
            self._line.leave(part)
            self._judged.set()
            self.staleness.update(judged.staleness)
            for waiting in part:
                waiting.connection.acknowledge(waiting.delivery)
                reached(Step.UPDATE_ACKNOWLEDGED)
""",
        """\
            reached(Step.UPDATES_FOLDED)
            for waiting in part:
                waiting.connection.acknowledge(waiting.delivery)
                reached(Step.UPDATE_ACKNOWLEDGED)
            await self._commit(batch)
            self.accounting.judged(batch.totals)
            self._line.leave(part)
            self._judged.set()
            self.staleness.update(judged.staleness)
""",
        (_NOTHING_SENT,),
    ),
    Defect(
        "receipt-before-commit",
        "devices get their receipts before the journal is durable",
        "coordinator/committer.py",
        """\
            reached(Step.UPDATES_FOLDED)
            await self._commit(batch)
""",
        """\
            reached(Step.UPDATES_FOLDED)
            await self._send_receipts(part, judged.receipts)
            await self._commit(batch)
""",
        (_NOTHING_SENT,),
    ),
    Defect(
        "journal-not-synced",
        "a batch is appended to the journal and never synced",
        "coordinator/journal/store.py",
        """\
            self._log.sync()
        reached(Step.BATCH_SYNCED)
""",
        """\
            pass
        reached(Step.BATCH_SYNCED)
""",
        (_JOURNAL_CRASHES,),
    ),
    Defect(
        "failed-sync-forgotten",
        "after a sync that failed the journal takes the next batch as if nothing had been",
        "coordinator/journal/store.py",
        """\
            self._append(encoded.content)
        except StorageFailed as error:
            self._failed = error
            self._cut_off()
            raise
""",
        """\
            self._append(encoded.content)
        except StorageFailed:
            self._failed = None
            self._cut_off()
            raise
""",
        (_TAKEN_BACK,),
    ),
    Defect(
        "torn-batch-not-taken-back",
        "what a failed append left in the journal stays there",
        "coordinator/journal/store.py",
        """\
            self._failed = error
            self._cut_off()
            raise
""",
        """\
            self._failed = error
            raise
""",
        (_TAKEN_BACK,),
    ),
    Defect(
        "unsynced-tail-counts",
        "what a killed process wrote and never synced counts after the restart",
        "coordinator/journal/store.py",
        """\
        if tail.whole > max(tail.synced, HEADER_BYTES):
            self._write_again(tail.whole)
        elif tail.size""",
        """\
        if tail.size""",
        (_WRITTEN_ANEW,),
    ),
    Defect(
        "snapshot-recorded-before-written",
        "a segment begins with a snapshot that is not on the disk yet",
        "coordinator/journal/store.py",
        """\
                write_durably(self._disk, path, content)
                reached(Step.SNAPSHOT_WRITTEN)
                self._begin_segment(SegmentHeader(first, self._chain, hashlib.sha256(content).digest()))
""",
        """\
                self._begin_segment(SegmentHeader(first, self._chain, hashlib.sha256(content).digest()))
                write_durably(self._disk, path, content)
                reached(Step.SNAPSHOT_WRITTEN)
""",
        (_JOURNAL_CRASHES,),
    ),
    Defect(
        "directory-not-synced",
        "a file is renamed into place and its directory never synced",
        "fedtide/wire/disk.py",
        """\
    disk.replace(temporary, path)
    disk.sync_directory(path.parent)
""",
        """\
    disk.replace(temporary, path)
""",
        (_WRITE_DURABLY,),
    ),
    Defect(
        "content-not-synced",
        "a new file is renamed into place before its content is on the disk",
        "fedtide/wire/disk.py",
        """\
            file.write(content)
            if self._sync:
                file.flush()
                os.fsync(file.fileno())
""",
        """\
            file.write(content)
""",
        (_WRITE_DURABLY,),
    ),
    Defect(
        "written-in-place",
        "a file is written over instead of beside and renamed",
        "fedtide/wire/disk.py",
        """\
    temporary = path.with_name(path.name + ".new")
""",
        """\
    temporary = path
""",
        (_WRITE_DURABLY,),
    ),
    Defect(
        "duplicates-not-known",
        "an update that comes again is new again",
        "coordinator/marks.py",
        """\
    if mark is None or counter > mark.counter:
        return Standing.NEW
""",
        """\
    if mark is None or counter > 0:
        return Standing.NEW
""",
        ("tests/coordinator/test_marks.py", "tests/coordinator/test_writer.py"),
    ),
    Defect(
        "duplicates-forgotten-at-restart",
        "a restarted coordinator does not know what it has applied",
        "coordinator/service.py",
        """\
            marks=recovered.journal.marks(),
""",
        """\
            marks={},
""",
        (f"{_SERVICE}::test_a_run_knows_what_the_run_before_it_applied",),
    ),
    Defect(
        "float-order-of-a-batch",
        "the updates of a batch are folded in another order than they are journaled",
        "coordinator/writer.py",
        """\
            for arrival in arrivals
        ]
""",
        """\
            for arrival in sorted(arrivals, key=lambda each: each.raw if isinstance(each, Arrived) else b"")
        ]
""",
        ("tests/coordinator/test_writer.py",),
    ),
    Defect(
        "float-rounding-of-the-fold",
        "product and sum are rounded once instead of one after the other",
        "coordinator/aggregation.py",
        """\
        scaled = np.multiply(delta[tile], weight, out=scratch[: target.size])
        np.add(target, scaled, out=target)
""",
        """\
        scratch[: target.size] = target + delta[tile].astype(np.float64) * weight
        np.copyto(target, scratch[: target.size])
""",
        ("tests/coordinator/test_aggregation.py",),
    ),
    Defect(
        "version-recorded-before-its-file",
        "the journal names a published version whose file is not there yet",
        "coordinator/published_versions.py",
        """\
        # In this order a kill in between never leaves a version on record whose file is not there.
        self._models.save(
            version.number,
            version.parameters,
            place=version.place,
            exact=own if rounded and self._needs_base else None,
        )
        row = Published(version.number, version.fingerprint, self._wall(), exact if rounded else None)
        self._journal.add_published(row, self._keep)
""",
        """\
        row = Published(version.number, version.fingerprint, self._wall(), exact if rounded else None)
        self._journal.add_published(row, self._keep)
        self._models.save(
            version.number,
            version.parameters,
            place=version.place,
            exact=own if rounded and self._needs_base else None,
        )
""",
        (f"{_SERVICE}::test_at_every_step_of_a_publication_each_version_on_record_has_its_file",),
    ),
    Defect(
        "offered-before-durable",
        "devices are offered a version that the coordinator may forget",
        "coordinator/publisher.py",
        """\
            await self._remember(version)
            if""",
        """\
            if""",
        ("tests/coordinator/test_publisher.py",),
    ),
    Defect(
        "head-before-chunks",
        "the head names blobs that are not on the broker yet",
        "coordinator/publisher.py",
        """\
        await self._shelf.put(connection, offer.contents)
        reached(Step.BLOBS_PUBLISHED)
        head = self._head(version, offer)
        sealed = seal(head, self._identity.key, HEAD_DOMAIN)
        await connection.publish(HEAD.name(self._settings.fleet), sealed, retain=True)
        reached(Step.HEAD_PUBLISHED)
""",
        """\
        head = self._head(version, offer)
        sealed = seal(head, self._identity.key, HEAD_DOMAIN)
        await connection.publish(HEAD.name(self._settings.fleet), sealed, retain=True)
        reached(Step.HEAD_PUBLISHED)
        await self._shelf.put(connection, offer.contents)
        reached(Step.BLOBS_PUBLISHED)
""",
        ("tests/coordinator/test_publisher.py::test_the_head_comes_after_every_chunk_it_points_at",),
    ),
    Defect(
        "counter-not-reserved",
        "a device uses a counter that its disk does not know of",
        "edge_agent/outbox.py",
        """\
            for name in _COUNTER_FILES:
                write_durably(self._disk, self._directory / name, content)
            self._reserved = reserved
""",
        """\
            self._reserved = reserved
            self._last = content
""",
        (_OUTBOX,),
    ),
    Defect(
        "counter-reserved-too-late",
        "a device reserves counters on disk after it has given one out",
        "edge_agent/outbox.py",
        """\
        if self._next >= self._reserved:
            reserved""",
        """\
        if self._next > self._reserved:
            reserved""",
        (_OUTBOX,),
    ),
    Defect(
        "sent-update-superseded",
        "an update that may have been applied gives way to a newer one",
        "edge_agent/outbox.py",
        """\
        superseded = [each for each in others if each not in self._sent]
""",
        """\
        superseded = list(others)
""",
        (_OUTBOX,),
    ),
    Defect(
        "outbox-empty-before-the-receipt-is-filed",
        "an applied update leaves the outbox before it is noted as applied",
        "edge_agent/submission.py",
        """\
        if receipt.verdict is not Verdict.REJECTED:
            self._feedback.settle""",
        """\
        self.outbox.remove(receipt.counter)
        if receipt.verdict is not Verdict.REJECTED:
            self._feedback.settle""",
        ("tests/edge_agent/test_power_cuts.py",),
    ),
    Defect(
        "update-before-feedback",
        "an update can be sent before what it left out is on the disk",
        "edge_agent/submission.py",
        """\
            if self._made.update.feedback is not None:
                self._feedback.keep(self._made.update.feedback)
            self.outbox.put(self._made.counter, self._made.update.envelope)
""",
        """\
            self.outbox.put(self._made.counter, self._made.update.envelope)
            if self._made.update.feedback is not None:
                self._feedback.keep(self._made.update.feedback)
""",
        ("tests/edge_agent/test_power_cuts.py", "tests/edge_agent/test_submission.py"),
    ),
    Defect(
        "receipt-of-other-bytes",
        "a receipt for other bytes under the same counter empties the outbox",
        "edge_agent/answers.py",
        """\
    return message.counter == pending.counter and message.digest == pending.digest
""",
        """\
    return message.counter == pending.counter
""",
        ("tests/edge_agent/test_mailbox.py", "tests/edge_agent/test_answers.py"),
    ),
    Defect(
        "epoch-not-fenced",
        "a device goes back to the head of an earlier run of the coordinator",
        "edge_agent/coordinator_view.py",
        """\
        if head.fleet != self._fleet or head.order < newest or head.version < self._floor[1]:
""",
        """\
        if head.fleet != self._fleet or head.version < self._floor[1]:
""",
        ("tests/edge_agent/test_mailbox.py", "tests/edge_agent/test_coordinator_view.py"),
    ),
    Defect(
        "older-model-run",
        "a device goes back to an older model under a higher epoch",
        "edge_agent/coordinator_view.py",
        """\
        if head.fleet != self._fleet or head.order < newest or head.version < self._floor[1]:
""",
        """\
        if head.fleet != self._fleet or head.order < newest:
""",
        ("tests/edge_agent/test_mailbox.py", "tests/edge_agent/test_coordinator_view.py"),
    ),
    Defect(
        "fetch-kept-alive-by-heads",
        "a device waits for ever for chunks that the broker lost, as long as heads come",
        "edge_agent/fetch.py",
        """\
        if not self._head_came:
            self._head_came = True
            self._patient_until = min(self._patient_until, _now() + self._patience_s)
""",
        """\
        if True:
            self._head_came = True
            self._patient_until = _now() + self._patience_s
""",
        ("tests/edge_agent/test_fetch.py",),
    ),
)
