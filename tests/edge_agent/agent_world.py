"""What surrounds an agent in these tests: a model of three parameters, a broker in memory, a coordinator.

``MemoryBroker`` and ``MemoryConnection`` keep the link's contract (``fedtide.wire.link.Connection``) as far
as an agent uses it; ``test_agent_on_a_broker`` runs the same coordinator over real brokers.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import numpy as np

from edge_agent.agent import Agent, Workbench
from edge_agent.data_sources import Npz
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.settings import AgentSettings, Inference, LocalTraining
from fedtide.wire import codecs, frame, topics
from fedtide.wire import messages as wire
from fedtide.wire.chunks import Assembler, blob_ref, split
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.envelope import Envelope, open_update, update_digest
from fedtide.wire.frame import Message
from fedtide.wire.ids import Counter, DeviceId, Epoch, FleetId, ModelVersion
from fedtide.wire.link import Broker, Connection, Delivery, Dial, LinkDown, Session
from fedtide.wire.messages import (
    CodecRequest,
    CoordinatorState,
    Head,
    MissingChunks,
    Presence,
    Reason,
    Receipt,
    Resync,
    UpdateChunk,
    Verdict,
)
from fedtide.wire.model_blob import ModelBlob, ModelFormat
from fedtide.wire.parameters import Schema, TensorSpec, Vector, fingerprint, to_bytes
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified, seal_plan
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN, SigningKey
from fedtide.wire.training import Training

COORDINATOR_KEY: Final = SigningKey.from_seed(bytes(range(32)))
DEVICE_KEY: Final = SigningKey.from_seed(bytes(range(32, 64)))
STRANGERS_KEY: Final = SigningKey.from_seed(bytes(range(64, 96)))
FLEET: Final = FleetId("pumps")
DEVICE: Final = DeviceId("pump-7")
DEADLINE_S: Final = 10.0

EXAMPLES: Final = Dataset((np.ones((5, 2), np.float32),), np.zeros((5, 1), np.float32))


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; one that hangs is a failure."""

    async def within_the_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()

    asyncio.run(within_the_deadline())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that other tasks bring about."""
    while not condition():  # noqa: ASYNC110 - what is waited for is code that has no event
        await asyncio.sleep(0.001)


def tiny_plan(name: str = "line", metric: str | None = "accuracy") -> Plan:
    """A plan of three parameters whose graphs nobody runs."""
    train, evaluation = b"train graph of " + name.encode(), b"evaluation graph of " + name.encode()
    manifest = PlanManifest(
        format=1,
        name=name,
        opset=20,
        producer="by hand",
        min_onnxruntime="1.23",
        schema=Schema(
            tensors=(
                TensorSpec(name="p.slope", dtype="float32", shape=(2, 1)),
                TensorSpec(name="p.bias", dtype="float32", shape=()),
            )
        ),
        local_state=(),
        local_buffers=(),
        inputs=(TensorSpec(name="x0", dtype="float32", shape=(None, 2)),),
        targets=TensorSpec(name="y", dtype="float32", shape=(None, 1)),
        learning_rate_input="rate",
        min_batch=1,
        train_outputs=("p.slope'", "p.bias'", "loss"),
        evaluation_state=("p.slope", "p.bias"),
        metric=metric,
        optimizer="SGD",
        operators=("Add",),
        training=Training(),
        limits=Limits(),
        verified=Verified(
            steps=1, median_gradient_error=0.0, max_gradient_error=0.0, torch_float32_max_error=0.0
        ),
        train_sha256=hashlib.sha256(train).digest(),
        evaluation_sha256=hashlib.sha256(evaluation).digest(),
    )
    return Plan(manifest, train, evaluation)


@dataclass(frozen=True)
class Release:
    """One model version as a coordinator would publish it; its parameters are the version three times."""

    version: int
    epoch: int = 1
    plan: Plan = field(default_factory=tiny_plan)
    codec: str = "float32"
    chunk_bytes: int = 15  # three chunks
    training: bool = True
    key: SigningKey = COORDINATOR_KEY
    fleet: FleetId = FLEET
    released: "Release | None" = None
    """What this version's head names for inference; its own name: itself."""
    gate: str = ""

    @property
    def parameters(self) -> Vector:
        return np.full(3, self.version, np.float32)

    @property
    def content(self) -> bytes:
        return to_bytes(self.parameters)

    @property
    def keyframe(self) -> bytes:
        version, result = ModelVersion(self.version), fingerprint(self.parameters)[:16]
        return frame.to_frame(ModelBlob(ModelFormat.FLOAT32, None, version, result, self.content))

    @property
    def plan_blob(self) -> bytes:
        return seal_plan(self.plan, COORDINATOR_KEY)

    @property
    def head(self) -> Head:
        return Head(
            fleet=self.fleet,
            epoch=Epoch(self.epoch),
            version=ModelVersion(self.version),
            parent_sha256=bytes(32),
            plan=self.plan.id,
            parameters_sha256=fingerprint(self.parameters),
            plan_blob=blob_ref(self.plan_blob, 100),
            full_blob=blob_ref(self.keyframe, self.chunk_bytes),
            update_codec=CodecRequest(id=self.codec),
            training=self.training,
            release=self.release,
            issued=1_700_000_000.0,
            expires=1_700_086_400.0,
        )

    @property
    def release(self) -> wire.Release | None:
        released = self.released
        return released and wire.Release(
            version=ModelVersion(released.version),
            parameters_sha256=fingerprint(released.parameters),
            blob=blob_ref(released.keyframe, released.chunk_bytes),
            gate=self.gate,
        )

    def itself(self, gate: str = "") -> "Release":
        """This version, released by its own head."""
        return replace(self, released=replace(self, released=None), gate=gate)

    @property
    def sealed_head(self) -> bytes:
        return seal(self.head, self.key, HEAD_DOMAIN)

    def blob_messages(self) -> dict[str, bytes]:
        """The retained chunks by topic."""
        head = self.head
        blobs = [(head.plan_blob, self.plan_blob), (head.full_blob, self.keyframe)]
        if self.released is not None and head.release is not None:
            blobs.append((head.release.blob, self.released.keyframe))
        return {
            topics.BLOB_CHUNK.name(FLEET, blob=ref.id, index=index): piece
            for ref, content in blobs
            for index, piece in enumerate(split(content, ref.chunk_bytes))
        }


