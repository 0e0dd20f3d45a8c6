"""What a broker in memory remembers, what it is set to, and what the network does to its messages."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class Weather:
    """What the network and the broker do to messages.

    Attributes:
        latency_s: least and most seconds of a packet from one end to the other; a connection keeps its order.
        drop: share of the messages that the broker acknowledges and loses; no broker loses a retained one
            while it lives.
        duplicate: share it delivers twice.
        reorder_s: a message may fall behind those on other topics for so long; one sender's messages on one
            topic keep their order (MQTT 5 section 4.6).
        corrupt: share of the messages of which a bit is flipped.
    """

    latency_s: tuple[float, float] = (0.001, 0.02)
    drop: float = 0.0
    duplicate: float = 0.0
    reorder_s: float = 0.0
    corrupt: float = 0.0


CALM: Final = Weather()


@dataclass(frozen=True)
class Limits:
    """What a broker is set to.

    Attributes:
        max_queued_messages: per session, beyond those under way; more are dropped silently.
        max_packet_bytes: announced; larger ones are refused.
        mqtt_version: as a connection says it.
        keepalive_s: what everybody who dials has set.
    """

    max_queued_messages: int = 1000
    max_packet_bytes: int | None = None
    mqtt_version: str = "5"
    keepalive_s: float = 60.0


@dataclass(frozen=True)
class Message:
    """A message in the broker."""

    topic: str
    payload: bytes
    qos: int
    retained: bool = False


@dataclass
class Kept:
    """A session as the broker keeps it.

    Attributes:
        filters: the quality of service granted, by filter.
        queue: at least once, and not under way yet.
        under_way: sent and not acknowledged, by packet identifier, in order.
    """

    client_id: str
    expiry_s: int
    filters: dict[str, int] = field(default_factory=dict)
    queue: deque[Message] = field(default_factory=deque)
    under_way: dict[int, Message] = field(default_factory=dict)
    next_packet: int = 1


@dataclass
class Memory:
    """All that a broker remembers."""

    retained: dict[str, bytes] = field(default_factory=dict)
    sessions: dict[str, Kept] = field(default_factory=dict)


@dataclass
class Counts:
    """What became of messages in the broker."""

    published: int = 0
    delivered: int = 0
    overflowed: int = 0
    """Acknowledged to the sender and dropped, because a queue was full."""
    lost: int = 0
    """Acknowledged to the sender and dropped, because the weather is like that."""
