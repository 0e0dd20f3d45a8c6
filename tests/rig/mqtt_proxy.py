"""A TCP proxy between MQTT peers and a real broker that does what networks and broken brokers do.

What it does is a frozen script; each decision is drawn from the seed, the connection's number and the
direction, so a run can be repeated as far as the scheduling of processes allows.

A TCP stream loses nothing in its middle: when a PUBLISH vanishes on a connection that lives on, it is a
broker that lost it, after it had acknowledged it. So a dropped QoS 1 PUBLISH is acknowledged to its sender.
"""

import asyncio
import contextlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Self

import mqtt_packets as mqtt
import numpy as np
from proxy_script import CALM, Cut, Script, Toward, Trouble, Unit

_READ_BYTES = 1 << 16
_GOODBYE_S = 1.0


@dataclass
class Deeds:
    """What a proxy has done, so that a test can show that its trouble came."""

    connections: int = 0
    published: int = 0
    """PUBLISH packets that came, in both directions."""
    dropped: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0
    cut: int = 0
    half_open: int = 0


class MqttProxy:
    """The proxy. Entering it listens; leaving it cuts every connection.

    Args:
        port: to listen on, on loopback.
        broker_port: the broker's.
        script: what it does from the start.
        seed: of all draws.

    Attributes:
        script: may be replaced: what comes from then on is treated by the new one.
        deeds: what it has done.
    """

    def __init__(self, port: int, broker_port: int, script: Script = CALM, seed: int = 0) -> None:
        self.port = port
        self.script = script
        self.deeds = Deeds()
        self._broker_port = broker_port
        self._seed = seed
        self._moving = asyncio.Event()
        self._moving.set()
        self._links: set[_Link] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for link in list(self._links):
            link.cut()
        while self._links:  # each leaves the set when it has ended
            await asyncio.gather(*(link.ended.wait() for link in list(self._links)))
        await self._server.wait_closed()

    def freeze(self) -> None:
        """Forward nothing, whatever comes, until :meth:`thaw`; connections stay open and can be made."""
        self._moving.clear()

    def thaw(self) -> None:
        """Forward everything that has gathered."""
        self._moving.set()

    def cut_all(self) -> None:
        """Cut every connection that there is now."""
        for link in list(self._links):
            self.deeds.cut += 1
            link.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.deeds.connections += 1
        try:
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        except OSError:  # the broker is away: so are we
            writer.transport.abort()
            return
        link = _Link(self, self.deeds.connections, writer, broker_writer)
        self._links.add(link)
        try:
            await link.run(reader, broker_reader)
        finally:
            self._links.discard(link)

    def rng(self, connection: int, purpose: int) -> np.random.Generator:
        """The generator of one connection's direction, or of its cuts."""
        return np.random.default_rng([self._seed, connection, purpose])

    async def moving(self) -> None:
        """Wait while the proxy is frozen."""
        await self._moving.wait()


@dataclass(order=True)
class _Due:
    """A packet and when it leaves; None: the end of the stream."""

    moment: float
    number: int
    packet: bytes | None = field(compare=False)


@dataclass
class _Fuse:
    """A cut of this connection, and how much is left until it."""

    cut: Cut
    left: int