@dataclass(frozen=True)
class Published:
    """What somebody published."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class MemoryConnection:
    """One connection to a ``MemoryBroker``."""

    def __init__(self, broker: "MemoryBroker", session: Session) -> None:
        self.mqtt_version = "5"
        self.session_present = False
        self.max_packet_bytes: int | None = broker.max_packet_bytes
        self.session = session
        self.filters: set[str] = set()
        self.asked: list[str] = []
        """Every topic that was subscribed to, in order."""
        self.ended: str | None = None
        self._broker = broker
        self._lost = asyncio.Event()
        self._inbox: asyncio.Queue[Delivery | None] = asyncio.Queue()

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self._check()
        await asyncio.sleep(0)
        self._check()
        self._broker.take(Published(topic, payload, qos, retain))

    async def subscribe(self, filters: Sequence[str], *, qos: int = 1) -> None:
        self._check()
        await asyncio.sleep(0)
        self._check()
        self.filters |= set(filters)
        self.asked.extend(filters)
        for topic in filters:
            if topic in self._broker.retained:
                self.deliver(topic, self._broker.retained[topic], retained=True)

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        self._check()
        await asyncio.sleep(0)
        self._check()
        self.filters -= set(filters)

    def deliver(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        self._inbox.put_nowait(Delivery(topic, payload, 1, 1, retained))

    async def deliveries(self) -> AsyncIterator[Delivery]:
        while True:
            delivery = await self._inbox.get()
            if delivery is None:
                self._inbox.put_nowait(None)
                raise LinkDown(f"connection {self.ended}")
            yield delivery
            self._inbox.task_done()

    async def drained(self) -> None:
        """Wait until whatever was delivered has been filed."""
        await self._inbox.join()

    def acknowledge(self, delivery: Delivery) -> None:
        pass

    async def close(self) -> None:
        self._end("closed")

    def abort(self) -> None:
        self._end("aborted")

    def _check(self) -> None:
        if self.ended:
            raise LinkDown(f"connection {self.ended}")

    def _end(self, how: str) -> None:
        if self.ended is None:
            self.ended = how
            self._inbox.put_nowait(None)


class MemoryBroker:
    """Retained messages and connections, all topics by their exact names."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.connections: list[MemoryConnection] = []
        self.published: list[Published] = []
        self.reachable = True
        self.max_packet_bytes: int | None = None
        self.on_publish: Callable[[Published], None] = lambda _: None

    async def dial(self, session: Session, _attempt: int) -> Connection:
        if not self.reachable:
            raise LinkDown("nobody there")
        connection = MemoryConnection(self, session)
        self.connections.append(connection)
        return connection

    @property
    def newest(self) -> MemoryConnection:
        return self.connections[-1]

    def take(self, published: Published) -> None:
        self.published.append(published)
        if published.retain:
            self.retained[published.topic] = published.payload
        for connection in self.connections:
            if not connection.ended and published.topic in connection.filters:
                connection.deliver(published.topic, published.payload)
        self.on_publish(published)


