"""What fedtide needs of a broker beyond one connection, asked over the link: of real ones and the rig's.

The broker in memory stands for real ones in every simulation, so it has to give the same answers.
"""

import asyncio
from collections.abc import Iterator

import pytest
from linked_broker import (
    KINDS,
    WITH_LIMITS,
    LinkedBroker,
    connected,
    fails_with_link_down,
    fresh_name,
    fresh_topic,
    next_delivery,
    session,
    started,
)

from fedtide.wire.link import Connection, Will


@pytest.fixture(scope="module", params=KINDS)
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LinkedBroker]:
    yield from started(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def topic() -> str:
    return fresh_topic()


def only_with_mqtt_5(broker: LinkedBroker) -> None:
    if broker.kind == "nats":
        pytest.skip("NATS has MQTT 3.1.1 only")


async def taken(connection: Connection) -> bytes:
    delivery = await next_delivery(connection)
    connection.acknowledge(delivery)
    return delivery.payload


async def settled(connection: Connection) -> None:
    """Answered by the broker: so what was sent before has been read."""
    await connection.subscribe([fresh_topic()])


def test_a_session_gets_in_order_what_came_while_it_was_away(broker: LinkedBroker, topic: str) -> None:
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(broker, collector) as connection:
            await connection.subscribe([f"{topic}/+"])
        async with connected(broker) as device:
            for number in range(50):
                await device.publish(f"{topic}/pump-1", b"%d" % number)
        async with connected(broker, collector) as connection:
            assert connection.session_present
            assert [int(await taken(connection)) for _ in range(50)] == list(range(50))
            await connection.unsubscribe([f"{topic}/+"])

    broker.run(main)


def test_a_clean_start_forgets_the_session_and_what_waited_in_it(broker: LinkedBroker, topic: str) -> None:
    name = fresh_name()

    async def main() -> None:
        async with connected(broker, session(name, persistent=True)) as connection:
            await connection.subscribe([topic])
        async with connected(broker) as device:
            await device.publish(topic, b"waits")
        async with connected(broker, session(name)) as connection:
            assert not connection.session_present
            await connection.subscribe([topic])
            async with connected(broker) as device:
                await device.publish(topic, b"marker")
            assert await taken(connection) == b"marker"

    broker.run(main)


def test_what_was_sent_at_most_once_does_not_wait(broker: LinkedBroker, topic: str) -> None:
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(broker, collector) as connection:
            await connection.subscribe([topic])
        async with connected(broker) as device:
            await device.publish(topic, b"lost", qos=0)
            await device.publish(topic, b"kept", qos=1)
        async with connected(broker, collector) as connection:
            assert await taken(connection) == b"kept"
            await connection.unsubscribe([topic])

    broker.run(main)


@pytest.mark.parametrize(
    ("filters", "topics", "arrived"),
    [
        (["{}/+/x"], ["{}/a/x", "{}/x", "{}/a/b/x", "{}/b/x"], ["{}/a/x", "{}/b/x"]),
        (["{}/#"], ["{}", "{}/a", "{}/a/b", "{}-other"], ["{}", "{}/a", "{}/a/b"]),
    ],
    ids=["one level", "all levels"],
)
def test_a_filter_takes_the_topics_that_the_standard_says(
    broker: LinkedBroker, topic: str, filters: list[str], topics: list[str], arrived: list[str]
) -> None:
    async def main() -> None:
        async with connected(broker) as receiver, connected(broker) as sender:
            await receiver.subscribe([*(name.format(topic) for name in filters), f"{topic}-end"])
            for name in [*topics, "{}-end"]:
                await sender.publish(name.format(topic), b"")
            found = []
            while (delivery := await next_delivery(receiver)).topic != f"{topic}-end":
                receiver.acknowledge(delivery)
                found.append(delivery.topic)
            assert found == [name.format(topic) for name in arrived]

    broker.run(main)


def test_subscribing_again_brings_what_is_retained_again(broker: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(broker) as sender, connected(broker) as receiver:
            await sender.publish(topic, b"head", retain=True)
            for _ in range(2):
                await receiver.subscribe([topic])
                delivery = await next_delivery(receiver)
                receiver.acknowledge(delivery)
                assert (delivery.payload, delivery.retained) == (b"head", True)

    broker.run(main)


def test_a_subscription_at_most_once_lowers_what_comes(broker: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(broker) as sender, connected(broker) as receiver:
            await sender.publish(topic, b"head", retain=True)
            await receiver.subscribe([topic], qos=0)
            assert (await next_delivery(receiver)).qos == 0
            await sender.publish(topic, b"update", qos=1)
            assert (await next_delivery(receiver)).qos == 0

    broker.run(main)


def test_no_more_is_under_way_than_the_receiver_allows(broker: LinkedBroker, topic: str) -> None:
    only_with_mqtt_5(broker)

    async def main() -> None:
        async with connected(broker, session(receive_maximum=3)) as receiver, connected(broker) as sender:
            await receiver.subscribe([topic])
            for number in range(5):
                await sender.publish(topic, b"%d" % number)
            under_way = [await next_delivery(receiver) for _ in range(3)]
            # At most once is not bounded by it, so this one overtakes what waits.
            await sender.publish(topic, b"now", qos=0)
            assert (await next_delivery(receiver)).payload == b"now"
            receiver.acknowledge(under_way[0])
            assert await taken(receiver) == b"3"

    broker.run(main)


def test_a_second_connection_of_the_same_name_ends_the_first_and_publishes_no_will(
    broker: LinkedBroker, topic: str
) -> None:
    only_with_mqtt_5(broker)
    name = fresh_name()

    async def main() -> None:
        async with connected(broker) as watcher:
            await watcher.subscribe([topic])
            first = await broker.dialler()(session(name, persistent=True, will=Will(topic, b"gone")), 0)
            await first.subscribe([f"{topic}/first"])
            second = await broker.dialler()(session(name, persistent=True), 0)
            assert second.session_present
            assert await fails_with_link_down(next_delivery(first))
            await second.publish(topic, b"no will")
            assert await taken(watcher) == b"no will"
            await watcher.publish(f"{topic}/first", b"to the session")
            assert await taken(second) == b"to the session"
            await second.close()

    broker.run(main)


def test_a_restart_keeps_what_is_retained_and_who_subscribed(broker: LinkedBroker, topic: str) -> None:
    only_with_mqtt_5(broker)
    collector = session(persistent=True)

    async def before() -> None:
        async with connected(broker, collector) as connection:
            await connection.subscribe([f"{topic}/up"])
            await connection.publish(topic, b"head", retain=True)
            await connection.publish(f"{topic}/up", b"under way")
            await next_delivery(connection)

    async def after() -> None:
        async with connected(broker, collector) as connection, connected(broker) as sender:
            assert connection.session_present
            assert await taken(connection) == b"under way"
            await sender.publish(f"{topic}/up", b"later")
            assert await taken(connection) == b"later"
            await connection.subscribe([topic])
            assert await taken(connection) == b"head"

    broker.run(before)
    broker.restart()
    broker.run(after)


def test_an_emptied_broker_knows_nobody_and_nothing(broker: LinkedBroker, topic: str) -> None:
    collector = session(persistent=True)

    async def before() -> None:
        async with connected(broker, collector) as connection:
            await connection.subscribe([f"{topic}/up"])
            await connection.publish(topic, b"head", retain=True)

    async def after() -> None:
        async with connected(broker, collector) as connection, connected(broker) as sender:
            assert not connection.session_present
            await connection.subscribe([topic])
            await sender.publish(f"{topic}/up", b"nobody asked")
            await sender.publish(topic, b"marker")
            assert await taken(connection) == b"marker"

    broker.run(before)
    broker.restart(empty=True)
    broker.run(after)


@pytest.fixture(scope="module", params=WITH_LIMITS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkedBroker]:
    """A broker that keeps ten messages per session beyond those under way."""
    yield from started(request.param, tmp_path_factory.mktemp("small"), max_queued=10)


def test_a_full_queue_drops_what_was_acknowledged_to_its_sender(small: LinkedBroker, topic: str) -> None:
    collector = session(persistent=True, receive_maximum=4)

    async def main() -> None:
        async with connected(small, collector) as connection:
            await connection.subscribe([topic])
            await settled(connection)
            async with connected(small) as device:
                for number in range(50):
                    await device.publish(topic, b"%d" % number)  # each is acknowledged
                await device.publish(topic, b"end", qos=0)
            arrived = []
            while (delivery := await next_delivery(connection)).payload != b"end":
                arrived.append(delivery)
            assert [int(each.payload) for each in arrived] == [0, 1, 2, 3]
            for each in arrived:
                connection.acknowledge(each)
            queued = [int(await taken(connection)) for _ in range(10)]
            assert queued == list(range(4, 14))
            async with connected(small) as device:
                await device.publish(topic, b"50")
            assert await taken(connection) == b"50"  # and of 14 to 49 nobody hears

    small.run(main)


def test_a_session_ends_when_its_time_is_over(broker: LinkedBroker, topic: str) -> None:
    if broker.kind != "memory":
        pytest.skip("it takes a minute of real time")
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(broker, collector) as connection:
            await connection.subscribe([topic])
        await asyncio.sleep(59.0)
        async with connected(broker, collector) as connection:
            assert connection.session_present
        await asyncio.sleep(61.0)
        async with connected(broker, collector) as connection:
            assert not connection.session_present

    # Longer than other tests may take, in a time that costs nothing.
    from virtual_time import run_virtually  # noqa: PLC0415

    run_virtually(main)
