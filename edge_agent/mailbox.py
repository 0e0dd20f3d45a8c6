"""The mailbox: the agent's connection, and the newest of everything that came over it.

It dials, announces the device, and files what arrives; the agent's work loop waits here for what it needs.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.fetch import Fetcher
from edge_agent.outbox import Pending
from edge_agent.settings import AgentSettings
from fedtide import __version__
from fedtide.wire import frame, topics
from fedtide.wire.clock import Clock
from fedtide.wire.codecs import CODECS
from fedtide.wire.errors import WireError
from fedtide.wire.ids import Epoch, ModelVersion
from fedtide.wire.link import Connection, Delivery, Dial, LinkDown, PublishRefused, Reconnector, Session, Will
from fedtide.wire.messages import (
    CoordinatorState,
    DownMessage,
    Head,
    MissingChunks,
    Presence,
    Receipt,
    Resync,
    Verdict,
)
from fedtide.wire.seal import unseal, unseal_any
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_UNREAD_HEADS: Final = 4  # more than one, so that a forgery does not push a real head out
_ASK_AGAIN_S: Final = 5.0
_ASK_AGAIN_AT_MOST_S: Final = 300.0
_RECEIVE_MAXIMUM: Final = 4  # chunks under way to this device; the broker's memory for it is bounded by that


@dataclass(frozen=True)
class SealedHead:
    """A head with the bytes it was signed as."""

    head: Head
    sealed: bytes


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
        shards: number of ingest shards the coordinator announced.
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
        self._head: SealedHead | None = None
        self._heads = 0
        self._unread_heads: deque[bytes] = deque(maxlen=_UNREAD_HEADS)
        self._floor: tuple[Epoch, ModelVersion] = (Epoch(0), ModelVersion(0))
        self._held: ModelVersion | None = None
        self._coordinator_state: CoordinatorState | None = None
        self._receipt: Receipt | None = None
        self._missing: MissingChunks | None = None
        self._resync = False
        self.shards = 1

    def never_below(self, head: Head) -> None:
        """From here on older heads are ignored: this model has been run."""
        self._floor, self._held = head.order, head.version

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
        await self._until(self._coordinator_away)

    async def online(self, timeout_s: float | None = None) -> Connection:
        """A live connection, while the coordinator is not known to be away.

        Raises:
            TimeoutError: there was none for ``timeout_s`` seconds.
        """
        async with asyncio.timeout(timeout_s):
            await self._until(lambda: self.connection is not None and not self._coordinator_away())
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
            newest = self._newest_head()
            if newest is not None and wanted(newest.head):
                return newest
            with contextlib.suppress(TimeoutError):
                # Without a head there is nothing to ask about, and the times tell nothing.
                async with asyncio.timeout(look_again_s() if newest is not None else None):
                    await self._until(lambda: bool(self._unread_heads))

    def forget_answers(self) -> None:
        """Before an update is sent (again): what was answered to an earlier attempt does not count."""
        self._receipt = self._missing = None
        self._resync = False

    async def answer(
        self, pending: Pending, connection: Connection, timeout_s: float
    ) -> Receipt | MissingChunks | None:
        """The coordinator's answer to an update sent over ``connection``; None: send it again."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(
                    lambda: self._answered(pending) or self.connection is not connection or self._resync
                )
        except TimeoutError:
            return None
        receipt, missing, self._missing = self._receipt, self._missing, None
        if receipt is not None and _answers(receipt, pending):
            return receipt
        return missing if missing is not None and _answers(missing, pending) else None

    def _answered(self, pending: Pending) -> bool:
        return any(
            message is not None and _answers(message, pending) for message in (self._receipt, self._missing)
        )

    def _coordinator_away(self) -> bool:
        return self._coordinator_state is not None and not self._coordinator_state.online

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

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
            self._unread_heads.append(delivery.payload)
            self._heads += 1
            self._fetcher.note_head()
        elif topic == topics.COORDINATOR.name(fleet):
            state = unseal(delivery.payload, CoordinatorState, self._coordinator, COORDINATOR_DOMAIN)
            if self._coordinator_state is None or state.epoch >= self._coordinator_state.epoch:
                self._coordinator_state, self.shards = state, max(1, state.shards)

    def _newest_head(self) -> SealedHead | None:
        """Unsealed when it is asked for: while a device trains, heads may pass it by."""
        unread = list(self._unread_heads)
        self._unread_heads.clear()
        for sealed in unread:  # all of them: the last to come is not always the newest
            try:
                head = unseal(sealed, Head, self._coordinator, HEAD_DOMAIN)
            except WireError as error:
                log.warning("Ignored a head: %s", error, extra={"event": "head.ignored"})
                continue
            if self._accepts(head):
                self._head = SealedHead(head, sealed)
        return self._head

    def _accepts(self, head: Head) -> bool:
        newest = max(self._floor, self._head.head.order) if self._head else self._floor
        if head.fleet != self._settings.fleet or head.order < newest or head.version < self._floor[1]:
            log.warning(
                "Ignored the head of version %d, epoch %d: older than what this device has run",
                head.version, head.epoch, extra={"event": "head.older"},
            )  # fmt: skip
            return False
        if self._clock.wall() > head.expires:
            log.warning("The head of version %d has expired: is the coordinator away?", head.version,
                        extra={"event": "head.expired"})  # fmt: skip
        return True

    def _file_down(self, message: frame.Message) -> None:
        match message:
            case Receipt():
                if message.verdict is Verdict.REJECTED:
                    log.warning(
                        "Update %d was rejected: %s", message.counter, message.detail,
                        extra={"event": "update.rejected", "reason": message.reason},
                    )  # fmt: skip
                self._receipt = message
            case MissingChunks():
                self._missing = message
            case Resync():
                self._resync = True

    def _log_failure(self, error: LinkDown, wait_s: float) -> None:
        log.warning("%s; next attempt in %.1f s", error, wait_s, extra={"event": "link.retry"})


def _answers(message: Receipt | MissingChunks, pending: Pending) -> bool:
    return message.counter == pending.counter and message.digest == pending.digest