@dataclass(frozen=True)
class Arrived:
    """A whole update as the coordinator got it."""

    envelope: Envelope
    digest: bytes

    @property
    def counter(self) -> Counter:
        return self.envelope.header.counter

    @property
    def delta(self) -> Vector:
        codec = codecs.get(self.envelope.header.codec)
        return codec.decode(self.envelope.payload, tiny_plan().manifest.schema)


class ScriptedCoordinator:
    """Collects updates and says what the test tells it to.

    Args:
        publish: how it publishes: topic, payload, whether retained.

    Attributes:
        updates: whole updates, in the order in which their last chunk came.
        chunks: every chunk that came.
    """

    def __init__(self, publish: Callable[[str, bytes, bool], Awaitable[None]]) -> None:
        self._publish = publish
        self._assembler = Assembler(1 << 20, 1 << 20)
        self.updates: asyncio.Queue[Arrived] = asyncio.Queue()
        self.chunks: list[UpdateChunk] = []

    def take(self, topic: str, payload: bytes) -> None:
        fields = topics.UPDATE.parse(topic)
        if fields is None:
            return
        chunk = frame.from_frame(payload, UpdateChunk, 1 << 20)
        self.chunks.append(chunk)
        raw = self._assembler.add(fields["device"], chunk, 0.0)
        if raw is not None:
            self.updates.put_nowait(Arrived(open_update(raw, 1 << 20), update_digest(raw)))

    async def publish(self, release: Release) -> None:
        for topic, piece in release.blob_messages().items():
            await self._publish(topic, piece, True)
        await self._publish(topics.HEAD.name(FLEET), release.sealed_head, True)

    async def announce(
        self,
        *,
        online: bool = True,
        epoch: int = 1,
        shards: int = 1,
        spread_s: float = 0.0,
        key: SigningKey = COORDINATOR_KEY,
    ) -> None:
        state = CoordinatorState(
            fleet=FLEET,
            epoch=Epoch(epoch),
            online=online,
            protocol_min=1,
            protocol_max=1,
            shards=shards,
            spread_s=spread_s,
        )
        await self._publish(topics.COORDINATOR.name(FLEET), seal(state, key, COORDINATOR_DOMAIN), True)

    async def answer(
        self,
        update: Arrived,
        verdict: Verdict = Verdict.APPLIED,
        reason: Reason | None = None,
        **changes: object,
    ) -> None:
        """A receipt for an update, with some fields changed."""
        await self.tell(msgspec.structs.replace(receipt_for(update, verdict, reason), **changes))

    async def ask_for(self, update: Arrived, *indexes: int) -> None:
        """Say that chunks are missing."""
        await self.tell(
            MissingChunks(device=DEVICE, counter=update.counter, digest=update.digest, indexes=indexes)
        )

    async def ask_for_all(self) -> None:
        await self.tell(Resync(device=DEVICE))

    async def tell(
        self, message: Message, key: SigningKey = COORDINATOR_KEY, domain: bytes = DOWN_DOMAIN
    ) -> None:
        await self._publish(topics.DOWN.name(FLEET, device=DEVICE), seal(message, key, domain), False)


