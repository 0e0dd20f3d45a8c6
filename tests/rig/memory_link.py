"""A connection to a ``MemoryBroker``: ``fedtide.wire.link.Connection`` over two pipes, each in order."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from virtual_time import End, VirtualLoop, current_process, stay_alive

from fedtide.wire.link import Delivery, LinkDown, PublishRefused, Session, Traffic
from fedtide.wire.packets import packet_bytes

if TYPE_CHECKING:
    from memory_broker import MemoryBroker

CONNECT_TIMEOUT_S: Final = 10.0
_PUBLISH_WINDOW: Final = 16
APART_S: Final = 1e-8


@dataclass(frozen=True)
class Packet:
    """A PUBLISH."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    number: int


def later(wait_s: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
    """Call this as the rig: a packet on its way does not care who dies."""
    loop = asyncio.get_running_loop()
    when = loop.time() + wait_s
    if isinstance(loop, VirtualLoop):
        return loop.in_rig_at(when, callback, *args)
    return loop.call_at(when, callback, *args)


class _Pipe:
    """One direction of a connection: what goes in comes out a while later, in order, unless it is held."""

    def __init__(self, broker: "MemoryBroker") -> None:
        self._broker = broker
        self._last = 0.0
        self._held: deque[tuple[Callable[..., object], tuple[Any, ...]]] | None = None
        self.closed = False

    def send(self, callback: Callable[..., object], *args: Any) -> None:
        if self.closed:
            return
        now = asyncio.get_running_loop().time()
        low, high = self._broker.weather.latency_s
        # Never at the same moment: a loop's timers that are due together have no order.
        self._last = max(self._last + APART_S, now + float(self._broker.rng.uniform(low, high)))
        later(self._last - now, self._arrive, callback, args)

    def hold(self, *, held: bool) -> None:
        if held and self._held is None:
            self._held = deque()
        elif not held and self._held is not None:
            waiting, self._held = self._held, None
            for callback, args in waiting:
                self.send(callback, *args)

    def _arrive(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if self.closed:
            return
        if self._held is not None:
            self._held.append((callback, args))
        else:
            callback(*args)


class MemoryConnection:
    """One connection.

    Args:
        broker: its other end.
        machine: where it comes from.
        session: who connects, and how.
        traffic: counts its packets.
        session_present: whether the broker remembered the session.
    """

    def __init__(
        self,
        broker: "MemoryBroker",
        machine: str,
        session: Session,
        traffic: Traffic,
        *,
        session_present: bool,
    ) -> None:
        self.machine = machine
        self.session = session
        self.mqtt_version = broker.limits.mqtt_version
        self.session_present = session_present
        self.max_packet_bytes = broker.limits.max_packet_bytes
        self._broker = broker
        self._traffic = traffic
        self._up, self._down = _Pipe(broker), _Pipe(broker)
        self._lost: LinkDown | None = None
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._numbers = 0
        self._is_held = False
        self._window = asyncio.Semaphore(_PUBLISH_WINDOW)
        self._inbox: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._giving_up: list[asyncio.TimerHandle] = []
        process = current_process()
        if process is not None:
            process.at_end.append(self._process_ended)

    # The link's contract.

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """See ``Connection.publish``."""
        stay_alive()
        size_bytes = packet_bytes(topic, payload)
        if self.max_packet_bytes is not None and size_bytes > self.max_packet_bytes:
            raise PublishRefused(
                f"{size_bytes:,} bytes on {topic}; the broker takes at most {self.max_packet_bytes:,}"
            )
        async with self._window:
            self._check()
            self._traffic.sent_bytes += size_bytes
            self._traffic.sent_messages += 1
            number = self._number()
            self._up.send(self._broker.take, self, Packet(topic, payload, qos, retain, number))
            if qos:
                await self._answer(number)

    async def subscribe(self, filters: Sequence[str], *, qos: int = 1) -> None:
        """See ``Connection.subscribe``."""
        self._check()
        number = self._number()
        self._up.send(self._broker.subscribe, self, number, list(filters), qos)
        await self._answer(number)

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """See ``Connection.unsubscribe``."""
        self._check()
        number = self._number()
        self._up.send(self._broker.unsubscribe, self, number, list(filters))
        await self._answer(number)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """See ``Connection.deliveries``."""
        while True:
            delivery = await self._inbox.get()
            if delivery is None:
                self._inbox.put_nowait(None)  # everyone who waits shall hear it
                self._check()
                return
            yield delivery

    def acknowledge(self, delivery: Delivery) -> None:
        """See ``Connection.acknowledge``."""
        stay_alive()
        if delivery.qos and self._lost is None:
            self._up.send(self._broker.acknowledge, self, delivery.packet_id)

    async def close(self) -> None:
        """See ``Connection.close``."""
        stay_alive()
        if self._lost is None:
            self._up.send(self._broker.goodbye, self)
        self._end("closed")

    def abort(self) -> None:
        """See ``Connection.abort``."""
        stay_alive()
        if self._lost is None:
            self._up.send(self._broker.lost, self)
        self._end("aborted")

    # What the broker does to it.

    def down(self, callback: Callable[..., object], *args: Any) -> None:
        """Send something down: it is called when it arrives."""
        self._down.send(callback, *args)

    def acknowledged(self, number: int) -> None:
        """The broker's answer has arrived."""
        future = self._acks.get(number)
        if future is not None and not future.done():
            future.set_result(None)

    def arrived(self, packet: Packet) -> None:
        """A message has arrived."""
        self._traffic.received_bytes += packet_bytes(packet.topic, packet.payload)
        self._traffic.received_messages += 1
        self._inbox.put_nowait(
            Delivery(packet.topic, packet.payload, packet.number, packet.qos, packet.retain)
        )

    def hung_up(self, why: str) -> None:
        """The broker, or the network, ended the connection; the machine hears it if it can be reached."""
        self._up.closed = True
        if self._lost is None:
            self._down.send(self._end, f"connection lost: {why}")

    def hold(self, *, held: bool) -> None:
        """Let nothing pass, or let it pass again. Both ends give up when they have heard nothing for long."""
        if held == self._is_held:
            return
        self._is_held = held
        self._up.hold(held=held)
        self._down.hold(held=held)
        for timer in self._giving_up:
            timer.cancel()
        # MQTT 5 section 3.1.2.10: the broker after one and a half times the keepalive.
        keepalive_s = self._broker.limits.keepalive_s
        self._giving_up = (
            [
                later(1.5 * keepalive_s, self._broker.lost, self),
                later(1.75 * keepalive_s, self._end, "connection lost: keepalive"),
            ]
            if held
            else []
        )

    def _process_ended(self, end: End) -> None:
        """Its machine closes the socket after what was written to it; one without power says nothing."""
        if self._lost is not None:
            return
        self._lost = LinkDown("the process is dead")
        if end is End.KILLED:
            self._up.send(self._broker.lost, self)
        else:
            self._up.closed = True
            later(1.5 * self._broker.limits.keepalive_s, self._broker.lost, self)

    def _end(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = LinkDown(why)
        for future in self._acks.values():
            if not future.done():
                future.set_exception(self._lost)
                future.exception()  # nobody may be waiting for it
        self._inbox.put_nowait(None)
        self._down.closed = True
        for timer in self._giving_up[1:]:
            timer.cancel()

    def _check(self) -> None:
        stay_alive()
        if self._lost is not None:
            raise self._lost

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _answer(self, number: int) -> None:
        self._check()
        future = self._acks[number] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            self._acks.pop(number, None)
