"""The coordinator's own evaluation of new versions, and the release of those that pass the gate."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from coordinator.closed_loop import Version
from coordinator.committer import Committer, JournalThread
from coordinator.federated import FederatedEvaluations
from coordinator.journal import EvaluationResult, Journal
from coordinator.model_store import ModelStore, StoredRelease
from coordinator.publisher import Publisher, Released
from coordinator.release_gate import passes, sentence
from coordinator.rollback_watch import RollbackWatch
from coordinator.settings import CoordinatorSettings
from coordinator.status import EvaluationPoint
from fedtide.wire.clock import Clock
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Vector

log = logging.getLogger(__name__)

_KEPT_EVALUATIONS: Final = 1000


class EvaluationFailed(Exception):
    """A version could not be evaluated: a run took too long, needed too much memory or was stopped."""


class Outcome(Protocol):
    """What an evaluation gives."""

    @property
    def loss(self) -> float:
        """Mean over the held-out examples."""

    @property
    def metric(self) -> float | None:
        """The plan's metric, mean over the held-out examples."""


Evaluate = Callable[[Vector], Outcome]
"""Evaluates parameters on the coordinator's held-out examples; called in a thread, one call at a time.

Raises :class:`EvaluationFailed`.
"""


class Releases:
    """Releases versions that pass the gate: durably first, then for the publisher to announce.

    Args:
        settings: the coordinator's; without a gate nothing happens here.
        metric: the plan's name for its metric.
        models: the published versions, and the released one.
        journal_thread: where files are written.
        publisher: announces.
        on_release: called when there is something to announce.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        metric: str | None,
        models: ModelStore,
        journal_thread: JournalThread,
        publisher: Publisher,
        on_release: Callable[[], None],
    ) -> None:
        self._gate = settings.release
        self._models = models
        self._journal_thread = journal_thread
        self._publisher = publisher
        self._on_release = on_release
        self._sentence = sentence(self._gate, metric) if self._gate else None

    @property
    def sentence(self) -> str | None:
        """What the released version had to pass, in an earlier run perhaps something else than now.

        While none is released: what one has to pass. None: no gate is set.
        """
        released = self._publisher.released
        return released.gate if self._gate and released else self._sentence

    @property
    def version(self) -> ModelVersion | None:
        """The version released: without a gate, the one that devices were offered last."""
        if self._gate is None:
            return self._publisher.version.number if self._publisher.version else None
        return self._publisher.released.version.number if self._publisher.released else None

    async def consider(
        self, version: ModelVersion, parameters: Vector, loss: float | None, metric: float | None
    ) -> None:
        """Release a version the coordinator has evaluated, if its evaluation decides and it passes."""
        gate = self._gate
        if gate is None or gate.on != "held-out" or not self._is_newer(version):
            return
        if passes(gate, loss, metric):
            await self._release(version, parameters)

    async def consider_federated(self, evaluations: FederatedEvaluations) -> None:
        """Release the newest version that enough devices have evaluated well, if theirs is what decides."""
        gate = self._gate
        if gate is None or gate.on != "federated":
            return
        passing = (
            found.version
            for found in reversed(evaluations.by_version())
            if found.devices >= gate.min_devices and passes(gate, found.loss, found.metric)
        )
        newest = next(passing, None)
        if newest is None or not self._is_newer(newest):
            return
        try:
            parameters = await self._journal_thread.run(lambda: self._models.parameters(newest))
        except FileNotFoundError:
            return  # a version this old is kept no longer
        await self._release(newest, parameters)

    def _is_newer(self, version: ModelVersion) -> bool:
        released = self._publisher.released
        return released is None or version > released.version.number

    async def _release(self, number: ModelVersion, parameters: Vector) -> None:
        gate = self._sentence
        if gate is None or not np.isfinite(parameters).all():
            return

        def work() -> Version:
            self._models.save_release(StoredRelease(number, parameters, gate))
            return Version.of(number, parameters)  # its fingerprint takes a while too

        self._publisher.released = Released(await self._journal_thread.run(work), gate)
        log.info("Released version %d: %s", number, gate, extra={"event": "version.released"})
        self._on_release()


class HeldOutEvaluation:
    """Evaluates published versions, as devices hold them, on the coordinator's held-out examples.

    Attributes:
        points: results of this run, oldest first, the last thousand.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        evaluate: Evaluate | None,
        *,
        committer: Committer,
        publisher: Publisher,
        journal: Journal,
        journal_thread: JournalThread,
        releases: Releases,
        rollback: RollbackWatch,
        clock: Clock,
    ) -> None:
        self._publisher = publisher
        self._settings = settings.evaluation
        self._evaluate = evaluate
        self._committer = committer
        self._journal = journal
        self._journal_thread = journal_thread
        self._releases = releases
        self._rollback = rollback
        self._clock = clock
        self._new_version = asyncio.Event()
        self._evaluating = asyncio.Lock()  # the end of a run may come while a version is being evaluated
        self._began = self._clock.now()
        self._evaluated: ModelVersion | None = None
        self.points: list[EvaluationPoint] = []

    def wake(self) -> None:
        """There may be a newly published version."""
        self._new_version.set()

    async def run(self) -> None:
        """Evaluate versions as they are published, for ever."""
        await self._rollback.go_back_if_due()
        while True:
            await self._new_version.wait()
            self._new_version.clear()
            await self.evaluate_newest()

    async def evaluate_newest(self) -> None:
        """Evaluate the version published last, if it is time."""
        async with self._evaluating:
            await self._evaluate_newest()

    async def _evaluate_newest(self) -> None:
        settings, evaluate, version = self._settings, self._evaluate, self._publisher.version
        if settings is None or evaluate is None or version is None or version.number == self._evaluated:
            return
        if self._evaluated is not None and version.number - self._evaluated < settings.every_versions:
            return
        try:
            outcome = await asyncio.to_thread(lambda: evaluate(version.parameters))
        except EvaluationFailed as error:  # no reason to stop training: the next version may do better
            log.error("Version %d could not be evaluated: %s", version.number, error,  # noqa: TRY400
                      extra={"event": "evaluation.failed"})  # fmt: skip
            self._evaluated = version.number
            return
        loss, metric = _finite(outcome.loss), _finite(outcome.metric)
        result = EvaluationResult(version.number, loss, metric, self._clock.wall())
        await self._journal_thread.run(lambda: self._journal.add_evaluation(result))
        self._evaluated = version.number
        self.points.append(
            EvaluationPoint(
                version=version.number,
                seconds=self._clock.now() - self._began,
                updates=self._committer.accounting.applied,
                loss=loss,
                metric=metric,
            )
        )
        del self.points[:-_KEPT_EVALUATIONS]
        await self._rollback.consider(result, version.parameters)
        await self._releases.consider(version.number, version.parameters, loss, metric)


def _finite(value: float | None) -> float | None:
    """A diverged model evaluates to NaN, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
