"""A real coordinator in a process of its own, whose journal takes so many more seconds per update.

python slow_coordinator.py FLEET_DIRECTORY SECONDS
"""

import sys
import time

from coordinator.entries import UpdateEntry
from coordinator.journal import Batch, Journal
from fedtide.cli import main


def slow_down(seconds: float) -> None:
    """Make each commit as much longer as the updates in it."""
    commit = Journal.commit

    def slow(self: Journal, batch: Batch) -> None:
        time.sleep(seconds * sum(isinstance(entry, UpdateEntry) for entry in batch.entries))
        commit(self, batch)

    Journal.commit = slow  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    sys.argv[1:] = sys.argv[sys.argv.index("coordinator") :]
    main()
