"""The overview: puts the status together from the parts of a running coordinator. It changes none of them."""

import time

from coordinator.committer import Committer
from coordinator.held_out import HeldOutEvaluation, Releases
from coordinator.publisher import Identity, Publisher
from coordinator.reception import Reception
from coordinator.roster import Roster
from coordinator.settings import CoordinatorSettings
from coordinator.status import Status, Updates, peak_rss_bytes
from coordinator.writer import Writer
from fedtide.wire.clock import Clock
from fedtide.wire.plan import PlanManifest


class Overview:
    """What an operator sees, at any moment.

    Args:
        settings: the coordinator's.
        identity: who publishes.
        manifest: of the plan in force.
        roster: the enrolled devices.
        writer: has the model and the marks.
        committer: has the accounting.
        publisher: has the version that devices were offered last.
        releases: has the released version.
        held_out: has the evaluations.
        reception: has the connection, and what the devices say.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        identity: Identity,
        manifest: PlanManifest,
        roster: Roster,
        writer: Writer,
        committer: Committer,
        publisher: Publisher,
        releases: Releases,
        held_out: HeldOutEvaluation,
        reception: Reception,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._manifest = manifest
        self._roster = roster
        self._writer = writer
        self._committer = committer
        self._publisher = publisher
        self._releases = releases
        self._held_out = held_out
        self._reception = reception
        self._clock = clock
        self._began = clock.now()

    def status(self, state: str, stop_reason: str | None = None) -> Status:
        """The coordinator now; ``state`` and ``stop_reason`` as in :class:`Status`."""
        connection, published, model = self._reception.connection, self._publisher.version, self._writer.state
        view, devices = self._reception.view, list(self._roster.devices())
        return Status(
            fleet=self._settings.fleet,
            plan=self._identity.plan,
            epoch=self._identity.epoch,
            state=state,
            stop_reason=stop_reason,
            moment=self._clock.wall(),
            seconds=self._clock.now() - self._began,
            connected=connection is not None,
            mqtt_version=connection.mqtt_version if connection else None,
            version=model.version,
            published_version=published.number if published else None,
            buffered=model.buffer.count,
            goal=self._settings.aggregator.goal,
            updates=self._updates(),
            ignored_messages=view.malformed,
            staleness=dict(self._committer.staleness),
            evaluations=tuple(self._held_out.points),
            parameters=self._manifest.schema.size,
            metric=self._manifest.metric,
            devices=view.statuses(devices, self._writer.marks),
            cpu_seconds=time.process_time(),
            rss_bytes=peak_rss_bytes(),
            released_version=self._releases.version,
            release_gate=self._releases.sentence,
            federated=view.evaluations.current(
                devices, published.number, self._settings.federated.max_age_versions
            )
            if published
            else None,
            federated_history=view.evaluations.by_version(),
            keyframe_bytes=self._publisher.keyframe_bytes,
            delta_bytes=self._publisher.delta_bytes,
            troubles=dict(view.trouble_counts),
            rollbacks=self._writer.rollbacks.count,
            last_rollback=self._writer.rollbacks.last,
        )

    def _updates(self) -> Updates:
        accounting = self._committer.accounting
        return Updates(
            received=accounting.received,
            applied=accounting.applied,
            duplicate=accounting.duplicate,
            rejected={reason.value: count for reason, count in accounting.rejected.items()},
            waiting=accounting.waiting,
        )