def receipt_for(update: Arrived, verdict: Verdict = Verdict.APPLIED, reason: Reason | None = None) -> Receipt:
    return Receipt(
        device=DEVICE,
        counter=update.counter,
        digest=update.digest,
        verdict=verdict,
        reason=reason,
        version=ModelVersion(1),
    )


class AddOne:
    """A trainer that takes one step: it adds 1 to every parameter. It counts how often it was asked."""

    def __init__(self) -> None:
        self.runs = 0

    def run_epochs(
        self,
        parameters: Vector,
        dataset: Dataset,
        _training: Training,
        _rng: np.random.Generator,
        **_more: object,
    ) -> LocalResult:
        self.runs += 1
        return LocalResult(parameters + np.float32(1), len(dataset), 1, loss=0.5, metric=0.75)


def agent_settings(
    state: Path,
    *,
    receipt_timeout_s: float = 1000.0,
    training: LocalTraining | None = None,
    inference: Inference | None = None,
) -> AgentSettings:
    return AgentSettings(
        fleet=FLEET,
        device=DEVICE,
        coordinator_key=str(COORDINATOR_KEY.public),
        key=state / "device.key",
        state=state,
        data=Npz(path=state / "examples.npz"),
        broker=Broker(reconnect_min_s=1e-3, reconnect_max_s=1e-3),
        training=training or LocalTraining(),
        inference=inference or Inference(min_interval_s=0.0),
        receipt_timeout_s=receipt_timeout_s,
    )


async def at_once(work: Callable[[], LocalResult]) -> LocalResult:
    return work()


def workbench(dial: Dial, trainer: object | None = None) -> Workbench:
    chosen = cast("Trainer", trainer or AddOne())
    return Workbench(
        dial=dial,
        examples=lambda _: EXAMPLES,
        trainer=lambda _: chosen,
        compute=at_once,
        rng=np.random.default_rng(3),
        disk=UNSYNCED_DISK,
    )


@dataclass
class World:
    """A broker in memory, a coordinator on it, and one device's files."""

    state: Path
    broker: MemoryBroker
    coordinator: ScriptedCoordinator
    trainer: AddOne = field(default_factory=AddOne)
    _agents: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    def new(cls, state: Path) -> "World":
        broker = MemoryBroker()

        async def publish(topic: str, payload: bytes, retain: bool) -> None:  # noqa: FBT001
            broker.take(Published(topic, payload, 1, retain))

        coordinator = ScriptedCoordinator(publish)
        broker.on_publish = lambda published: coordinator.take(published.topic, published.payload)
        return cls(state, broker, coordinator)

    def agent(self, **changes: Any) -> Agent:
        """A new process of the agent, as after a start; its files are what the last one left."""
        return Agent(
            agent_settings(self.state, **changes), DEVICE_KEY, workbench(self.broker.dial, self.trainer)
        )

    def start(self, agent: Agent) -> asyncio.Task[None]:
        task = asyncio.create_task(agent.run())
        self._agents.append(task)
        return task

    async def stop(self) -> None:
        """End every agent, and raise what one of them failed with."""
        for task in self._agents:
            task.cancel()
        ended = await asyncio.gather(*self._agents, return_exceptions=True)
        self._agents.clear()
        for result in ended:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    def outbox_files(self) -> set[str]:
        return {file.name for file in (self.state / "outbox").glob("*.update")}

    def presences(self) -> list[Presence]:
        topic = topics.PRESENCE.name(FLEET, device=DEVICE)
        return [
            frame.from_frame(published.payload, Presence)
            for published in self.broker.published
            if published.topic == topic
        ]
