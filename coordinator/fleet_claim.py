"""This run's claim of the fleet at the broker: look whether another has it, say so, and keep listening."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from coordinator.fencing import Fence, Heard
from coordinator.publisher import Publisher
from fedtide.wire import topics
from fedtide.wire.errors import WireError
from fedtide.wire.ids import FleetId
from fedtide.wire.link import Connection, Delivery, LinkDown, PublishRefused, Reconnector, Session
from fedtide.wire.messages import Head
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_SAY_AGAIN_S: Final = 5.0
_MOST_HELD: Final = 256
"""Updates that may wait for the claim to be heard; brokers that know MQTT 5 have at most 32 under way."""


class FleetClaim:
    """Holds updates back until it is certain that no other run has the fleet.

    Args:
        fleet: which.
        run: this run's id.
        key: the coordinator's.
        fence: decides.
        publisher: says that this run is there.
        on_head: told of the highest head of any run that the broker keeps, once the fleet is this run's.
    """

    def __init__(
        self,
        fleet: FleetId,
        run: str,
        key: PublicKey,
        *,
        fence: Fence,
        publisher: Publisher,
        on_head: Callable[[Head], Awaitable[None]],
    ) -> None:
        self._fleet = fleet
        self._run = run
        self._key = key
        self._fence = fence
        self._publisher = publisher
        self._on_head = on_head
        self._topics = (topics.COORDINATOR.name(fleet), topics.HEAD.name(fleet))
        self._head: Head | None = None
        self._ours = asyncio.Event()
        self._saying: set[asyncio.Task[None]] = set()

    async def look(self, reconnector: Reconnector) -> None:
        """Hear what the broker keeps in the coordinator's name, in nobody's way.

        Raises:
            Fenced: another run has the fleet.
        """
        name = f"{self._fleet}-coordinator-look-{self._run}"
        session = Session(name, clean_start=True, expiry_s=0, receive_maximum=1, will=None)
        looked = False
        while not looked:
            connection = await reconnector.connect(session)
            listening = asyncio.create_task(self._overhear(connection), name="coordinator.look")
            try:
                await connection.subscribe(self._topics, qos=0)
                # What was retained came before the answer to this.
                await connection.unsubscribe(self._topics)
                looked = True
            except LinkDown as error:
                log.warning("Broker: %s", error, extra={"event": "link.down"})
            finally:
                await connection.close()
                await listening
            if not looked:
                await reconnector.pause()

    async def _overhear(self, connection: Connection) -> None:
        """Until the connection ends."""
        with contextlib.suppress(LinkDown):
            async for delivery in connection.deliveries():
                self._hear(delivery, looking=True)

    async def listen(self, connection: Connection) -> None:
        """Ask for what is said in the coordinator's name, before anything is said on this connection."""
        # At QoS 0 it goes past the updates that wait to be acknowledged, which wait for this.
        await connection.subscribe(self._topics, qos=0)

    async def announce(self, connection: Connection) -> None:
        """Say that this run is there until that has come back: then the fleet is its own.

        Raises:
            LinkDown: the connection was lost.
        """
        while not self._ours.is_set():
            await self._publisher.announce(connection, online=True)
            try:
                async with asyncio.timeout(_SAY_AGAIN_S):
                    await self._ours.wait()
            except TimeoutError:
                log.warning("The broker does not bring our own state", extra={"event": "claim.silent"})
        await connection.unsubscribe([topics.HEAD.name(self._fleet)])
        head, self._head = self._head, None
        if head is not None:
            await self._on_head(head)

    async def deliveries(self, connection: Connection) -> AsyncIterator[Delivery]:
        """What devices send; updates only from when the fleet is this run's.

        Raises:
            Fenced: another run has the fleet.
            LinkDown: the connection was lost.
        """
        # Here: what lies in the inbox already is taken before any other task has its turn.
        self._ours.clear()
        held: list[Delivery] = []
        async for delivery in connection.deliveries():
            if delivery.topic in self._topics:
                heard = self._hear(delivery)
                if heard in (Heard.LOSER, Heard.OUR_WILL) and self._ours.is_set():
                    # Beside this: the broker's answer is not read before the deliveries that wait here.
                    saying = asyncio.create_task(self._say_again(connection), name="coordinator.say_again")
                    self._saying.add(saying)
                    saying.add_done_callback(self._saying.discard)
                if self._ours.is_set():
                    for earlier in held:
                        yield earlier
                    held.clear()
            elif self._ours.is_set() or topics.UPDATE.parse(delivery.topic) is None:
                yield delivery
            elif len(held) < _MOST_HELD:
                held.append(delivery)

    def _hear(self, delivery: Delivery, *, looking: bool = False) -> Heard:
        if delivery.topic == topics.HEAD.name(self._fleet):
            self._hear_head(delivery.payload)
            return Heard.NOTHING
        heard = self._fence.hear(delivery.payload, looking=looking)
        if heard is Heard.OURS and not looking:
            self._ours.set()
        return heard

    def _hear_head(self, sealed: bytes) -> None:
        try:
            head = unseal(sealed, Head, self._key, HEAD_DOMAIN)
        except WireError:
            return
        if head.fleet == self._fleet and (self._head is None or head.version > self._head.version):
            self._head = head

    async def _say_again(self, connection: Connection) -> None:
        """A run that has to end, or a connection of ours that was lost, spoke last: devices wait."""
        if not self._publisher.online:
            return  # it was our goodbye
        try:
            await self._publisher.announce(connection, online=True)
        except (LinkDown, PublishRefused) as error:
            log.warning("Broker: %s", error, extra={"event": "publish.refused"})
