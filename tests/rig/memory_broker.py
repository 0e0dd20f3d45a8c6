"""An MQTT broker in memory, and a network that loses, repeats, reorders and delays: by a seed.

    broker = MemoryBroker(seed=7)
    dial = broker.dialler("pump-7")         a fedtide.wire.link.Dial of this machine
    broker.weather = Weather(drop=0.05)     what the network does to every message from here on
    broker.partition({"pump-7"}), broker.heal()
    broker.cut("pump-7"), broker.freeze(), broker.thaw()
    broker.kill(), broker.start(keep=True)  with yesterday's memory, if it was ever saved, or empty

It keeps what mosquitto keeps: retained messages, persistent sessions with their queue and expiry, at least
once with redelivery on the next connection, the receive maximum, wills, takeover of a session, and a full
queue that drops without a word what was acknowledged to its sender. tests/broker/test_link_conformance.py
asks it and real brokers the same questions.
"""

import asyncio
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from broker_memory import CALM, Counts, Kept, Limits, Memory, Message
from memory_link import APART_S, CONNECT_TIMEOUT_S, MemoryConnection, Packet, later
from topic_filters import FilterIndex, is_wild, matches

from fedtide.wire.link import Connection, Dial, LinkDown, Session, Traffic, Will

_NEVER_EXPIRES: Final = 0xFFFFFFFF


