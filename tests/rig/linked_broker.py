"""The brokers that the link's conformance tests ask, behind one face: mosquitto, NATS, the one in memory."""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import pytest
from broker_memory import Limits
from memory_broker import MemoryBroker
from virtual_time import run_virtually

from broker_config.local import LocalBroker, available_brokers, free_port, start_local_broker
from broker_config.mosquitto import development
from fedtide.wire.link import Broker, Connection, Delivery, Dial, LinkDown, Session, Traffic, Will
from fedtide.wire.mqtt import MqttDialler

KINDS: Final = (pytest.param("mosquitto", marks=pytest.mark.mosquitto), "nats", "memory")
WITH_LIMITS: Final = (pytest.param("mosquitto", marks=pytest.mark.mosquitto), "memory")
"""Those of which a test can choose the limits."""

_DEADLINE_S: Final = 20.0
_numbers = itertools.count()

Main = Callable[[], Coroutine[Any, Any, None]]


class LinkedBroker(Protocol):
    """A broker under a test's control."""

    kind: str

    def dialler(self, traffic: Traffic | None = None) -> Dial:
        """Makes connections to it."""

    def run(self, main: Main) -> None:
        """Run a test's coroutine, in the time the broker lives in; one that hangs is a failure."""

    def pause(self) -> None:
        """From here on it answers nobody."""

    def kill(self) -> None:
        """End it without a word."""

    def start(self) -> None:
        """Bring it back."""

    def restart(self, *, empty: bool = False) -> None:
        """Stop it politely and start it again, with what it knew or without."""


async def _within_the_deadline(main: Main) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        await main()


class RealBroker:
    """A broker's process."""

    def __init__(self, broker: LocalBroker) -> None:
        self.kind: str = broker.kind
        self.address = f"{broker.host}:{broker.port}"
        self.kill, self.start, self.restart = broker.kill, broker.start, broker.restart
        self._broker = broker

    def dialler(self, traffic: Traffic | None = None) -> Dial:
        """See ``LinkedBroker.dialler``."""
        return MqttDialler(Broker(hosts=(self.address,)), traffic or Traffic())

    def run(self, main: Main) -> None:
        """See ``LinkedBroker.run``."""
        asyncio.run(_within_the_deadline(main))

    def pause(self) -> None:
        """See ``LinkedBroker.pause``."""
        os.kill(self._broker.pid, signal.SIGSTOP)


class BrokerInMemory:
    """The one in memory, in virtual time."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.kind = "memory"
        self._broker = broker
        self.pause, self.kill = broker.freeze, broker.kill

    def dialler(self, traffic: Traffic | None = None) -> Dial:
        """See ``LinkedBroker.dialler``."""
        return self._broker.dialler("somewhere", traffic)

    def run(self, main: Main) -> None:
        """See ``LinkedBroker.run``."""

        async def until_it_is_quiet() -> None:
            await _within_the_deadline(main)
            await asyncio.sleep(5.0)  # the last goodbye is on its way

        run_virtually(until_it_is_quiet)

    def start(self) -> None:
        """See ``LinkedBroker.start``."""
        self._broker.thaw()
        self._broker.start()

    def restart(self, *, empty: bool = False) -> None:
        """See ``LinkedBroker.restart``."""
        self._broker.save()
        self._broker.kill()
        self._broker.start(keep=not empty)


def started(
    kind: str, directory: Path, *, max_queued: int | None = None, max_packet: int | None = None
) -> Iterator[LinkedBroker]:
    """A broker, for a fixture to ``yield from``. Only mosquitto and the one in memory take other limits."""
    if kind == "memory":
        yield BrokerInMemory(
            MemoryBroker(limits=Limits(max_queued_messages=max_queued or 20_000, max_packet_bytes=max_packet))
        )
        return
    if kind not in available_brokers():
        pytest.skip(f"{kind} is not installed")
    port = free_port()
    config = None if kind == "nats" else _configured(directory, port, max_queued, max_packet)
    with start_local_broker(directory, kind, config, port) as broker:
        yield RealBroker(broker)


def _configured(directory: Path, port: int, max_queued: int | None, max_packet: int | None) -> str:
    lines = development(port, state=directory / "state", run_as="root" if os.geteuid() == 0 else None)
    for name, value in (("max_queued_messages", max_queued), ("max_packet_size", max_packet)):
        if value is not None:
            kept = [line for line in lines.splitlines() if not line.startswith(f"{name} ")]
            lines = "\n".join([*kept, f"{name} {value}", ""])
    return lines


def fresh_name() -> str:
    """A client identifier that no other connection has: NATS hangs up on one that it has not forgotten."""
    return f"peer-{next(_numbers)}"


def fresh_topic() -> str:
    """A topic that no other test uses."""
    return f"fl/1/pumps/dn/test-{next(_numbers)}"


def session(
    name: str | None = None, *, persistent: bool = False, will: Will | None = None, receive_maximum: int = 32
) -> Session:
    """Who connects."""
    return Session(
        client_id=name or fresh_name(),
        clean_start=not persistent,
        expiry_s=60 if persistent else 0,
        receive_maximum=receive_maximum,
        will=will,
    )


@contextlib.asynccontextmanager
async def connected(broker: LinkedBroker, wanted: Session | None = None) -> AsyncIterator[Connection]:
    """A connection that ends politely."""
    connection = await broker.dialler()(wanted or session(), 0)
    try:
        yield connection
    finally:
        await connection.close()


async def next_delivery(connection: Connection) -> Delivery:
    """The next message, however long it takes."""
    return await anext(connection.deliveries())


async def fails_with_link_down(waiting: Awaitable[object]) -> bool:
    """Whether what waits hears that the connection is lost."""
    try:
        await waiting
    except LinkDown:
        return True
    return False


def needs_prompt_redelivery(broker: LinkedBroker) -> None:
    """Skip where it is not to be had."""
    if broker.kind == "nats":
        pytest.skip("NATS delivers again only after its ack_wait of 30 s")
