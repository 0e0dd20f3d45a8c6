"""What the network of the rig does to messages; that the broker is like real ones is asked elsewhere."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from broker_memory import Limits, Weather
from memory_broker import MemoryBroker
from topic_filters import matches
from virtual_time import End, Process, VirtualLoop, run_virtually

from fedtide.wire.link import Connection, LinkDown, Session, Will

TOPIC = "fl/1/pumps/up/0/pump-1"
Main = Callable[[MemoryBroker], Coroutine[Any, Any, Any]]


def with_a_broker(main: Main, **options: Any) -> Any:
    return run_virtually(lambda: main(MemoryBroker(**options)))


async def dialled(broker: MemoryBroker, name: str, will: Will | None = None) -> Connection:
    return await broker.dialler(name)(
        Session(name, clean_start=True, expiry_s=0, receive_maximum=32, will=will), 0
    )


async def listener(broker: MemoryBroker, *filters: str) -> Connection:
    connection = await dialled(broker, "listener")
    await connection.subscribe(filters)
    return connection


async def heard(connection: Connection, seconds: float = 60.0) -> list[tuple[str, bytes]]:
    """All that comes in so many seconds."""
    found: list[tuple[str, bytes]] = []
    try:
        async with asyncio.timeout(seconds):
            async for delivery in connection.deliveries():
                connection.acknowledge(delivery)
                found.append((delivery.topic, delivery.payload))
    except (TimeoutError, LinkDown):
        pass
    return found


async def publish_numbers(broker: MemoryBroker, count: int, topics: tuple[str, ...] = (TOPIC,)) -> None:
    connection = await dialled(broker, "sender")
    for number in range(count):
        await connection.publish(topics[number % len(topics)], b"%d" % number)


def test_in_a_storm_messages_are_lost_though_they_were_acknowledged() -> None:
    async def main(broker: MemoryBroker) -> int:
        receiver = await listener(broker, TOPIC)
        broker.weather = Weather(drop=0.5)
        await publish_numbers(broker, 200)
        return len(await heard(receiver))

    assert 60 < with_a_broker(main) < 140


def test_what_is_retained_is_not_lost_while_the_broker_lives() -> None:
    async def main(broker: MemoryBroker) -> None:
        broker.weather = Weather(drop=1.0)
        sender = await dialled(broker, "sender")
        await sender.publish(TOPIC, b"head", retain=True)
        await sender.publish(TOPIC, b"lost")
        await asyncio.sleep(1.0)
        assert broker.retained == {TOPIC: b"head"}
        assert broker.counts.lost == 1

    with_a_broker(main)


def test_messages_come_twice() -> None:
    async def main(broker: MemoryBroker) -> None:
        receiver = await listener(broker, TOPIC)
        broker.weather = Weather(duplicate=1.0)
        await publish_numbers(broker, 3)
        assert [payload for _, payload in await heard(receiver)] == [b"0", b"0", b"1", b"1", b"2", b"2"]

    with_a_broker(main)


def test_messages_fall_behind_those_on_other_topics_and_keep_their_order_on_their_own() -> None:
    topics = tuple(f"fl/1/pumps/up/0/pump-{number}" for number in range(3))

    async def main(broker: MemoryBroker) -> None:
        receiver = await listener(broker, *topics)
        broker.weather = Weather(reorder_s=10.0)
        await publish_numbers(broker, 60, topics)
        found = await heard(receiver, 100.0)
        numbers = [int(payload) for _, payload in found]
        assert sorted(numbers) == list(range(60))
        assert numbers != sorted(numbers)
        for topic in topics:
            ours = [int(payload) for name, payload in found if name == topic]
            assert ours == sorted(ours)

    with_a_broker(main)


def test_one_bit_of_a_message_is_flipped() -> None:
    async def main(broker: MemoryBroker) -> None:
        receiver = await listener(broker, TOPIC)
        broker.weather = Weather(corrupt=1.0)
        sender = await dialled(broker, "sender")
        await sender.publish(TOPIC, bytes(100))
        ((_, payload),) = await heard(receiver)
        assert sum(byte.bit_count() for byte in payload) == 1

    with_a_broker(main)


def test_a_long_partition_ends_the_connection_on_both_sides_and_a_short_one_does_not() -> None:
    async def main(broker: MemoryBroker) -> None:
        will = Will("fl/1/pumps/st/pump-1", b"offline")
        connection = await dialled(broker, "pump-1", will)
        watcher = await listener(broker, will.topic)
        broker.partition({"pump-1"})
        publishing = asyncio.create_task(connection.publish(TOPIC, b"patient"))
        await asyncio.sleep(60.0)
        assert not publishing.done()
        broker.heal()
        await publishing
        broker.partition({"pump-1"})
        assert await heard(watcher, 120.0) == [(will.topic, b"offline")]  # after 1.5 times 60 s
        with pytest.raises(LinkDown):
            await connection.publish(TOPIC, b"too late")
        with pytest.raises(LinkDown, match="did not answer within 10 s"):
            await dialled(broker, "pump-1")
        broker.heal()
        await dialled(broker, "pump-1")

    with_a_broker(main)


def test_a_cut_connection_is_noticed_at_once() -> None:
    async def main(broker: MemoryBroker) -> None:
        will = Will("fl/1/pumps/st/pump-1", b"offline")
        connection = await dialled(broker, "pump-1", will)
        watcher = await listener(broker, will.topic)
        broker.cut("pump-1")
        assert await heard(watcher, 1.0) == [(will.topic, b"offline")]
        with pytest.raises(LinkDown, match="connection reset"):
            await connection.publish(TOPIC, b"late")

    with_a_broker(main)


def test_a_frozen_broker_answers_when_it_thaws() -> None:
    async def main(broker: MemoryBroker) -> None:
        connection = await dialled(broker, "pump-1")
        broker.freeze()
        publishing = asyncio.create_task(connection.publish(TOPIC, b"slow"))
        await asyncio.sleep(30.0)
        assert not publishing.done()
        broker.thaw()
        await asyncio.wait_for(publishing, 1.0)

    with_a_broker(main)


@pytest.mark.parametrize(("end", "seconds"), [(End.KILLED, 0.0), (End.POWER_CUT, 90.0)])
def test_who_is_killed_hangs_up_and_who_has_no_power_says_nothing(end: End, seconds: float) -> None:
    async def main(broker: MemoryBroker) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        will = Will("fl/1/pumps/st/pump-1", b"offline")
        watcher = await listener(broker, will.topic, TOPIC)
        process = Process(loop, "pump-1")

        async def program() -> None:
            connection = await dialled(broker, "pump-1", will)
            await connection.publish(TOPIC, b"before")
            while True:
                await asyncio.sleep(1.0)
                await connection.publish(TOPIC, b"alive", qos=0)

        process.start(program())
        await asyncio.sleep(0.5)
        process.die(end)
        began = loop.time()
        assert [(await anext(watcher.deliveries())).payload for _ in range(2)] == [b"before", b"offline"]
        assert loop.time() - began == pytest.approx(seconds, abs=0.1)  # 1.5 times the keepalive of 60 s
        assert broker.connected == ["listener"]

    with_a_broker(main)


def test_a_broker_comes_back_with_what_it_saved_and_without_what_it_did_not() -> None:
    async def main(broker: MemoryBroker) -> None:
        sender = await dialled(broker, "sender")
        await sender.publish("a", b"saved", retain=True)
        broker.save()
        await sender.publish("b", b"not saved", retain=True)
        broker.kill()
        with pytest.raises(LinkDown, match="refused"):
            await dialled(broker, "sender")
        broker.start(keep=True)
        assert broker.retained == {"a": b"saved"}
        broker.kill()
        broker.start()
        assert broker.retained == {}
        with pytest.raises(LinkDown):
            await sender.publish("a", b"on a dead connection")

    with_a_broker(main)


def test_equal_seeds_give_equal_weather() -> None:
    async def main(broker: MemoryBroker) -> list[tuple[str, bytes]]:
        receiver = await listener(broker, TOPIC)
        broker.weather = Weather(drop=0.3, duplicate=0.3, reorder_s=1.0, corrupt=0.2)
        await publish_numbers(broker, 50)
        return await heard(receiver)

    assert with_a_broker(main, seed=3) == with_a_broker(main, seed=3)
    assert with_a_broker(main, seed=3) != with_a_broker(main, seed=4)


def test_a_session_that_nobody_reads_costs_no_more_than_its_queue() -> None:
    async def main(broker: MemoryBroker) -> None:
        await listener(broker, TOPIC)  # it acknowledges nothing: 32 under way, 5 in the queue
        await publish_numbers(broker, 100)
        await asyncio.sleep(1.0)
        assert broker.counts.overflowed == 100 - 32 - 5

    with_a_broker(main, limits=Limits(max_queued_messages=5))


@pytest.mark.parametrize(
    ("name", "topic", "matched"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+/b", "a/b", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/uptime", False),
        ("+/uptime", "$SYS/uptime", False),
        ("a/+/#", "a", False),
    ],
)
def test_filters_match_as_the_standard_says(name: str, topic: str, matched: bool) -> None:  # noqa: FBT001
    assert matches(name, topic) is matched
