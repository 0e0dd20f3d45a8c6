"""Goes back to the last good version when the held-out evaluations say so."""

import asyncio
import logging

from coordinator.committer import Committer
from coordinator.journal import EvaluationResult, Journal
from coordinator.model_store import ModelStore
from coordinator.rollback import Rollback, Standing, after, gone_back, so_far
from coordinator.status import RolledBack
from coordinator.writer import Writer
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Vector

log = logging.getLogger(__name__)


class RollbackWatch:
    """Holds each held-out result against the limits.

    Args:
        limits: from the settings; None: nothing leads back.
        committer: resets the model.
        writer: knows whose updates are in which version.
        models: the published versions.
        journal: has the results so far.
    """

    def __init__(
        self,
        limits: Rollback | None,
        *,
        committer: Committer,
        writer: Writer,
        models: ModelStore,
        journal: Journal,
    ) -> None:
        self._limits = limits
        self._committer = committer
        self._writer = writer
        self._models = models
        self._line_since = journal.ledger.line_since
        self._good: tuple[ModelVersion, Vector] | None = None
        self._standing = Standing()
        self._last: ModelVersion | None = None
        if limits is not None:
            results = journal.evaluations()
            self._standing = so_far(results, limits, self._line_since)
            self._last = results[-1].version if results else None

    async def consider(self, result: EvaluationResult, parameters: Vector) -> None:
        """Take the next result, and go back if it is time; ``parameters`` are those it is of."""
        if self._limits is None or result.version < self._line_since:
            return
        if result.version != self._last:  # else a restart evaluated it once more, and it counts already
            self._standing = after(self._standing, result, self._limits)
            self._last = result.version
        if self._standing.good == result.version:
            self._good = result.version, parameters  # its file may be gone when it is needed
        await self.go_back_if_due(result.version)

    async def go_back_if_due(self, bad: ModelVersion | None = None) -> None:
        """Go back if the results so far, perhaps an earlier run's, ask for it."""
        standing = self._standing
        if not standing.due:
            return
        self._standing = gone_back(standing)
        good, parameters = standing.good, await self._good_parameters()
        if good is None or parameters is None:
            log.error("%s, and no good version is kept to go back to", standing.why,
                      extra={"event": "version.lost"})  # fmt: skip
            return
        newest = self._writer.state.version
        why = f"back to version {good}. {standing.why}"
        version = await self._committer.reset(why, parameters=parameters)
        if version is None:
            return
        self._line_since = version
        devices = tuple(self._writer.contributors.between(good, bad or newest))
        self._writer.rollbacks.note(RolledBack(version=version, good=good, why=standing.why, devices=devices))

    async def _good_parameters(self) -> Vector | None:
        """Of the last good version, as devices held it; None: there was none, or it is not kept."""
        good = self._standing.good
        if good is None:
            return None
        if self._good is not None and self._good[0] == good:
            return self._good[1]
        try:
            return await asyncio.to_thread(self._models.parameters, good)
        except FileNotFoundError:
            return None
