"""Opening a fleet's directory: journal, snapshots, models and the state they give.

coordinator.toml  keys/  roster/  pending/  state/{journal.sqlite, snapshots/, models/, lock}  status.json
"""

import contextlib
import fcntl
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from coordinator.entries import RulesEntry
from coordinator.journal import Batch, Journal, JournalDamaged
from coordinator.model_deltas import REACH
from coordinator.model_state import ModelState, change_rules, initial_state
from coordinator.model_store import ModelStore, SnapshotStore
from coordinator.plan.file import BuiltPlan
from coordinator.replay import Bases, replay
from coordinator.settings import CoordinatorSettings, Publish, Rules
from fedtide.wire.ids import ModelVersion


class AlreadyRunning(Exception):
    """Another coordinator uses this directory."""


@dataclass
class Recovered:
    """An opened directory.

    Attributes:
        journal: open for writing.
        models: the published versions.
        snapshots: where the next snapshot goes.
        state: after the journal's last entry.
        sequence: number of that entry.
        replayed: how many entries were replayed to get there.
        shelf_file: says which blobs are on the broker.
        lock: keeps a second coordinator out while it is open.
    """

    journal: Journal
    models: ModelStore
    snapshots: SnapshotStore
    state: ModelState
    sequence: int
    replayed: int
    shelf_file: Path
    lock: int

    def close(self) -> None:
        """Close the journal and let others in."""
        self.journal.close()
        os.close(self.lock)


def recover(directory: Path, settings: CoordinatorSettings, plan: BuiltPlan) -> Recovered:
    """Open ``directory`` and bring the state to the journal's last entry.

    Raises:
        AlreadyRunning: another coordinator holds the lock.
        JournalDamaged: the journal is of another plan, or cannot be read.
        ReplayMismatch: replay gives other parameters than were published.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        lock = _lock(directory / "lock")
        undo.callback(os.close, lock)
        journal = Journal(directory / "journal.sqlite")
        undo.callback(journal.close)
        _check_plan(journal, plan)
        models = ModelStore(directory / "models", plan.plan.manifest.schema, kept_models(settings.publish))
        snapshots = SnapshotStore(directory / "snapshots", journal)
        rules = Rules(aggregator=settings.aggregator, server_optimizer=settings.server_optimizer)
        try:
            sequence, last, state = _replayed(journal, models, snapshots, plan, rules)
        except sqlite3.DatabaseError as error:
            raise JournalDamaged(f"{directory} cannot be read: {error}") from error
        if last == 0 or state.rules != rules:
            journal.commit(Batch([RulesEntry(rules)]))
            state = change_rules(state, rules)
            last = journal.last_sequence()
        undo.pop_all()
    return Recovered(journal, models, snapshots, state, last, last - sequence, directory / "shelf", lock)


def _replayed(
    journal: Journal, models: ModelStore, snapshots: SnapshotStore, plan: BuiltPlan, rules: Rules
) -> tuple[int, int, ModelState]:
    """Where the replay began, the last entry, and the state after it."""
    schema, bases = plan.plan.manifest.schema, base_parameters(models, plan)
    for sequence, state in snapshots.whole():
        # FedAsync may need a base from before the snapshot whose file is gone: an earlier start makes it.
        with contextlib.suppress(FileNotFoundError):
            return sequence, *replay(journal, state, sequence, schema=schema, bases=bases)
    return 0, *replay(journal, initial_state(plan.initial, rules), 0, schema=schema, bases=bases)


def kept_models(settings: Publish) -> int:
    """How many published versions stay on disk: those that updates or deltas may start from."""
    return max(settings.keep_versions, REACH + 1) if settings.with_deltas else settings.keep_versions


def base_parameters(models: ModelStore, plan: BuiltPlan) -> Bases:
    """Looks up published versions as aggregated; version 0 is the plan's own."""
    return lambda version: plan.initial if version == ModelVersion(0) else models.base(version)


def _check_plan(journal: Journal, plan: BuiltPlan) -> None:
    found = journal.plan_id(plan.plan.id)
    if found != plan.plan.id:
        raise JournalDamaged(
            f"the journal is of plan {found}, the settings name plan {plan.plan.id}; "
            "a new plan needs a new fleet directory"
        )


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"another coordinator is running on {path.parent}; stop it first") from None
    return descriptor
