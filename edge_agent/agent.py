"""The edge agent: deliver, wait for a model, fetch it, train, sign, and so on.

Working does not depend on being connected: training goes on while the network is away, and what it gave waits
in the outbox. Listening is the mailbox's part.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np

from edge_agent.data_sources import DataError
from edge_agent.dataset import Dataset
from edge_agent.fetch import Fetcher, FetchFailed
from edge_agent.local_update import Author, TrainingDiverged, sealed_update
from edge_agent.mailbox import Mailbox, SealedHead
from edge_agent.model_slots import InstalledModel, ModelSlots, WrongModel
from edge_agent.outbox import Outbox, Pending
from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.plan_session import StepFailed
from edge_agent.settings import AgentSettings
from fedtide.wire import frame, topics
from fedtide.wire.chunks import chunk_bytes, update_chunks
from fedtide.wire.errors import UnknownCodec, WireError
from fedtide.wire.link import Connection, Dial, LinkDown, PublishRefused
from fedtide.wire.messages import Head, MissingChunks, Reason, Receipt, TrainingEvent, Verdict
from fedtide.wire.plan import Plan, PlanManifest
from fedtide.wire.signatures import PublicKey, SigningKey

log = logging.getLogger(__name__)

_LONGEST_RECEIPT_WAIT_S: Final = 120.0
_REPORT_EVERY_S: Final = 5.0  # every update carries its loss anyway; a fast device need not say it twice
_AFTER_FETCH_TROUBLE_S: Final = 1.0
_AFTER_LASTING_TROUBLE_S: Final = 30.0
_LASTING_TROUBLE: Final = (PlanRefused, DataError, TrainingDiverged, StepFailed, UnknownCodec, ValueError)
"""What will most likely be the same the next time; a person, or a newer head, has to change something."""


@dataclass(frozen=True)
class Workbench:
    """What an agent needs from its surroundings; a simulated device brings its own.

    Attributes:
        dial: makes MQTT connections.
        examples: reads the examples for a plan. Raises ``DataError``.
        trainer: makes, or finds, the trainer of a plan. Raises ``PlanRefused``.
        compute: runs the training, in a thread or at a simulated pace.
        rng: draws the order of examples and the waits.
        sync: whether files are synced to disk.
    """

    dial: Dial
    examples: Callable[[PlanManifest], Dataset]
    trainer: Callable[[Plan], Trainer]
    compute: Callable[[Callable[[], LocalResult]], Awaitable[LocalResult]]
    rng: np.random.Generator
    sync: bool = True


@dataclass
class Tally:
    """What one agent has done since it started."""

    trained: int = 0
    sent: int = 0
    """Attempts to send an update, repetitions included."""
    resent: int = 0
    applied: int = 0
    duplicate: int = 0
    rejected: int = 0


class Agent:
    """One device's agent.

    Args:
        settings: from ``agent.toml``.
        key: the device's.
        bench: the surroundings.

    Attributes:
        tally: what it has done.
    """

    def __init__(self, settings: AgentSettings, key: SigningKey, bench: Workbench) -> None:
        coordinator = PublicKey.parse(settings.coordinator_key)
        self._settings = settings
        self._bench = bench
        self._author = Author(settings.device, key)
        self._outbox = Outbox(settings.state / "outbox", time.time, sync=bench.sync)
        self._slots = ModelSlots(settings.state / "models", coordinator, sync=bench.sync)
        self._fetcher = Fetcher(settings.fleet, settings.max_model_bytes)
        self._mailbox = Mailbox(
            settings,
            coordinator=coordinator,
            public=key.public,
            fetcher=self._fetcher,
            dial=bench.dial,
            rng=bench.rng,
        )
        self._model = self._slots.newest()
        if self._model is not None:
            self._mailbox.never_below(self._model.head)
        self._trained_version: int | None = None
        self._rest_until = 0.0
        self._report_after = 0.0
        self.tally = Tally()

    async def run(self) -> None:
        """Work until cancelled; then say goodbye. What is unfinished goes on after the next start."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._mailbox.run(), name=f"{self._settings.device}.mailbox")
                group.create_task(self._work(), name=f"{self._settings.device}.work")
        finally:
            await self._mailbox.say_goodbye()

    def cut(self) -> None:
        """Lose the connection without a goodbye, as a power cut would."""
        self._mailbox.cut()

    async def _work(self) -> None:
        while True:
            try:
                pending = self._outbox.oldest()
                if pending is not None:
                    await self._deliver(pending)
                await asyncio.sleep(self._rest_until - time.monotonic())
                await self._train_on(await self._model_to_train_on())
            except LinkDown:
                continue  # the mailbox is dialling
            except PublishRefused as error:
                await self._rest_after("publish.refused", error, _AFTER_LASTING_TROUBLE_S)
            except _LASTING_TROUBLE as error:
                await self._rest_after("training.failed", error, _AFTER_LASTING_TROUBLE_S)
            except (FetchFailed, WrongModel, WireError) as error:
                await self._rest_after("fetch.failed", error, _AFTER_FETCH_TROUBLE_S)

    async def _rest_after(self, event: str, error: Exception, longest_s: float) -> None:
        log.error("%s: %s", self._settings.device, error, extra={"event": event})
        await asyncio.sleep(float(self._bench.rng.uniform(0.5, 1.0)) * longest_s)

    async def _model_to_train_on(self) -> InstalledModel:
        """The newest model, once there is one to train on.

        Raises:
            LinkDown, FetchFailed, WrongModel, WireError: it could not be had now.
        """
        newest = await self._mailbox.head(self._is_to_train_on)
        if self._model is None or newest.head.order > self._model.head.order:
            self._model = await self._install(newest)
        return self._model

    def _is_to_train_on(self, head: Head) -> bool:
        again = self._settings.training.same_version_again
        return head.training and (again or head.version != self._trained_version)

    async def _install(self, newest: SealedHead) -> InstalledModel:
        connection = await self._mailbox.connected()
        head = newest.head
        plan_blob = self._slots.plan_blob(head.plan)
        if plan_blob is None:
            plan_blob = await self._fetcher.fetch(connection, head.plan_blob)
        content = await self._fetcher.fetch(connection, head.full_blob)
        model = self._slots.install(newest.sealed, head, plan_blob, content)
        self._mailbox.never_below(head)
        return model

    async def _train_on(self, model: InstalledModel) -> None:
        manifest = model.plan.manifest
        trainer = self._bench.trainer(model.plan)
        dataset = self._bench.examples(manifest)
        training = self._settings.training.applied_to(manifest.training)
        began = time.monotonic()
        result = await self._bench.compute(
            lambda: trainer.run_epochs(model.parameters, dataset, training, self._bench.rng)
        )
        counter = self._outbox.reserve()
        envelope = sealed_update(model, result, self._author, counter, time.time())
        self._outbox.put(counter, envelope)
        self._trained_version = model.head.version
        self.tally.trained += 1
        log.info(
            "Trained on version %d: %d examples, loss %.4f", model.head.version, result.num_examples,
            result.loss, extra={"event": "training.done"},
        )  # fmt: skip
        await self._report(model.head, result, time.monotonic() - began)

    async def _report(self, head: Head, result: LocalResult, seconds: float) -> None:
        """Tell what the training saw, now and then, at most once: metrics may be lost."""
        connection, now = self._mailbox.connection, time.monotonic()
        if connection is None or not math.isfinite(result.loss) or now < self._report_after:
            return
        self._report_after = now + _REPORT_EVERY_S
        event = TrainingEvent(
            version=head.version,
            num_examples=result.num_examples,
            steps=result.steps,
            seconds=seconds,
            loss=result.loss,
            metric=result.metric,
        )
        topic = topics.EVENT.name(self._settings.fleet, device=self._settings.device)
        await connection.publish(topic, frame.to_frame(event), qos=topics.EVENT.qos)

    async def _deliver(self, pending: Pending) -> None:
        """Send an update until its receipt comes; it stays in the outbox until then.

        An update that was never sent and cannot be for a long time is left: a newer one takes its place.
        """
        settings = self._settings
        for attempt in count():
            unsent = not self._outbox.was_sent(pending.counter)
            try:
                connection = await self._mailbox.online(settings.training.retrain_after_s if unsent else None)
            except TimeoutError:
                self._trained_version = None
                return
            try:
                receipt = await self._attempt(connection, pending, attempt)
            except LinkDown:
                continue
            if receipt is None:
                self.tally.resent += 1
                continue
            if receipt.reason is Reason.UNKNOWN_DEVICE:
                await asyncio.sleep(receipt.retry_after_s)  # until the operator has enrolled this device
                continue
            self._rest_until = time.monotonic() + receipt.retry_after_s
            self._outbox.remove(pending.counter)
            self._count(receipt)
            return

    async def _attempt(self, connection: Connection, pending: Pending, attempt: int) -> Receipt | None:
        """Publish every chunk and wait for the receipt; None: it is time to try again."""
        device, fleet = self._settings.device, self._settings.fleet
        topic = topics.UPDATE.name(fleet, shard=topics.shard_of(device, self._mailbox.shards), device=device)
        chunks = update_chunks(pending.envelope, pending.counter, chunk_bytes(connection.max_packet_bytes))
        self._outbox.note_sent(pending.counter)
        self._mailbox.forget_answers()
        self.tally.sent += 1
        await asyncio.gather(*(connection.publish(topic, chunk) for chunk in chunks))
        longest_s = min(_LONGEST_RECEIPT_WAIT_S, self._settings.receipt_timeout_s * 2.0 ** min(attempt, 10))
        while True:
            wait_s = longest_s * float(self._bench.rng.uniform(0.75, 1.0))
            answer = await self._mailbox.answer(pending, connection, wait_s)
            if not isinstance(answer, MissingChunks):
                return answer
            wanted = (chunks[index] for index in answer.indexes if 0 <= index < len(chunks))
            await asyncio.gather(*(connection.publish(topic, chunk) for chunk in wanted))

    def _count(self, receipt: Receipt) -> None:
        match receipt.verdict:
            case Verdict.APPLIED:
                self.tally.applied += 1
            case Verdict.DUPLICATE:
                self.tally.duplicate += 1
            case Verdict.REJECTED:
                self.tally.rejected += 1
