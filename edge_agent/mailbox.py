"""The mailbox: the agent's connection, and the newest of everything that came over it.

It dials, announces the device, and files what arrives; the agent's work loop waits here for what it needs.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Final, cast

import numpy as np

from edge_agent.answers import NO_MESSAGES, Answers
from edge_agent.coordinator_view import CoordinatorView, SealedHead
from edge_agent.fetch import Fetcher
from edge_agent.outbox import Pending
from edge_agent.settings import AgentSettings
from edge_agent.turn import Turn
from fedtide import __version__
from fedtide.wire import frame, topics
from fedtide.wire.clock import Clock
from fedtide.wire.codecs import CODECS
from fedtide.wire.errors import UnsupportedVersion, WireError
from fedtide.wire.ids import ModelVersion
from fedtide.wire.link import Connection, Delivery, Dial, LinkDown, PublishRefused, Reconnector, Session, Will
from fedtide.wire.messages import DownMessage, Head, MissingChunks, Presence, Receipt, Resync
from fedtide.wire.seal import unseal_any
from fedtide.wire.signatures import DOWN_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_ASK_AGAIN_S: Final = 5.0
_ASK_AGAIN_AT_MOST_S: Final = 300.0
_STATE_WAIT_S: Final = 1.0  # for the coordinator's retained state on a new connection
_RECEIVE_MAXIMUM: Final = 4  # chunks under way to this device; the broker's memory for it is bounded by that


class Mailbox:
    """One device's connection and what arrived over it.

    Args:
        settings: from ``agent.toml``.
        coordinator: the pinned key.
        public: the device's own public key, shown in its presence.
        fetcher: takes the chunks.
        dial: makes connections.
        rng: draws the boot id and the waits between connections.
        clock: tells the time.

    Attributes:
        connection: the live one, or None.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        coordinator: PublicKey,
        public: PublicKey,
        fetcher: Fetcher,
        dial: Dial,
        rng: np.random.Generator,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._coordinator = coordinator
        self._public = public
        self._fetcher = fetcher
        self._clock = clock
        self._reconnector = Reconnector(dial, settings.broker, rng, self._log_failure)
        self._boot = rng.bytes(8).hex()
        self.connection: Connection | None = None
        self._news = asyncio.Event()
        self._heads = 0
        self._view = CoordinatorView(settings.fleet, coordinator, clock.wall)
        self._held: ModelVersion | None = None
        self._answers = Answers()
        self._turn = Turn(rng, clock)
        self._listening: Connection | None = None
        self._heard_on: Connection | None = None  # the coordinator's state
        self._greeted_on: Connection | None = None  # it, or a head

    @property
    def shards(self) -> int:
        """Number of ingest shards the coordinator announced."""
        return self._view.shards

    def never_below(self, head: Head, *, held: bool = True) -> None:
        """From here on older heads are ignored: this model has been run, and is ``held`` or no longer."""
        self._view.never_below(head)
        if held:
            self._held = head.version

    async def run(self) -> None:
        """Connect, listen, connect again, until cancelled."""
        while True:
            connection = await self._reconnector.connect(self._session())
            try:
                await self._listen(connection)
            except* (LinkDown, PublishRefused) as lost:
                log.warning("Broker: %s", lost.exceptions[0], extra={"event": "link.down"})
                self.connection = None
            finally:
                # One that is cancelled while online stays online, for the goodbye.
                if self.connection is not connection:
                    connection.abort()
            self._news.set()
            await self._reconnector.pause()

    async def say_goodbye(self) -> None:
        """Tell the fleet that this device leaves, if it is connected."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(1.0):
                await connection.publish(*self._presence_message(online=False), retain=True)
        except (LinkDown, PublishRefused, TimeoutError):
            pass
        await connection.close()

    def cut(self) -> None:
        """Lose the connection without a goodbye."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()

    async def connected(self) -> Connection:
        """A live connection, whether the coordinator is there or not: the broker has its models."""
        await self._until(lambda: self.connection is not None)
        if self.connection is None:
            raise LinkDown("the connection was lost")
        return self.connection

    async def left_alone(self) -> None:
        """Wait until the coordinator is known to be away, perhaps for good."""
        await self._until(lambda: self._view.away)

    async def not_understood(self) -> UnsupportedVersion:
        """Wait until the coordinator is one that does not speak this build's protocol."""
        await self._until(lambda: self._view.unsupported is not None)
        return cast("UnsupportedVersion", self._view.unsupported)

    async def understood(self) -> None:
        """Wait until it is one that does."""
        await self._until(lambda: self._view.unsupported is None)

    async def online(self, timeout_s: float | None = None) -> Connection:
        """A live connection, while the coordinator is not known to be away, or to speak another protocol.

        Raises:
            TimeoutError: there was none for ``timeout_s`` seconds.
        """
        async with asyncio.timeout(timeout_s):
            await self._until(lambda: self.connection is not None and not self._view.away)
        connection = self.connection
        if connection is None:
            raise LinkDown("the connection was lost")
        return connection

    async def head(
        self, wanted: Callable[[Head], bool], look_again_s: Callable[[], float | None] = lambda: None
    ) -> SealedHead:
        """The newest head, once it is one that is wanted.

        Args:
            wanted: asked of each newer head, and again of the newest when time has passed.
            look_again_s: asked whenever a head is not wanted: seconds after which it may be, or None.
        """
        while True:
            newest = self._view.newest_head()
            if newest is not None and wanted(newest.head):
                return newest
            # Without a head there is nothing to ask about, and the times tell nothing.
            wait_s = look_again_s() if newest is not None else None
            await self._within(wait_s, lambda: self._view.has_unread_heads)

    def forget_answers(self) -> None:
        """Before an update is sent (again): what was answered to an earlier attempt does not count."""
        self._answers.forget()

    async def turn(self, connection: Connection, pending: Pending) -> Receipt | None:
        """Wait until it is this device's turn to send; not where the coordinator asks for chunks meanwhile.

        Returns:
            The receipt of an earlier attempt, if it comes meanwhile: then there is nothing to send.

        Raises:
            LinkDown: the connection was lost, or the coordinator went away.
        """
        if self._greeted_on is not connection:
            await self._within(
                _STATE_WAIT_S, lambda: self._greeted_on is connection or self.connection is not connection
            )
        if self._turn.left_s and self.connection is connection:
            self.forget_answers()
        while (left_s := self._turn.left_s) and self.connection is connection and not self._view.away:
            await self._within(left_s, partial(self._no_longer_waits, connection, pending, self._turn.moment))
            if self._answers.has(pending):
                return self._answers.receipt(pending)
        if self.connection is not connection or self._view.away:
            raise LinkDown("the connection or the coordinator was lost before it was this device's turn")
        return None

    def _no_longer_waits(self, connection: Connection, pending: Pending, moment: float) -> bool:
        lost = self.connection is not connection or self._view.away
        return lost or self._answers.has(pending) or self._turn.moment != moment

    async def answer(
        self,
        pending: Pending,
        connection: Connection,
        timeout_s: float,
        messages: frozenset[bytes] = NO_MESSAGES,
    ) -> Receipt | MissingChunks | None:
        """The coordinator's answer to an update sent over ``connection``; None: send it again.

        ``messages``: digests of those in which it was sent.
        """
        answers = self._answers
        await self._within(
            timeout_s,
            lambda: answers.has(pending, messages) or self.connection is not connection or answers.resync,
        )
        missing = answers.missing(pending)
        answers.forget_missing()
        return answers.receipt(pending, messages) or missing

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def _within(self, seconds: float | None, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or so long; None: without end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(condition)

    def _session(self) -> Session:
        will = Will(*self._presence_message(online=False))
        return Session(
            client_id=f"{self._settings.fleet}-{self._settings.device}",
            clean_start=True,
            expiry_s=0,
            receive_maximum=_RECEIVE_MAXIMUM,
            will=will,
        )

    def _presence_message(self, *, online: bool) -> tuple[str, bytes]:
        presence = Presence(online=online, boot=self._boot)
        if online:
            presence = Presence(
                online=True,
                boot=self._boot,
                public_key=self._public.raw,
                agent_version=__version__,
                protocol=frame.PROTOCOL_VERSION,
                codecs=tuple(CODECS),
                model_version=self._held,
                sent=self._clock.wall(),
            )
        topic = topics.PRESENCE.name(self._settings.fleet, device=self._settings.device)
        return topic, frame.to_frame(presence)

    async def _listen(self, connection: Connection) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(connection), name=f"{self._settings.device}.announce")
            # What ends only with the connection is the group's body, not its child: when a child fails after
            # the body has ended, the task counts as cancelled for ever (CPython 3.11 and 3.12).
            await self._file_deliveries(connection)

    async def _announce(self, connection: Connection) -> None:
        fleet, heads = self._settings.fleet, self._heads
        qos = 1 if connection.mqtt_version == "5" else 0
        await connection.publish(*self._presence_message(online=True), retain=True)
        down = topics.DOWN.name(fleet, device=self._settings.device)
        await connection.subscribe([topics.COORDINATOR.name(fleet), topics.HEAD.name(fleet), down], qos=qos)
        log.info("Connected with MQTT %s", connection.mqtt_version, extra={"event": "link.up"})
        if self._heard_on is not connection:
            self._turn.come_back(self._view.state)
        self.connection = connection
        self._news.set()
        await self._ask_again(connection, qos, heads)

    async def _ask_again(self, connection: Connection, qos: int, heads: int) -> None:
        """Subscribe anew, ever more rarely, until a head has come on this connection.

        NATS answers a SUBSCRIBE before it has loaded its retained messages, and never sends them later.
        """
        fleet, wait_s = self._settings.fleet, _ASK_AGAIN_S
        while True:
            await asyncio.sleep(wait_s)
            if self._heads != heads:
                return
            await connection.subscribe([topics.COORDINATOR.name(fleet), topics.HEAD.name(fleet)], qos=qos)
            wait_s = min(2 * wait_s, _ASK_AGAIN_AT_MOST_S)

    async def _file_deliveries(self, connection: Connection) -> None:
        self._listening = connection
        async for delivery in connection.deliveries():
            connection.acknowledge(delivery)
            try:
                self._file(delivery)
            except WireError as error:
                log.warning("Ignored %s: %s", delivery.topic, error, extra={"event": "message.ignored"})
            self._news.set()

    def _file(self, delivery: Delivery) -> None:
        topic, fleet = delivery.topic, self._settings.fleet
        if (fields := topics.BLOB_CHUNK.parse(topic)) and fields["index"].isdecimal():
            self._fetcher.take(fields["blob"], int(fields["index"]), delivery.payload)
        elif topic == topics.DOWN.name(fleet, device=self._settings.device):
            self._file_down(unseal_any(delivery.payload, DownMessage, self._coordinator, DOWN_DOMAIN))
        elif topic == topics.HEAD.name(fleet):
            self._view.hear_head(delivery.payload)
            self._greeted_on = self._listening
            self._heads += 1
            self._fetcher.note_head()
        elif topic == topics.COORDINATOR.name(fleet):
            self._hear_state(delivery.payload)

    def _hear_state(self, sealed: bytes) -> None:
        before, first = self._view.state, self._heard_on is not self._listening
        self._view.hear_state(sealed)
        if self._view.state is not None and self._view.state is not before:
            self._turn.hear(None if first else before, self._view.state)
            self._heard_on = self._greeted_on = self._listening

    def _file_down(self, message: frame.Message) -> None:
        if isinstance(message, Receipt | MissingChunks) and not self._view.believes(message.epoch):
            log.warning(
                "Ignored what a coordinator of epoch %d says of update %d: epoch %d has begun",
                message.epoch, message.counter, self._view.epoch, extra={"event": "coordinator.fenced"},
            )  # fmt: skip
            return
        match message:
            case Receipt():
                self._answers.hear_receipt(message)
            case MissingChunks():
                self._answers.hear_missing(message)
            case Resync():
                self._answers.resync = True
                self._turn.come_back(self._view.state)

    def _log_failure(self, error: LinkDown, wait_s: float) -> None:
        log.warning("%s; next attempt in %.1f s", error, wait_s, extra={"event": "link.retry"})
