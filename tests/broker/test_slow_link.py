"""A link so slow that one message takes longer than the keepalive: it arrives all the same.

The proportions are those of a chunk of 120 KiB at 16 kbit/s with the usual keepalive of 60 s, in less time.
"""

import asyncio
import contextlib

import pytest
from slow_link import SlowLink

from broker_config.local import free_port
from fedtide.wire.link import Broker, LinkDown, Session, Traffic
from fedtide.wire.mqtt import MqttDialler

BYTES_PER_S = 10_000
KEEPALIVE_S = 2  # shorter than settings allow; the broker hangs up after one and a half without a word
LARGE = bytes(40_000)  # 4 seconds


@pytest.fixture
def slow_port():
    return free_port()


@contextlib.asynccontextmanager
async def connected(port, name):
    broker = Broker(hosts=(f"127.0.0.1:{port}",), keepalive_s=KEEPALIVE_S)
    connection = await MqttDialler(broker, Traffic())(Session(name, True, 0, 32, None), 0)
    try:
        yield connection
    finally:
        await connection.close()


async def next_payload(connection):
    delivery = await anext(aiter(connection.deliveries()))
    connection.acknowledge(delivery)
    return delivery.payload


@contextlib.asynccontextmanager
async def on_a_slow_link(broker, port):
    """A connection that is fast, one that is slow, and the link it goes over."""
    async with (
        SlowLink(port, broker.port, BYTES_PER_S) as link,
        connected(broker.port, "fast") as fast,
        connected(port, "slow") as slow,
        asyncio.timeout(20),
    ):
        yield fast, slow, link


def test_a_message_that_takes_longer_than_the_keepalive_goes_up_a_slow_link(broker, slow_port):
    async def scenario():
        async with on_a_slow_link(broker, slow_port) as (fast, slow, _):
            await fast.subscribe(["slow/up"])
            # Two at once: the answer to a sign of life comes after both.
            await asyncio.gather(*(slow.publish("slow/up", LARGE) for _ in range(2)))
            assert [await next_payload(fast) for _ in range(2)] == [LARGE, LARGE]
            await slow.publish("slow/up", b"and the link still lives")

    asyncio.run(scenario())


@pytest.mark.long
def test_a_message_that_takes_longer_than_the_keepalive_comes_down_a_slow_link(broker, slow_port):
    async def scenario():
        async with on_a_slow_link(broker, slow_port) as (fast, slow, _):
            await slow.subscribe(["slow/down"])
            for _ in range(2):
                await fast.publish("slow/down", LARGE)
            assert [await next_payload(slow) for _ in range(2)] == [LARGE, LARGE]
            await slow.publish("slow/up", b"and the link still lives")

    asyncio.run(scenario())


def test_a_link_on_which_nothing_moves_is_given_up(broker, slow_port):
    async def scenario():
        async with on_a_slow_link(broker, slow_port) as (_, slow, link):
            link.stall()
            with pytest.raises(LinkDown):
                await slow.publish("slow/up", LARGE)

    asyncio.run(scenario())