class MemoryBroker:
    """See the module. Made anywhere, used on a ``VirtualLoop``.

    Args:
        seed: of everything that is drawn.
        limits: what it is set to.

    Attributes:
        weather: from here on.
        counts: so far, over all its lives.
        on_publish: told of each message that reaches the broker, with the machine it came from.
    """

    def __init__(self, seed: int = 0, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.weather = CALM
        self.counts = Counts()
        self.on_publish: Callable[[str, Message], None] = lambda _machine, _message: None
        self.running = True
        self.rng = np.random.default_rng([seed, 0xB20])
        self._memory = Memory()
        self._saved: Memory | None = None
        self._connections: dict[str, MemoryConnection] = {}
        self._filters = FilterIndex()
        self._streams: dict[tuple[str, str], float] = {}
        self._apart: frozenset[str] = frozenset()
        self._frozen = False
        self._life = 0

    def dialler(self, machine: str, traffic: Traffic | None = None) -> Dial:
        """What a machine dials with."""

        async def dial(session: Session, _attempt: int) -> Connection:
            return await self._dial(machine, session, traffic or Traffic())

        return dial

    # What a script does to it.

    def kill(self) -> None:
        """End the broker: every socket closes, and its memory is lost, but for what was saved."""
        self.running = False
        self._life += 1
        self.thaw()  # what closes the sockets is the machine below it
        for connection in list(self._connections.values()):
            connection.hung_up("the broker is gone")
        self._connections.clear()
        self._streams.clear()
        self._memory = Memory()
        self._index()

    def start(self, *, keep: bool = False) -> None:
        """Start it again, empty; with ``keep``, as it was when it was last saved."""
        if self.running:
            return
        self.running = True
        self._life += 1
        if keep and self._saved is not None:
            self._memory = copy.deepcopy(self._saved)
        self._index()

    def save(self) -> None:
        """Write its memory to its disk, as brokers do now and then."""
        self._saved = copy.deepcopy(self._memory)

    def partition(self, machines: Iterable[str]) -> None:
        """From here on nothing passes between these machines and the broker."""
        self._apart = frozenset(machines)
        self._hold()

    def heal(self) -> None:
        """Everybody reaches the broker."""
        self._apart = frozenset()
        self._hold()

    def freeze(self) -> None:
        """From here on the broker answers nobody."""
        self._frozen = True
        self._hold()

    def thaw(self) -> None:
        """It goes on where it stopped."""
        self._frozen = False
        self._hold()

    def cut(self, machine: str) -> None:
        """Cut a machine's connections: both ends hear it soon."""
        for connection in [each for each in self._connections.values() if each.machine == machine]:
            self.lost(connection)
            connection.hung_up("connection reset")

    @property
    def connected(self) -> list[str]:
        """Machines with a connection."""
        return sorted({connection.machine for connection in self._connections.values()})

    @property
    def retained(self) -> dict[str, bytes]:
        """Retained messages by topic."""
        return self._memory.retained

    # What connections ask of it; a network's delay later.

    def take(self, connection: MemoryConnection, packet: Packet) -> None:
        """A message has come: acknowledge it, and send it on."""
        if not self._is_here(connection):
            return
        self.counts.published += 1
        message = Message(packet.topic, packet.payload, packet.qos)
        self.on_publish(connection.machine, message)
        if packet.qos:
            connection.down(connection.acknowledged, packet.number)
        if not packet.retain and self.rng.random() < self.weather.drop:
            self.counts.lost += 1
            return
        if self.rng.random() < self.weather.corrupt and packet.payload:
            message = replace(message, payload=self._flipped(packet.payload))
        self._send_on(connection.session.client_id, message, retain=packet.retain)

    def subscribe(self, connection: MemoryConnection, number: int, filters: list[str], qos: int) -> None:
        """Subscribe, say so, and send what is retained."""
        if not self._is_here(connection):
            return
        kept = self._memory.sessions[connection.session.client_id]
        for name in filters:
            kept.filters[name] = qos
            self._filters.add(name, kept.client_id)
        connection.down(connection.acknowledged, number)
        for name in filters:
            for topic in self._retained_for(name):
                self._give(kept, Message(topic, self.retained[topic], min(qos, 1), retained=True))

    def unsubscribe(self, connection: MemoryConnection, number: int, filters: list[str]) -> None:
        """Unsubscribe, and say so."""
        if not self._is_here(connection):
            return
        kept = self._memory.sessions[connection.session.client_id]
        for name in filters:
            kept.filters.pop(name, None)
            self._filters.drop(name, kept.client_id)
        connection.down(connection.acknowledged, number)

    def acknowledge(self, connection: MemoryConnection, number: int) -> None:
        """A message that was under way has arrived."""
        if not self._is_here(connection):
            return
        kept = self._memory.sessions[connection.session.client_id]
        if kept.under_way.pop(number, None) is not None:
            self._feed(kept)

    def goodbye(self, connection: MemoryConnection) -> None:
        """A polite end: no will."""
        self._leave(connection, will=False)

    def lost(self, connection: MemoryConnection) -> None:
        """The connection has ended without a word."""
        self._leave(connection, will=True)

    # Connections.

    async def _dial(self, machine: str, session: Session, traffic: Traffic) -> Connection:
        low, high = self.weather.latency_s
        await asyncio.sleep(2 * float(self.rng.uniform(low, high)))
        if self._is_held(machine):
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            raise LinkDown(f"broker did not answer within {CONNECT_TIMEOUT_S:g} s")
        if not self.running:
            raise LinkDown("broker: connection refused")
        return self._accept(machine, session, traffic)

    def _accept(self, machine: str, session: Session, traffic: Traffic) -> MemoryConnection:
        other = self._connections.get(session.client_id)
        if other is not None:
            self._leave(other, will=False)  # as mosquitto 2.0; MQTT 5 section 3.1.4 has it published
            other.hung_up("session taken over")
        kept = self._memory.sessions.get(session.client_id)
        if kept is not None and session.clean_start:
            self._forget(kept)
            kept = None
        present = kept is not None
        if kept is None:
            kept = self._memory.sessions[session.client_id] = Kept(session.client_id, session.expiry_s)
        kept.expiry_s = session.expiry_s
        connection = MemoryConnection(self, machine, session, traffic, session_present=present)
        self._connections[session.client_id] = connection
        traffic.connections += 1
        again = list(kept.under_way.items())
        for number, message in again:
            self._deliver(connection, number, message)
        self._feed(kept)
        return connection

    def _is_here(self, connection: MemoryConnection) -> bool:
        return self._connections.get(connection.session.client_id) is connection

    def is_held(self, connection: MemoryConnection) -> bool:
        """Whether nothing passes on this connection now."""
        return self._is_held(connection.machine)

    def _is_held(self, machine: str) -> bool:
        return self._frozen or machine in self._apart

    def _hold(self) -> None:
        for connection in list(self._connections.values()):
            connection.hold(held=self.is_held(connection))

    def _leave(self, connection: MemoryConnection, *, will: bool) -> None:
        if not self._is_here(connection):
            return
        del self._connections[connection.session.client_id]
        kept = self._memory.sessions[connection.session.client_id]
        self._begin_expiry(kept)
        last_words = connection.session.will
        if will and last_words is not None:
            self._publish_will(connection, last_words)

    def _publish_will(self, connection: MemoryConnection, will: Will) -> None:
        self._send_on(connection.session.client_id, Message(will.topic, will.payload, 1), retain=True)

    def _begin_expiry(self, kept: Kept) -> None:
        if kept.expiry_s == 0:
            self._forget(kept)
        elif kept.expiry_s != _NEVER_EXPIRES:
            later(kept.expiry_s, self._expire, kept, self._life)

    def _expire(self, kept: Kept, life: int) -> None:
        here = self._memory.sessions.get(kept.client_id) is kept
        if here and life == self._life and kept.client_id not in self._connections:
            self._forget(kept)

    def _forget(self, kept: Kept) -> None:
        self._memory.sessions.pop(kept.client_id, None)
        for name in kept.filters:
            self._filters.drop(name, kept.client_id)

    # Messages.

    def _send_on(self, sender: str, message: Message, *, retain: bool) -> None:
        """Give a message to everybody who asked for it, perhaps a little later or twice."""
        times = 2 if self.rng.random() < self.weather.duplicate else 1
        wait_s = float(self.rng.uniform(0.0, self.weather.reorder_s)) if self.weather.reorder_s else 0.0
        if not wait_s and not self._streams:
            self._route(message, retain, times, self._life)
            return
        now = asyncio.get_running_loop().time()
        stream = (sender, message.topic)
        due = max(now + wait_s, self._streams.get(stream, 0.0) + APART_S)
        self._streams = {key: moment for key, moment in self._streams.items() if moment > now}
        self._streams[stream] = due
        later(due - now, self._route, message, retain, times, self._life)

    def _route(self, message: Message, retain: bool, times: int, life: int) -> None:  # noqa: FBT001
        if life != self._life or not self.running:
            return
        if retain and message.payload:
            self._memory.retained[message.topic] = message.payload
        elif retain:
            self._memory.retained.pop(message.topic, None)
        for client_id in self._filters.subscribers(message.topic):
            kept = self._memory.sessions[client_id]
            granted = max(qos for name, qos in kept.filters.items() if matches(name, message.topic))
            for _ in range(times):
                self._give(kept, replace(message, qos=min(message.qos, granted)))

    def _give(self, kept: Kept, message: Message) -> None:
        connection = self._connections.get(kept.client_id)
        if message.qos == 0:
            if connection is not None:
                self._deliver(connection, 0, message)
            return
        if connection is not None and not kept.queue and self._has_room(kept, connection):
            self._put_under_way(kept, connection, message)
        elif len(kept.queue) < self.limits.max_queued_messages:
            kept.queue.append(message)
        else:
            self.counts.overflowed += 1

    def _feed(self, kept: Kept) -> None:
        """Put under way what waits, as far as the receiver lets us."""
        connection = self._connections.get(kept.client_id)
        while connection is not None and kept.queue and self._has_room(kept, connection):
            self._put_under_way(kept, connection, kept.queue.popleft())

    def _has_room(self, kept: Kept, connection: MemoryConnection) -> bool:
        return len(kept.under_way) < connection.session.receive_maximum

    def _put_under_way(self, kept: Kept, connection: MemoryConnection, message: Message) -> None:
        number = kept.next_packet
        while number in kept.under_way:
            number = number % 0xFFFF + 1
        kept.next_packet = number % 0xFFFF + 1
        kept.under_way[number] = message
        self._deliver(connection, number, message)

    def _deliver(self, connection: MemoryConnection, number: int, message: Message) -> None:
        self.counts.delivered += 1
        packet = Packet(message.topic, message.payload, message.qos, message.retained, number)
        connection.down(connection.arrived, packet)

    def _flipped(self, payload: bytes) -> bytes:
        place = int(self.rng.integers(len(payload)))
        return (
            payload[:place] + bytes([payload[place] ^ 1 << int(self.rng.integers(8))]) + payload[place + 1 :]
        )

    def _index(self) -> None:
        self._filters = FilterIndex()
        for kept in self._memory.sessions.values():
            for name in kept.filters:
                self._filters.add(name, kept.client_id)

    def _retained_for(self, name: str) -> Iterator[str]:
        if not is_wild(name):
            return iter([name] if name in self.retained else [])
        return iter([topic for topic in self.retained if matches(name, topic)])
