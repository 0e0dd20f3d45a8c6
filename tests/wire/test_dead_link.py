"""A peer that never says anything more is given up after two keepalives, however much was sent to it."""

import asyncio
import socket
import threading
import time
from typing import Any

import pytest

from fedtide.wire.link import Broker, LinkDown, Session, Traffic
from fedtide.wire.mqtt import MqttConnection, MqttDialler

KEEPALIVE_S = 1  # shorter than settings allow
CONNACK = bytes((0x20, 3, 0, 0, 0))  # MQTT 5 section 3.2: accepted, no properties


@pytest.mark.parametrize("payload_bytes", [0, 20_000], ids=["which reached it", "which stays on its way"])
def test_a_link_without_any_answer_to_what_was_sent_is_given_up(payload_bytes: int) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listening:
            # So little that most of the large message stays with the sender, which has room for more.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.setblocking(False)
            dial = MqttDialler(
                Broker(hosts=(f"127.0.0.1:{listening.getsockname()[1]}",), keepalive_s=KEEPALIVE_S), Traffic()
            )
            dialling = asyncio.create_task(dial(Session("pump-1", True, 0, 32, None), 0))
            peer, _ = await loop.sock_accept(listening)
            with peer:
                await loop.sock_recv(peer, 1000)
                await loop.sock_sendall(peer, CONNACK)
                connection = await dialling
                assert isinstance(connection, MqttConnection)
                began = time.monotonic()
                with pytest.raises(LinkDown, match="Keep alive"):
                    async with asyncio.timeout(6 * KEEPALIVE_S):
                        await connection.publish("a", bytes(payload_bytes))
                assert time.monotonic() - began < 3 * KEEPALIVE_S

    asyncio.run(scenario())


def test_a_connection_that_was_given_up_before_it_was_made_takes_the_place_of_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The broker would end the later connection, which has the same client identifier.
    real, resolving, release = socket.getaddrinfo, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        resolving.set()
        release.wait(10)
        return real(*arguments, **options)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.setblocking(False)
            dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{listening.getsockname()[1]}",)), Traffic())
            monkeypatch.setattr(socket, "getaddrinfo", slow)
            dialling = asyncio.create_task(dial(Session("pump-1", True, 0, 32, None), 0))
            await asyncio.to_thread(resolving.wait)
            dialling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialling
            release.set()
            peer, _ = await asyncio.wait_for(loop.sock_accept(listening), 10)
            with peer:
                assert await asyncio.wait_for(loop.sock_recv(peer, 1000), 10) == b""

    asyncio.run(scenario())
