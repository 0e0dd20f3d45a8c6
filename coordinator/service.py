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
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.closed_loop import Version
from coordinator.committer import Committer, JournalThread
from coordinator.fence_note import leave_note
from coordinator.fencing import Claim, Fence, Fenced
from coordinator.fleet_claim import FleetClaim
from coordinator.held_out import Evaluate, HeldOutEvaluation, Releases
from coordinator.intake import Intake
from coordinator.model_blobs import BlobMaker
from coordinator.model_store import ModelStore
from coordinator.overview import Overview
from coordinator.plan.file import BuiltPlan
from coordinator.published_versions import PublishedVersions
from coordinator.publisher import Identity, Publisher, Released
from coordinator.publishing import Publishing
from coordinator.reception import Reception
from coordinator.recovery import Recovered, base_parameters
from coordinator.rollback_watch import RollbackWatch
from coordinator.roster import Roster
from coordinator.set_aside import PoisonWatch
from coordinator.settings import CoordinatorSettings
from coordinator.shelf import Shelf, unsynced
from coordinator.status import Status, StatusFile
from coordinator.writer import Writer
from fedtide.wire.clock import SYSTEM_CLOCK, Clock
from fedtide.wire.ids import Epoch
from fedtide.wire.link import Dial, LinkDown, PublishRefused
from fedtide.wire.messages import Head
from fedtide.wire.plan import seal_plan
from fedtide.wire.signatures import SigningKey

log = logging.getLogger(__name__)

_TICK_S: Final = 0.25
_STEER_EVERY_TICKS: Final = 8


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
        rng: draws the run's id and the waits between connections; None: one of its own.
        above: claim an epoch above this one; another run had it that this one takes over from.

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
        above: Epoch | None = None,
    ) -> None:
        rng = rng or np.random.default_rng()
        self._clock = clock
        self._settings = settings
        self._plan = plan.plan
        self._status_file = StatusFile(directory / "status.json", clock)
        self._recovered = recovered
        self._journal_thread = JournalThread()
        self._began = self._clock.now()
        self._stop_reason: str | None = None
        self._roster = Roster(directory / "roster", settings.max_devices, clock.now)
        self._state_directory = directory / "state"
        self._epoch = recovered.journal.next_epoch(above)
        run = rng.bytes(8).hex()
        watch = PoisonWatch(self._state_directory)
        bases = base_parameters(recovered.models, plan)
        self._writer = Writer(
            settings,
            plan=self._plan.id,
            schema=self._plan.manifest.schema,
            state=recovered.state,
            marks=recovered.journal.marks(),
            bases=bases,
            watch=watch,
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
            epoch=self._epoch,
            on_version=self._on_version,
        )
        identity = Identity(self._epoch, run, self._plan.id, seal_plan(self._plan, key), key)
        self._publisher = Publisher(
            settings,
            identity,
            self._remember,
            clock.wall,
            maker=BlobMaker(settings.publish, self._plan.manifest.schema, self._versions.earlier),
            shelf=Shelf(settings.fleet, recovered.shelf_file, unsynced(recovered.disk)),
            parent=self._versions.newest.fingerprint if self._versions.newest else bytes(32),
            released=_released_before(recovered.models) if settings.release else None,
            on_version=self._on_offer,
        )
        self._publishing = Publishing(
            settings.publish,
            committer=self.committer,
            writer=self._writer,
            versions=self._versions,
            publisher=self._publisher,
            journal=recovered.journal,
            journal_thread=self._journal_thread,
            connection=lambda: self._reception.connection,
            clock=clock,
        )
        self._releases = Releases(
            settings,
            metric=self._plan.manifest.metric,
            models=recovered.models,
            journal_thread=self._journal_thread,
            publisher=self._publisher,
            on_release=self._publishing.wake,
        )
        self._held_out = HeldOutEvaluation(
            settings,
            evaluate,
            committer=self.committer,
            publisher=self._publisher,
            journal=recovered.journal,
            journal_thread=self._journal_thread,
            releases=self._releases,
            rollback=RollbackWatch(
                settings.rollback,
                committer=self.committer,
                writer=self._writer,
                models=recovered.models,
                journal=recovered.journal,
            ),
            clock=clock,
        )
        self._reception = Reception(
            settings,
            intake=Intake(
                self._plan.manifest.schema, self._roster.key, settings.update.max_partial_bytes, watch
            ),
            roster=self._roster,
            committer=self.committer,
            publisher=self._publisher,
            pending=directory / "pending",
            dial=dial,
            clock=clock,
            rng=rng,
            on_connected=self._publishing.wake,
            claim=FleetClaim(
                settings.fleet,
                run,
                key.public,
                fence=Fence(settings.fleet, key.public, Claim(self._epoch, run)),
                publisher=self._publisher,
                on_head=self._on_head,
            ),
        )
        self._overview = Overview(
            settings,
            identity=identity,
            manifest=self._plan.manifest,
            roster=self._roster,
            writer=self._writer,
            committer=self.committer,
            publisher=self._publisher,
            releases=self._releases,
            held_out=self._held_out,
            reception=self._reception,
            clock=clock,
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
        self._publishing.wake()
        committing = asyncio.create_task(self.committer.run(), name="coordinator.committer")
        work = {
            "reception": self._reception.run(),
            "publish": self._publishing.run(),
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
        except Fenced as fenced:
            try:
                leave_note(self._state_directory, fenced, self._recovered.disk)
            except OSError as error:  # on a full disk: it ends all the same, and says why
                log.warning("No note of it could be left: %s", error, extra={"event": "coordinator.fenced"})
            raise
        finally:
            for task in (committing, *running):
                task.cancel()
            await asyncio.gather(committing, *running, return_exceptions=True)
            self._write_status("stopped" if self._stop_reason else "offline")
            self._journal_thread.close()
        return self._stop_reason

    def _on_version(self) -> None:
        self._publishing.wake()

    def _on_offer(self) -> None:
        self._held_out.wake()

    async def _remember(self, version: Version) -> None:
        await self._publishing.remember(version)

    async def _on_head(self, head: Head) -> None:
        """Devices ignore versions below one that they have run, whichever run offered that."""
        mine = self._recovered.journal.ledger.published.get(head.version)
        is_ours = mine is not None and mine.fingerprint == head.parameters_sha256
        if head.version >= self._writer.state.version and not is_ours:
            why = f"another run of the coordinator offered version {head.version}"
            await self.committer.reset(why, above=head.version)

    async def _tick(self) -> None:
        ticks = 0
        while self._stop_reason is None:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            self.committer.tick()
            await self._reception.ask_for_missing(self._settings.update.missing_after_s)
            await self._publishing.tick()
            await self._releases.consider_federated(self._reception.view.evaluations)
            self._stop_reason = self._stop_condition()
            if ticks % _STEER_EVERY_TICKS == 0:
                await self._reception.steer()
            if self._status_file.is_due:
                self._write_status("running")

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
        await self._publishing.publish_newest()
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
        self.newest_status = self._status_file.write(lambda: self.status(state))

    def status(self, state: str) -> Status:
        """The coordinator at this moment."""
        return self._overview.status(state, self._stop_reason)


def _released_before(models: ModelStore) -> Released | None:
    """The version that an earlier run released."""
    stored = models.release()
    return None if stored is None else Released(Version.of(stored.version, stored.parameters), stored.gate)
