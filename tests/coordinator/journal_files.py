"""A journal's files on a disk in memory, to be cut, torn and turned bit by bit."""

from contextlib import closing
from pathlib import Path

from simulated_disk import SimulatedDisk
from small_fleet import PLAN

from coordinator.aggregation import FedBuff
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal import Counted, Journal, Published, Rejected
from coordinator.model_state import initial_state
from coordinator.server_optimizers import Adam
from coordinator.settings import Rules
from fedtide.wire.messages import Reason
from fedtide.wire.parameters import to_bytes

DIRECTORY = Path("/state/journal")
RULES = Rules(aggregator=FedBuff(goal=100), server_optimizer=Adam())


def update(counter, device="pump-0", size=100):
    return UpdateEntry(
        device, counter, 0, 1.0, 1.0, bytes((counter + place) % 251 for place in range(size)), 0
    )


def begin(journal):
    """What a new fleet's journal begins with; the state after it."""
    schema = PLAN.plan.manifest.schema
    reset = ResetEntry(PLAN.plan.id, schema, 0, to_bytes(PLAN.initial), "a new fleet")
    journal.add(RulesEntry(RULES), reset)
    return initial_state(PLAN.initial, RULES)


def with_files(files):
    """A disk on which these files lie, all of them durable."""
    disk = SimulatedDisk()
    disk.make_directory(DIRECTORY)
    for path, content in files.items():
        disk.damage(path, content)
    return disk


def some_files(*, batches=6, segments=3, size=100):
    """A journal of so many segments, each of so many batches of three to five records."""
    disk, counter = SimulatedDisk(), 0
    with closing(Journal(DIRECTORY, disk)) as journal:
        state = begin(journal)
        for segment in range(segments):
            for batch in range(batches):
                updates = [update(counter + number + 1, size=size) for number in range(batch % 3 + 2)]
                counter += len(updates)
                rejected = Rejected(f"pump-{batch % 3 + 1}", counter, Reason.TOO_STALE, "too old")
                journal.add(*updates, rejected)
            journal.add(Counted("duplicate", segment + 1), FlushEntry())
            journal.add_published(Published(segment, bytes([segment]) * 32, 1.0), keep=10)
            if segment < segments - 1:
                journal.snapshot(state)
    return disk.files()
