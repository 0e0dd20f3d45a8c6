"""The published versions: made by the closed loop, durable before any device sees one, and found again.

Versions are made and saved one after the other: no other is made between the two. The journal is used by one
thread at a time: call ``save`` in the journal's thread.
"""

import logging
from collections.abc import Callable

from coordinator.closed_loop import ClosedLoop, Version
from coordinator.journal import Journal, Published
from coordinator.model_deltas import REACH
from coordinator.model_grid import Place
from coordinator.model_store import ModelStore
from coordinator.settings import CoordinatorSettings
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, Vector, fingerprint

log = logging.getLogger(__name__)


class PublishedVersions:
    """Versions by their place in the sequence in which they were published.

    Args:
        settings: the coordinator's.
        schema: of the model.
        models: their files.
        journal: their fingerprints.
        wall: seconds since 1970.

    Attributes:
        newest: the version made last, perhaps by an earlier run.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        schema: Schema,
        models: ModelStore,
        journal: Journal,
        wall: Callable[[], float] = SYSTEM_CLOCK.wall,
    ) -> None:
        self._wall = wall
        self._keep = settings.publish.keep_versions
        self._needs_base = settings.aggregator.needs_base
        self._models = models
        self._journal = journal
        places = models.places()
        self.newest: Version | None = None
        while places and self.newest is None:
            number = max(places)
            self.newest = self._as_offered(number, places[number])
            if self.newest is None:
                del places[number]
        self._numbers = {place.sequence: number for number, place in sorted(places.items())}
        self._loop = ClosedLoop(settings.publish, schema, self.newest)
        self._exact: tuple[ModelVersion, Vector] | None = None

    def _as_offered(self, number: ModelVersion, place: Place) -> Version | None:
        """A version from its file; None where that is damaged, so that it is made once more."""
        try:
            version = Version.of(number, self._models.parameters(number), place)
        except FileNotFoundError:
            return None
        row = self._journal.ledger.published.get(number)
        if row is None or row.fingerprint == version.fingerprint:
            return version
        log.warning("The file of version %d does not hold what devices were offered", number,
                    extra={"event": "model.damaged"})  # fmt: skip
        return None

    def fingerprints(self) -> dict[ModelVersion, bytes]:
        """The versions that an update may start from; with FedAsync only those kept as aggregated."""
        return {
            row.version: row.fingerprint
            for row in self._journal.published()
            if row.version >= self._journal.ledger.line_since
            and (not self._needs_base or row.exact is None or self._models.has_exact(row.version))
        }

    def make(self, number: ModelVersion, target: Vector) -> Version:
        """The version to publish for a model; see :meth:`ClosedLoop.version`."""
        reset = self.newest is not None and self.newest.number < self._journal.ledger.line_since
        self.newest = self._loop.version(number, target, anew=reset)
        self._exact = number, target
        return self.newest

    def save(self, version: Version) -> None:
        """Make a version's file and fingerprint durable, and forget the oldest."""
        own = self._exact[1] if self._exact and self._exact[0] == version.number else version.parameters
        exact = version.fingerprint if own is version.parameters else fingerprint(own)
        rounded = exact != version.fingerprint
        # In this order a kill in between never leaves a version on record whose file is not there.
        self._models.save(
            version.number,
            version.parameters,
            place=version.place,
            exact=own if rounded and self._needs_base else None,
        )
        row = Published(version.number, version.fingerprint, self._wall(), exact if rounded else None)
        self._journal.add_published(row, self._keep)
        self._models.remove_old(self._journal.oldest_base if self._needs_base else None)
        self._numbers[version.place.sequence] = version.number
        self._numbers.pop(version.place.sequence - REACH - 1, None)

    def earlier(self, sequence: int) -> tuple[ModelVersion, Vector] | None:
        """A published version by its sequence number; None for one that is not kept."""
        number = self._numbers.get(sequence)
        if number is None:
            return None
        try:
            return number, self._models.parameters(number)
        except FileNotFoundError:
            return None
