"""A connection that goes nowhere: it records what is published, and delivers what a test puts in."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from fedtide.wire.link import Delivery, LinkDown


@dataclass(frozen=True)
class Publication:
    """One message the coordinator published."""

    topic: str
    payload: bytes
    retain: bool


@dataclass
class RecordingConnection:
    """Takes everything at once, unless a test holds some topics back.

    Attributes:
        published: in the order in which the broker acknowledged.
        acknowledged: payloads of the deliveries the coordinator acknowledged.
        on_publish: told of each message before it is acknowledged.
    """

    mqtt_version: str = "5"
    session_present: bool = False
    max_packet_bytes: int | None = None
    on_publish: Callable[[Publication], None] = lambda _publication: None
    published: list[Publication] = field(default_factory=list)
    acknowledged: list[bytes] = field(default_factory=list)
    filters: list[str] = field(default_factory=list)
    closed: bool = False
    _inbox: asyncio.Queue = field(default_factory=asyncio.Queue)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _held: dict = field(default_factory=dict)
    _lost: bool = False
    _packets: count = field(default_factory=lambda: count(1))

    async def publish(self, topic, payload, *, qos=1, retain=False):
        publication = Publication(topic, payload, retain)
        for word, gate in self._held.items():
            if word in topic:
                await gate.wait()
        if self._lost:
            raise LinkDown("lost")
        self.on_publish(publication)
        self.published.append(publication)
        self._changed.set()
        if topic in self.filters:
            self.deliver(topic, payload, qos=0)

    async def subscribe(self, filters, *, qos=1):
        self.filters.extend(filters)

    async def unsubscribe(self, filters):
        self.filters = [name for name in self.filters if name not in filters]

    async def deliveries(self):
        while True:
            delivery = await self._inbox.get()
            if delivery is None:
                raise LinkDown("lost")
            yield delivery

    def acknowledge(self, delivery):
        self.acknowledged.append(delivery.payload)
        self._changed.set()

    async def close(self):
        self.closed = True
        self._inbox.put_nowait(None)

    def abort(self):
        self.lose()

    def deliver(self, topic, payload, *, qos=1):
        """What the broker would bring."""
        self._inbox.put_nowait(Delivery(topic, payload, next(self._packets), qos, retained=False))

    def lose(self):
        """The connection breaks."""
        self._lost = True
        self._inbox.put_nowait(None)
        for gate in self._held.values():
            gate.set()

    def hold(self, word):
        """Acknowledge nothing whose topic contains ``word`` until the event returned is set."""
        self._held[word] = asyncio.Event()
        return self._held[word]

    def topics(self):
        return [publication.topic for publication in self.published]

    def payloads(self, topic):
        return [publication.payload for publication in self.published if publication.topic == topic]

    async def until(self, condition, deadline_s=10.0):
        """Wait until the condition holds, looking whenever something was published or acknowledged."""
        async with asyncio.timeout(deadline_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def retained(published):
    """What a broker would hold after these messages, by topic."""
    held = {}
    for publication in published:
        if publication.retain and publication.payload:
            held[publication.topic] = publication.payload
        elif publication.retain:
            held.pop(publication.topic, None)
    return held
