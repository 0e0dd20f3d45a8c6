"""The link: our view of one MQTT connection. ``fedtide.wire.mqtt`` implements it over paho.

A connection lives once: when it is lost, every wait on it raises ``LinkDown`` and a new one is dialled.
Nothing is queued across connections, because nothing in a client library's memory survives a power cut:
the device's queue is its outbox, the coordinator's is its journal.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import numpy as np
from msgspec import Meta


class LinkDown(Exception):
    """The connection is lost, or could not be made; the text says why."""


class PublishRefused(Exception):
    """The broker refused a message, or it is larger than the broker accepts: sending it again is no use."""


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Certificates for TLS.

    Attributes:
        authority: certificate of the authority that signed the broker's, PEM.
        certificate: this machine's own certificate, PEM; needed where the broker asks for it.
        key: its private key, PEM.
    """

    authority: Path
    certificate: Path | None = None
    key: Path | None = None


class Broker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the brokers are and how to reach them: the ``[broker]`` table of both sides' settings.

    Attributes:
        hosts: ``host:port`` of each broker, tried in turn.
        username: where the broker asks for one.
        password: likewise.
        tls: certificates; without them the connection is not encrypted.
        keepalive_s: seconds between signs of life.
        reconnect_min_s: upper bound of the first random wait before dialling again.
        reconnect_max_s: upper bound of all later ones.
    """

    hosts: Annotated[tuple[str, ...], Meta(min_length=1)] = ("127.0.0.1:1883",)
    username: str | None = None
    password: str | None = None
    tls: Tls | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 60
    reconnect_min_s: Annotated[float, Meta(gt=0)] = 1.0
    reconnect_max_s: Annotated[float, Meta(gt=0)] = 120.0


@dataclass(frozen=True)
class Will:
    """The message the broker publishes, retained, when the connection ends without a goodbye."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Session:
    """Who connects and how.

    Attributes:
        client_id: MQTT's client identifier.
        clean_start: forget what the broker kept for this identifier.
        expiry_s: how long the broker keeps the session after a disconnect.
        receive_maximum: unacknowledged QoS 1 messages the broker may have under way to us.
        will: the last word, if any.
    """

    client_id: str
    clean_start: bool
    expiry_s: int
    receive_maximum: int
    will: Will | None


@dataclass(frozen=True)
class Delivery:
    """One received message. At QoS 1 the broker keeps it until it is acknowledged."""

    topic: str
    payload: bytes
    packet_id: int
    qos: int
    retained: bool


@dataclass
class Traffic:
    """MQTT PUBLISH packets counted over all connections of one agent: fixed header, topic, payload."""

    sent_bytes: int = 0
    sent_messages: int = 0
    received_bytes: int = 0
    received_messages: int = 0
    connections: int = 0


class Connection(Protocol):
    """One live MQTT connection."""

    @property
    def mqtt_version(self) -> str:
        """``5`` or ``3.1.1``."""

    @property
    def session_present(self) -> bool:
        """Whether the broker remembered this client identifier's session."""

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest packet the broker announced it accepts, if it did."""

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish, and at QoS 1 wait for the broker's acknowledgement (which proves nothing but receipt).

        Raises:
            PublishRefused: the broker will not take it.
            LinkDown: the connection was lost first.
        """

    async def subscribe(self, filters: Sequence[str], *, qos: int = 1) -> None:
        """Subscribe and wait for the broker's acknowledgement.

        Raises:
            LinkDown: the connection was lost, or the broker refused the subscription.
        """

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """Unsubscribe and wait for the broker's acknowledgement.

        Raises:
            LinkDown: the connection was lost.
        """

    def deliveries(self) -> AsyncIterator[Delivery]:
        """Received messages, in order.

        Where many lie here untaken, nothing more is read from the broker, its acknowledgements included. So
        whoever takes them must not wait for one in between.

        Raises:
            LinkDown: the connection was lost.
        """

    def acknowledge(self, delivery: Delivery) -> None:
        """Send the PUBACK. Does nothing on a lost connection: the broker delivers again on the next."""

    async def close(self) -> None:
        """Say goodbye: no will is published."""

    def abort(self) -> None:
        """Cut the connection without a goodbye."""


Dial = Callable[[Session, int], Awaitable[Connection]]
"""Makes one connection; the number counts attempts, so that hosts are tried in turn. Raises ``LinkDown``."""


def full_jitter(attempt: int, minimum_s: float, maximum_s: float, rng: np.random.Generator) -> float:
    """Seconds before attempt number ``attempt`` (from 0): uniform in [0, min(maximum, minimum · 2^attempt)].

    A fleet that lost its broker at one moment must not come back at one moment
    (Brooker, "Exponential Backoff and Jitter", 2015).
    """
    bound = min(maximum_s, minimum_s * 2.0 ** min(attempt, 32))
    return float(rng.uniform(0.0, bound))


@dataclass
class Reconnector:
    """Dials until it succeeds, again and again, with a random wait in between.

    Attributes:
        dial: makes one connection.
        broker: the waits' bounds.
        rng: draws the waits.
        on_failure: told why an attempt failed and how many seconds it waits.
    """

    dial: Dial
    broker: Broker
    rng: np.random.Generator
    on_failure: Callable[[LinkDown, float], None]
    _attempt: int = field(default=0, init=False)

    async def connect(self, session: Session) -> Connection:
        """The next connection, however long it takes."""
        while True:
            try:
                connection = await self.dial(session, self._attempt)
            except LinkDown as error:
                wait_s = full_jitter(
                    self._attempt, self.broker.reconnect_min_s, self.broker.reconnect_max_s, self.rng
                )
                self.on_failure(error, wait_s)
                self._attempt += 1
                await asyncio.sleep(wait_s)
            else:
                self._attempt = 0
                return connection

    async def pause(self) -> float:
        """Wait a little after a connection was lost, so that a fleet does not return at one moment."""
        # A TaskGroup that is cancelled while a child fails raises the child's error and forgets the
        # cancellation (CPython issue 116720, fixed in 3.13); whoever catches LinkDown ends up here.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        wait_s = full_jitter(0, self.broker.reconnect_min_s, self.broker.reconnect_max_s, self.rng)
        await asyncio.sleep(wait_s)
        return wait_s
