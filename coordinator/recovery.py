"""Opening a fleet's directory: journal, models and the state they give.

coordinator.toml  keys/  roster/  pending/  state/{journal/, models/, exact/, lock}  status.json
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.aggregation import FedBuff
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry
from coordinator.journal import Batch, History, Journal, JournalDamaged, Record, storing
from coordinator.model_deltas import REACH
from coordinator.model_state import ModelState, change_rules, close_buffer, initial_state, reset_state
from coordinator.model_store import ModelStore
from coordinator.plan.file import BuiltPlan
from coordinator.replay import Bases, replay
from coordinator.server_optimizers import SGD
from coordinator.settings import CoordinatorSettings, Publish, Rules
from fedtide.wire.disk import OS_DISK, Disk
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, to_bytes

log = logging.getLogger(__name__)


UNFINISHED: Final = "repair-unfinished"
"""A file that says that the journal looks whole and is not."""
_NO_RULES: Final = Rules(aggregator=FedBuff(), server_optimizer=SGD())


class AlreadyRunning(Exception):
    """Another coordinator uses this directory."""


@dataclass
class Recovered:
    """An opened directory.

    Attributes:
        journal: open for writing.
        models: the published versions.
        state: after the journal's last entry.
        replayed: how many entries were replayed to get there.
        shelf_file: says which blobs are on the broker.
        disk: where all this is.
        lock: keeps a second coordinator out while it is open.
    """

    journal: Journal
    models: ModelStore
    state: ModelState
    replayed: int
    shelf_file: Path
    disk: Disk
    lock: int

    def close(self) -> None:
        """Close the journal and let others in."""
        self.journal.close()
        os.close(self.lock)


def unfinished_repair(directory: Path, disk: Disk) -> ModelVersion | None:
    """The highest version offered, as an interrupted repair knew it; None: no repair was interrupted."""
    try:
        return ModelVersion(int(disk.read(directory / UNFINISHED)))
    except FileNotFoundError:
        return None


def recover(
    directory: Path, settings: CoordinatorSettings, plan: BuiltPlan, disk: Disk = OS_DISK
) -> Recovered:
    """Open ``directory`` and bring the state to the journal's last entry.

    Where the settings name another plan than the journal does, the old plan's buffer is closed, and the new
    plan begins under the next version number.

    Raises:
        AlreadyRunning: another coordinator holds the lock.
        JournalDamaged: the journal cannot be read.
        ReplayMismatch: replay gives other parameters than were published.
        StorageFailed: the disk is full or failed.
    """
    with contextlib.ExitStack() as undo:
        lock = lock_directory(directory)
        undo.callback(os.close, lock)
        undo.enter_context(storing(directory, "reading the fleet's state"))
        if unfinished_repair(directory, disk) is not None:
            raise JournalDamaged("a repair was interrupted; run it again: fedtide journal repair")
        journal = Journal(directory / "journal", disk, keep_bytes=settings.journal.keep_bytes)
        undo.callback(journal.close)
        rules = Rules(aggregator=settings.aggregator, server_optimizer=settings.server_optimizer)
        if journal.ledger.plan is None:
            journal.add(RulesEntry(rules), _reset(plan, ModelVersion(0), "a new fleet"))
        keep, schema = kept_models(settings.publish), plan.plan.manifest.schema
        replayed, state = current_state(
            journal, ModelStore(directory / "models", journal.ledger.schema or schema, keep, disk)
        )
        models = ModelStore(directory / "models", schema, keep, disk)
        if journal.ledger.plan != plan.plan.id:
            state = _change_plan(journal, state, rules, plan)
        elif state.rules != rules:
            # Rules that need no bases let go of those with which entries since the last snapshot were folded.
            journal.snapshot(state)
            journal.add(RulesEntry(rules))
            state = change_rules(state, rules)
        # After every start, because the one that changed the plan may have ended before it came to this.
        models.forget_before(journal.ledger.plan_since)
        undo.pop_all()
    return Recovered(journal, models, state, replayed, directory / "shelf", disk, lock)


def current_state(journal: History, models: ModelStore) -> tuple[int, ModelState]:
    """How many entries were replayed, and the state after the last.

    Raises:
        JournalDamaged: the journal does not give it.
        ReplayMismatch: replay gives other parameters than were published.
    """
    missing: FileNotFoundError | None = None
    for start, sequence, schema in starts(journal):
        try:
            return replay(journal, start, sequence, schema=schema, bases=models.base, through_resets=False)
        except FileNotFoundError as error:
            # FedAsync may need a base from before the snapshot whose file is gone: an earlier start makes it.
            missing = error
    raise JournalDamaged(
        f"the journal's state cannot be made from record {journal.oldest} on: {missing}"
    ) from missing


def starts(journal: History, *, oldest_first: bool = False) -> Iterator[tuple[ModelState, int, Schema]]:
    """States that a replay can begin with, newest first unless asked for otherwise.

    Each comes with its record's number and the schema there.
    """
    # The first entries are the rules and the first plan's parameters.
    beginning = [(initial_state(np.zeros(0, np.float32), _NO_RULES), 0, Schema(tensors=()))]
    if oldest_first and journal.oldest == 1:
        yield from beginning
    for snapshot in journal.snapshots(oldest_first=oldest_first):
        if snapshot.ledger.schema is not None:
            yield snapshot.state, snapshot.ledger.sequence, snapshot.ledger.schema
    if not oldest_first and journal.oldest == 1:
        yield from beginning


def kept_models(settings: Publish) -> int:
    """How many published versions stay on disk: those that updates or deltas may start from."""
    return max(settings.keep_versions, REACH + 1) if settings.with_deltas else settings.keep_versions


def base_parameters(models: ModelStore, plan: BuiltPlan) -> Bases:
    """Looks up published versions as aggregated; version 0 is the plan's own."""
    return lambda version: plan.initial if version == ModelVersion(0) else models.base(version)


def _change_plan(journal: Journal, state: ModelState, rules: Rules, plan: BuiltPlan) -> ModelState:
    """Close the old plan's buffer, and begin with the new plan's parameters: one batch, then a snapshot."""
    old, records = journal.ledger.plan, list[Record]()
    if state.buffer.count:
        records.append(FlushEntry())
        state = close_buffer(state)
    if state.rules != rules:
        records.append(RulesEntry(rules))
        state = change_rules(state, rules)
    version = ModelVersion(max(state.version, journal.ledger.highest) + 1)
    why = f"plan {old} gave way to plan {plan.plan.id}"
    journal.commit(Batch([*records, _reset(plan, version, why)]))
    state = reset_state(state, version, plan.initial)
    journal.snapshot(state)
    log.warning(
        "The plan changed from %s to %s: its initial parameters are version %d, and updates of the old plan "
        "are rejected", old, plan.plan.id, version, extra={"event": "plan.changed"},
    )  # fmt: skip
    return state


def _reset(plan: BuiltPlan, version: ModelVersion, why: str) -> ResetEntry:
    manifest = plan.plan.manifest
    return ResetEntry(plan.plan.id, manifest.schema, version, to_bytes(plan.initial), why)


def lock_directory(directory: Path) -> int:
    """Keep a second coordinator out; the descriptor to close afterwards.

    Raises:
        AlreadyRunning: another coordinator holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"another coordinator is running on {directory}; stop it first") from None
    return descriptor