class _Link:
    """One connection through the proxy: two lanes, and the fuses that end it."""

    def __init__(
        self, proxy: MqttProxy, number: int, peer: asyncio.StreamWriter, broker: asyncio.StreamWriter
    ) -> None:
        self.level = 5  # until the CONNECT says otherwise
        self.silent = False
        self.ended = asyncio.Event()
        self._writers = {Toward.BROKER: broker, Toward.PEER: peer}
        self._proxy = proxy
        rng = proxy.rng(number, len(Toward))
        self.fuses = [
            _Fuse(cut, int(rng.integers(cut.least, cut.most, endpoint=True)))
            for cut in proxy.script.cuts
            if rng.random() < cut.share
        ]
        self._lanes = {
            toward: _Lane(self, proxy, toward, writer, proxy.rng(number, toward))
            for toward, writer in self._writers.items()
        }

    async def run(self, from_peer: asyncio.StreamReader, from_broker: asyncio.StreamReader) -> None:
        """Forward until either end is gone."""
        to_broker, to_peer = self._lanes[Toward.BROKER], self._lanes[Toward.PEER]
        gives = [asyncio.create_task(lane.give()) for lane in (to_broker, to_peer)]
        takes = [
            asyncio.create_task(to_broker.take(from_peer)),
            asyncio.create_task(to_peer.take(from_broker)),
        ]
        try:
            self.burn(Toward.BROKER, Unit.BYTES, 0, "")  # some are cut before anything went through
            self.burn(Toward.PEER, Unit.BYTES, 0, "")
            # A lane ends by giving its end of the stream away, or because the connection is gone.
            await asyncio.wait(gives, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in gives:
                task.cancel()
            await self._hang_up(takes)
            results = await asyncio.gather(*gives, *takes, return_exceptions=True)
            self.ended.set()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(
                result, OSError | asyncio.CancelledError | mqtt.NotMqtt
            ):
                raise result

    async def _hang_up(self, takes: list[asyncio.Task[None]]) -> None:
        """Close both sides so that what was written arrives: a close with bytes unread would take it back."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.write_eof()
        try:
            await asyncio.wait(takes, timeout=_GOODBYE_S)
        finally:
            for task in takes:
                task.cancel()
            for writer in self._writers.values():
                writer.close()

    def back(self, toward: Toward, packet: bytes) -> None:
        """Answer in the broker's or the peer's name: a packet against the direction ``toward``."""
        self._lanes[Toward(1 - toward)].schedule(packet)

    def allowed(self, toward: Toward, packet: bytes) -> int:
        """How many of the packet's bytes may pass before a cut counted in bytes."""
        lefts = (fuse.left for fuse in self._burning(toward, Unit.BYTES, ""))
        return min(lefts, default=len(packet))

    def burn(self, toward: Toward, unit: Unit, amount: int, topic: str) -> None:
        """Count what has passed; at the end of a fuse, cut."""
        for fuse in self._burning(toward, unit, topic):
            fuse.left -= amount
            if fuse.left > 0:
                continue
            if fuse.cut.silent:
                self._proxy.deeds.half_open += 1
                self.silent = True
            else:
                self._proxy.deeds.cut += 1
                self.cut()

    def cut(self) -> None:
        """End both sides; what was written before still arrives."""
        for lane in self._lanes.values():
            lane.end()

    def _burning(self, toward: Toward, unit: Unit, topic: str) -> Iterator[_Fuse]:
        for fuse in self.fuses:
            cut = fuse.cut
            if (cut.toward, cut.unit) == (toward, unit) and (
                unit is Unit.BYTES or mqtt.matches(cut.topics, topic)
            ):
                yield fuse


class _Lane:
    """One direction of one connection: packets come in, wait for their moment, and go out."""

    def __init__(
        self,
        link: _Link,
        proxy: MqttProxy,
        toward: Toward,
        writer: asyncio.StreamWriter,
        rng: np.random.Generator,
    ) -> None:
        self._link = link
        self._proxy = proxy
        self._toward = toward
        self._writer = writer
        self._rng = rng
        self._waiting: list[_Due] = []
        self._numbers = count()
        self._last_moment = 0.0
        self._news = asyncio.Event()
        self._ended = False

    def end(self) -> None:
        """Give nothing more."""
        self._ended = True
        self._news.set()

    async def take(self, reader: asyncio.StreamReader) -> None:
        """Read packets and decide on each what becomes of it."""
        packets = mqtt.Packets()
        try:
            while content := await reader.read(_READ_BYTES):
                for packet in packets.feed(content):
                    self._take_one(packet)
        finally:
            self.schedule(None)

    async def give(self) -> None:
        """Write packets when they are due."""
        while True:
            due = await self._next()
            await self._proxy.moving()
            if due is None or due.packet is None or self._ended:
                return
            if self._link.silent:
                continue
            allowed = self._link.allowed(self._toward, due.packet)
            self._writer.write(due.packet[:allowed])
            await self._writer.drain()
            self._link.burn(self._toward, Unit.BYTES, len(due.packet), "")
            if mqtt.kind(due.packet) == mqtt.PUBLISH:
                topic = mqtt.parsed_publish(due.packet, self._link.level).topic
                self._link.burn(self._toward, Unit.PUBLISHES, 1, topic)

    def schedule(self, packet: bytes | None, *, held_s: float | None = None) -> None:
        """Have a packet leave: in its turn, or ``held_s`` later than that."""
        script = self._proxy.script
        moment = asyncio.get_running_loop().time() + script.delay_s + self._rng.uniform(0.0, script.jitter_s)
        moment = max(moment, self._last_moment)
        if held_s is None:
            self._last_moment = moment
        else:
            moment += held_s
        heapq.heappush(self._waiting, _Due(moment, next(self._numbers), packet))
        self._news.set()

    def _take_one(self, packet: bytes) -> None:
        if mqtt.kind(packet) == mqtt.CONNECT:
            self._link.level = mqtt.protocol_level(packet)
        if mqtt.kind(packet) == mqtt.PUBLISH:
            self._take_publish(packet)
        else:
            self.schedule(packet)

    def _take_publish(self, packet: bytes) -> None:
        publish = mqtt.parsed_publish(packet, self._link.level)
        deeds, held_s = self._proxy.deeds, None
        deeds.published += 1
        for trouble in self._troubles(publish.topic):
            # Always five draws, so that one probability's change leaves the other decisions as they were.
            drop, duplicate, reorder, corrupt, hold = self._rng.random(5)
            if drop < trouble.drop:
                deeds.dropped += 1
                if publish.qos == 1:
                    self._link.back(self._toward, mqtt.puback(publish.packet_id))
                return
            if corrupt < trouble.corrupt and publish.payload_at < len(packet):
                deeds.corrupted += 1
                byte = int(self._rng.integers(publish.payload_at, len(packet)))
                packet = mqtt.with_flipped_bit(packet, byte, int(self._rng.integers(8)))
            if duplicate < trouble.duplicate:
                deeds.duplicated += 1
                self.schedule(mqtt.sent_again(packet), held_s=hold * trouble.hold_s)
            if reorder < trouble.reorder:
                deeds.reordered += 1
                held_s = hold * trouble.hold_s
        self.schedule(packet, held_s=held_s)

    def _troubles(self, topic: str) -> Iterator[Trouble]:
        for trouble in self._proxy.script.troubles:
            if trouble.toward is self._toward and mqtt.matches(trouble.topics, topic):
                yield trouble

    async def _next(self) -> _Due | None:
        """The packet that is due next; None: this lane has ended."""
        clock = asyncio.get_running_loop().time
        while not self._ended:
            self._news.clear()
            if self._waiting and self._waiting[0].moment <= clock():
                return heapq.heappop(self._waiting)
            wait_s = self._waiting[0].moment - clock() if self._waiting else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
        return None
