"""The running coordinator: named tasks around the pure core.

reception  MQTT → intake → arrivals
committer  arrivals → judge and fold → journal (group commit) → acknowledge, receipts
publish    new versions and releases, paced → closed loop → model file, chunks, head
evaluate   published versions → held-out metric → release gate
tick       federated release gate, time limits, missing chunks, status, stop conditions
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Final

import numpy as np

from coordinator import status as status_file
from coordinator.closed_loop import Version
from coordinator.committer import Committer, JournalThread
from coordinator.held_out import Evaluate, HeldOutEvaluation, Releases
from coordinator.intake import Intake
from coordinator.model_blobs import BlobMaker
from coordinator.model_store import ModelStore
from coordinator.plan.file import BuiltPlan
from coordinator.published_versions import PublishedVersions
from coordinator.publisher import Identity, Publisher, Released
from coordinator.reception import Reception
from coordinator.recovery import Recovered, base_parameters
from coordinator.roster import Roster
from coordinator.settings import CoordinatorSettings
from coordinator.shelf import Shelf
from coordinator.status import Status, Updates, peak_rss_bytes
from coordinator.writer import Writer
from fedtide.wire.clock import SYSTEM_CLOCK, Clock
from fedtide.wire.link import Dial, LinkDown, PublishRefused
from fedtide.wire.plan import seal_plan
from fedtide.wire.signatures import SigningKey

log = logging.getLogger(__name__)

_TICK_S: Final = 0.25
_STATUS_EVERY_TICKS: Final = 2
_PUBLISH_AGAIN_EVERY_TICKS: Final = 8


class CoordinatorService:
    """One run of the coordinator.

    Args:
        settings: from ``coordinator.toml``.
        plan: the built plan.
        key: the coordinator's.
        directory: the fleet's.
        recovered: the opened state.
        dial: makes MQTT connections.
        evaluate: the held-out evaluation, if there is one.
        clock: tells the time.
        rng: draws the waits between connections; None: one of its own.

    Attributes:
        newest_status: as last written; for other threads, which must not look into a running service.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        plan: BuiltPlan,
        key: SigningKey,
        directory: Path,
        recovered: Recovered,
        dial: Dial,
        evaluate: Evaluate | None,
        clock: Clock = SYSTEM_CLOCK,
        rng: np.random.Generator | None = None,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._plan = plan.plan
        self._status_path = directory / "status.json"
        self._recovered = recovered
        self._journal_thread = JournalThread()
        self._new_version = asyncio.Event()
        self._began = self._clock.now()
        self._stop_reason: str | None = None
        self._published_at = float("-inf")
        self._publishing = asyncio.Lock()  # the last version may come while the one before is on its way
        self._roster = Roster(directory / "roster", settings.max_devices)
        self._epoch = recovered.journal.next_epoch()
        bases = base_parameters(recovered.models, plan)
        self._writer = Writer(
            settings,
            plan=self._plan.id,
            schema=self._plan.manifest.schema,
            state=recovered.state,
            marks=recovered.journal.marks(),
            bases=bases,
        )
        self._versions = PublishedVersions(
            settings, self._plan.manifest.schema, recovered.models, recovered.journal, clock.wall
        )
        self._writer.published = self._versions.fingerprints()
        self.committer = Committer(
            settings,
            self._writer,
            recovered,
            journal_thread=self._journal_thread,
            key=key,
            clock=clock,
            on_version=self._on_version,
        )
        identity = Identity(self._epoch, self._plan.id, seal_plan(self._plan, key), key)
        self._publisher = Publisher(
            settings,
            identity,
            self._remember,
            clock.wall,
            maker=BlobMaker(settings.publish, self._plan.manifest.schema, self._versions.earlier),
            shelf=Shelf(settings.fleet, recovered.shelf_file),
            parent=self._versions.newest.fingerprint if self._versions.newest else bytes(32),
            released=_released_before(recovered.models) if settings.release else None,
            on_version=self._wake_evaluation,
        )
        self._releases = Releases(
            settings,
            metric=self._plan.manifest.metric,
            models=recovered.models,
            journal_thread=self._journal_thread,
            publisher=self._publisher,
            on_release=self._new_version.set,
        )
        self._held_out = HeldOutEvaluation(
            settings,
            evaluate,
            committer=self.committer,
            publisher=self._publisher,
            journal=recovered.journal,
            journal_thread=self._journal_thread,
            releases=self._releases,
            clock=clock,
        )
        self._reception = Reception(
            settings,
            intake=Intake(self._plan.manifest.schema, self._roster.key, settings.update.max_partial_bytes),
            roster=self._roster,
            committer=self.committer,
            publisher=self._publisher,
            pending=directory / "pending",
            dial=dial,
            clock=clock,
            rng=rng or np.random.default_rng(),
            on_connected=self._new_version.set,
        )
        self.newest_status = self.status("starting")

    async def run(self) -> str | None:
        """Run until a stop condition holds, and return it. Cancelling shuts down cleanly.

        Any failure of ours ends the run with that exception; nothing uncommitted has been acknowledged.
        """
        log.info(
            "Coordinator of fleet %s, epoch %d: version %d, %d journal entries replayed",
            self._settings.fleet, self._epoch, self._writer.state.version, self._recovered.replayed,
            extra={"event": "coordinator.started"},
        )  # fmt: skip
        self._on_version()
        committing = asyncio.create_task(self.committer.run(), name="coordinator.committer")
        work = {
            "reception": self._reception.run(),
            "publish": self._publish(),
            "evaluate": self._held_out.run(),
            "tick": self._tick(),
        }
        running = [asyncio.create_task(task, name=f"coordinator.{name}") for name, task in work.items()]
        try:
            done, _ = await asyncio.wait([committing, *running], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a task that fails, ends the program; the tick ends well at a stop condition
            await self._finish(committing)
        except asyncio.CancelledError:
            await self._leave(committing)
        finally:
            for task in (committing, *running):
                task.cancel()
            await asyncio.gather(committing, *running, return_exceptions=True)
            self._write_status("stopped" if self._stop_reason else "offline")
            self._journal_thread.close()
        return self._stop_reason

    def _on_version(self) -> None:
        self._new_version.set()

    def _wake_evaluation(self) -> None:
        self._held_out.wake()

    async def _publish(self) -> None:
        pace = self._settings.publish
        while True:
            await self._new_version.wait()
            self._new_version.clear()
            await asyncio.sleep(self._published_at + pace.min_interval_s - self._clock.now())
            await self._publish_newest(pace.every_versions)

    async def _publish_newest(self, every_versions: int) -> None:
        async with self._publishing:
            await self._make_and_publish(every_versions)

    async def _make_and_publish(self, every_versions: int) -> None:
        connection, state = self._reception.connection, self.committer.committed
        newest = self._publisher.version
        due = newest is None or state.version - newest.number >= every_versions
        if due and not np.isfinite(state.parameters).all():
            log.error("Version %d is not finite and is not published", state.version,
                      extra={"event": "version.not_finite"})  # fmt: skip
            due = False
        if connection is None or not (due or self._publisher.has_news):
            return
        self._published_at = self._clock.now()
        try:
            if due:
                # Not in the journal's thread: the commits of updates would wait for it.
                version = await asyncio.to_thread(self._versions.make, state.version, state.parameters)
                await self._publisher.publish(connection, version)
            else:
                await self._publisher.renew(connection, everything=False)
        except (LinkDown, PublishRefused) as error:
            log.warning("Publishing stopped: %s", error, extra={"event": "publish.interrupted"})

    async def _remember(self, version: Version) -> None:
        """Make a version's file and fingerprint durable before any device sees it."""
        keep, published = self._settings.publish.keep_versions, self._writer.published
        for old in sorted({*published, version.number})[:-keep]:
            published.pop(old, None)  # before its file goes, which an update based on it would need
        await self._journal_thread.run(lambda: self._versions.save(version))
        published[version.number] = version.fingerprint

    async def _tick(self) -> None:
        ticks = 0
        while self._stop_reason is None:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            self.committer.tick()
            await self._reception.ask_for_missing(self._settings.update.missing_after_s)
            await self._renew_head()
            await self._releases.consider_federated(self._reception.view.evaluations)
            self._stop_reason = self._stop_condition()
            if ticks % _STATUS_EVERY_TICKS == 0:
                self._write_status("running")
            if ticks % _PUBLISH_AGAIN_EVERY_TICKS == 0 and self._publisher.has_news:
                self._new_version.set()  # the broker refused it, or was lost before it took it

    async def _renew_head(self) -> None:
        connection = self._reception.connection
        half_life_s = self._settings.publish.head_lifetime_s / 2
        if (
            connection
            and self._publisher.version
            and self._clock.wall() - self._publisher.issued > half_life_s
        ):
            with contextlib.suppress(LinkDown, PublishRefused):
                await self._publisher.renew(connection, everything=False)

    def _stop_condition(self) -> str | None:
        stop = self._settings.stop
        metric = self._held_out.points[-1].metric if self._held_out.points else None
        conditions = (
            ("versions", stop.versions, self.committer.committed.version),
            ("updates", stop.updates, self.committer.accounting.applied),
            ("metric", stop.metric, metric),
            ("seconds", stop.seconds, self._clock.now() - self._began),
        )
        for name, limit, value in conditions:
            if limit is not None and value is not None and value >= limit:
                return f"{name} reached {limit:g}"
        return None

    async def _finish(self, committing: asyncio.Task[None]) -> None:
        """A stop condition held: take no more updates and offer the last version."""
        self._writer.stopped = True
        self._publisher.training = False
        self.committer.finish()
        await committing
        await self._publish_newest(every_versions=1)
        await self._held_out.evaluate_newest()
        connection = self._reception.connection
        if connection is not None:
            with contextlib.suppress(LinkDown, PublishRefused):
                # Where there was nothing new to offer, the head still has to say that training ended.
                await self._publisher.renew(connection, everything=False)
        await self._leave(committing)
        log.info("Stopped: %s", self._stop_reason, extra={"event": "coordinator.stopped"})

    async def _leave(self, committing: asyncio.Task[None]) -> None:
        """Commit what has arrived, leave a snapshot, say goodbye."""
        self.committer.finish()
        await committing
        connection = self._reception.connection
        if connection is not None:
            with contextlib.suppress(LinkDown, PublishRefused):
                await self._publisher.announce(connection, online=False)
            await connection.close()

    def _write_status(self, state: str) -> None:
        self.newest_status = self.status(state)
        status_file.write(self._status_path, self.newest_status)

    def status(self, state: str) -> Status:
        """The coordinator at this moment."""
        accounting = self.committer.accounting
        connection, published, model = self._reception.connection, self._publisher.version, self._writer.state
        view, devices = self._reception.view, list(self._roster.devices())
        return Status(
            fleet=self._settings.fleet,
            plan=self._plan.id,
            epoch=self._epoch,
            state=state,
            stop_reason=self._stop_reason,
            moment=self._clock.wall(),
            seconds=self._clock.now() - self._began,
            connected=connection is not None,
            mqtt_version=connection.mqtt_version if connection else None,
            version=model.version,
            published_version=published.number if published else None,
            buffered=model.buffer.count,
            goal=self._settings.aggregator.goal,
            updates=Updates(
                received=accounting.received,
                applied=accounting.applied,
                duplicate=accounting.duplicate,
                rejected={reason.value: count for reason, count in accounting.rejected.items()},
                waiting=accounting.waiting,
            ),
            ignored_messages=view.malformed,
            staleness=dict(self.committer.staleness),
            evaluations=tuple(self._held_out.points),
            parameters=self._plan.manifest.schema.size,
            metric=self._plan.manifest.metric,
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
        )


def _released_before(models: ModelStore) -> Released | None:
    """The version that an earlier run released."""
    stored = models.release()
    return None if stored is None else Released(Version.of(stored.version, stored.parameters), stored.gate)
