"""The link's conformance tests: the same for every broker, over its real port.

Nothing here waits for a time to pass: where a message must not come, one that must comes after it.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

import numpy as np
import pytest
from linked_broker import (
    KINDS,
    WITH_LIMITS,
    LinkedBroker,
    RealBroker,
    connected,
    fails_with_link_down,
    fresh_topic,
    needs_prompt_redelivery,
    next_delivery,
    session,
    started,
)

from broker_config.local import free_port
from fedtide.wire import mqtt
from fedtide.wire.chunks import MAX_CHUNK_BYTES, chunk_bytes
from fedtide.wire.link import Broker, LinkDown, PublishRefused, Reconnector, Traffic, Will
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.packets import packet_bytes

DEADLINE_S: Final = 20.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; one that hangs is a failure."""

    async def within_the_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()

    asyncio.run(within_the_deadline())


@pytest.fixture(scope="module", params=KINDS)
def brokers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LinkedBroker]:
    """Each broker, one after the other."""
    yield from started(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def topic() -> str:
    """A topic that no other test uses."""
    return fresh_topic()


def test_it_speaks_mqtt_5_where_the_broker_does_and_falls_back_to_3_1_1(brokers: LinkedBroker) -> None:
    async def main() -> None:
        dial = brokers.dialler()
        for _ in range(2):  # the second time it knows
            connection = await dial(session(), 0)
            assert connection.mqtt_version == ("3.1.1" if brokers.kind == "nats" else "5")
            await connection.close()

    brokers.run(main)


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("size_bytes", [0, 1, 200, MAX_CHUNK_BYTES])
def test_a_published_message_arrives_as_it_was(
    brokers: LinkedBroker, topic: str, size_bytes: int, qos: int
) -> None:
    payload = np.random.default_rng(7).bytes(size_bytes)

    async def main() -> None:
        async with connected(brokers) as sender, connected(brokers) as receiver:
            await receiver.subscribe([topic])
            await sender.publish(topic, payload, qos=qos)
            delivery = await next_delivery(receiver)
            receiver.acknowledge(delivery)
        assert (delivery.topic, delivery.payload) == (topic, payload)
        assert (delivery.qos, delivery.retained) == (qos, False)

    brokers.run(main)


def test_messages_arrive_in_the_order_in_which_they_were_published(brokers: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(brokers) as sender, connected(brokers) as receiver:
            await receiver.subscribe([topic])
            publishing = [sender.publish(topic, b"%d" % number) for number in range(100)]
            gathered = asyncio.gather(*publishing)
            arrived = []
            async for delivery in receiver.deliveries():
                receiver.acknowledge(delivery)
                arrived.append(int(delivery.payload))
                if len(arrived) == 100:
                    break
            await gathered
            assert arrived == list(range(100))

    brokers.run(main)


def test_a_retained_message_waits_for_who_comes_later_until_an_empty_one_clears_it(
    brokers: LinkedBroker, topic: str
) -> None:
    async def main() -> None:
        async with connected(brokers) as sender:
            await sender.publish(topic, b"version 1", retain=True)
            async with connected(brokers) as receiver:
                await receiver.subscribe([topic])
                delivery = await next_delivery(receiver)
                assert (delivery.payload, delivery.retained) == (b"version 1", True)
                receiver.acknowledge(delivery)
            await sender.publish(topic, b"", retain=True)
            async with connected(brokers) as receiver:
                await receiver.subscribe([topic])
                await sender.publish(topic, b"marker")
                assert (await next_delivery(receiver)).payload == b"marker"

    brokers.run(main)


def test_more_filters_than_fit_one_packet_are_all_subscribed_and_unsubscribed(
    brokers: LinkedBroker, topic: str
) -> None:
    names = [f"{topic}/{number}" for number in range(20)]

    async def main() -> None:
        async with connected(brokers) as sender, connected(brokers) as receiver:
            await receiver.subscribe([*names, topic], qos=0)
            for name in names:
                await sender.publish(name, b"")
            arrived = [(await next_delivery(receiver)).topic for _ in names]
            assert arrived == names
            await receiver.unsubscribe(names)
            for name in [*names, topic]:
                await sender.publish(name, b"")
            assert (await next_delivery(receiver)).topic == topic

    brokers.run(main)


def test_a_killed_broker_wakes_everyone_who_waits(brokers: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        connection = await brokers.dialler()(session(), 0)
        brokers.pause()  # from here on it acknowledges nothing
        waiting = [
            asyncio.create_task(fails_with_link_down(each))
            for each in (
                connection.publish(topic, b"update"),
                connection.subscribe([topic]),
                connection.unsubscribe([topic]),
                next_delivery(connection),
                next_delivery(connection),
            )
        ]
        brokers.kill()
        assert await asyncio.gather(*waiting) == [True] * 5
        assert await fails_with_link_down(connection.publish(topic, b"later", qos=0))
        assert await fails_with_link_down(connection.subscribe([topic]))
        assert await fails_with_link_down(next_delivery(connection))
        await connection.close()
        connection.abort()  # both do nothing more

    try:
        brokers.run(main)
    finally:
        brokers.start()


def test_dialling_a_port_without_a_broker_is_a_lost_link_that_names_the_host() -> None:
    port = free_port()

    async def main() -> None:
        dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{port}",)), Traffic())
        with pytest.raises(LinkDown, match=rf"broker 127\.0\.0\.1:{port}: "):
            await dial(session(), 0)

    run(main)


def test_a_host_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 0.05)

    async def main(address: str) -> None:
        dial = MqttDialler(Broker(hosts=(address,)), Traffic())
        with pytest.raises(LinkDown, match=r"did not answer within 0\.05 s"):
            await dial(session(), 0)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(lambda: main(f"127.0.0.1:{silent.getsockname()[1]}"))


def test_the_hosts_are_tried_in_turn(brokers: LinkedBroker) -> None:
    if not isinstance(brokers, RealBroker):
        pytest.skip("a broker in memory has no host")
    dead = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    settings = Broker(hosts=(*dead, brokers.address), reconnect_min_s=1e-3, reconnect_max_s=1e-3)
    failures: list[str] = []

    async def main() -> None:
        reconnector = Reconnector(
            MqttDialler(settings, Traffic()),
            settings,
            np.random.default_rng(1),
            lambda error, _: failures.append(str(error)),
        )
        connection = await reconnector.connect(session())
        await connection.close()

    brokers.run(main)
    assert len(failures) == 2
    assert all(host in failure for host, failure in zip(dead, failures, strict=True))


def test_a_message_that_was_not_acknowledged_comes_again_on_the_next_connection(
    brokers: LinkedBroker, topic: str
) -> None:
    needs_prompt_redelivery(brokers)
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(brokers, collector) as first, connected(brokers) as sender:
            assert not first.session_present
            await first.subscribe([topic])
            await sender.publish(topic, b"update")
            assert (await next_delivery(first)).payload == b"update"
            first.abort()
        async with connected(brokers, collector) as second:
            assert second.session_present
            assert (await next_delivery(second)).payload == b"update"

    brokers.run(main)


def test_an_acknowledged_message_does_not_come_again(brokers: LinkedBroker, topic: str) -> None:
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(brokers, collector) as first, connected(brokers) as sender:
            await first.subscribe([topic])
            await sender.publish(topic, b"update")
            first.acknowledge(await next_delivery(first))
            await first.subscribe([f"{topic}/other"])  # answered, so the acknowledgement before it was read
        async with connected(brokers, collector) as second, connected(brokers) as sender:
            assert second.session_present
            await sender.publish(topic, b"marker")
            delivery = await next_delivery(second)
            assert delivery.payload == b"marker"
            second.acknowledge(delivery)
            await second.unsubscribe([topic, f"{topic}/other"])

    brokers.run(main)


def test_acknowledging_on_a_lost_connection_does_nothing(brokers: LinkedBroker, topic: str) -> None:
    needs_prompt_redelivery(brokers)
    collector = session(persistent=True)

    async def main() -> None:
        async with connected(brokers, collector) as first, connected(brokers) as sender:
            await first.subscribe([topic])
            await sender.publish(topic, b"update")
            delivery = await next_delivery(first)
            first.abort()
        async with connected(brokers, collector) as second:
            assert (await next_delivery(second)).payload == b"update"
            first.acknowledge(delivery)
            await second.subscribe([f"{topic}/other"])
        async with connected(brokers, collector) as third:
            assert (await next_delivery(third)).payload == b"update"

    brokers.run(main)


def test_the_will_is_published_and_retained_after_an_abort(brokers: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(brokers) as watcher:
            await watcher.subscribe([topic])
            device = await brokers.dialler()(session(will=Will(topic, b"offline")), 0)
            device.abort()
            assert (await next_delivery(watcher)).payload == b"offline"
        async with connected(brokers) as later:
            await later.subscribe([topic])
            delivery = await next_delivery(later)
            assert (delivery.payload, delivery.retained) == (b"offline", True)

    brokers.run(main)


def test_no_will_is_published_after_a_goodbye(brokers: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(brokers) as watcher:
            await watcher.subscribe([topic])
            polite = await brokers.dialler()(session(will=Will(topic, b"polite is gone")), 0)
            await polite.publish(topic, b"goodbye")
            await polite.close()
            rude = await brokers.dialler()(session(will=Will(topic, b"rude is gone")), 0)
            rude.abort()
            assert [(await next_delivery(watcher)).payload for _ in range(2)] == [b"goodbye", b"rude is gone"]

    brokers.run(main)


def test_traffic_is_counted_in_bytes_of_publish_packets_over_all_connections(
    brokers: LinkedBroker, topic: str
) -> None:
    async def main() -> None:
        sent, received = Traffic(), Traffic()
        sender = await brokers.dialler(sent)(session(), 0)
        receiver = await brokers.dialler(received)(session(), 0)
        await receiver.subscribe([topic])
        await sender.publish(topic, bytes(300))
        receiver.acknowledge(await next_delivery(receiver))
        # 1 byte of type, 2 of length, 2 + the topic, 2 of packet identifier, 300 of payload.
        size_bytes = 1 + 2 + 2 + len(topic) + 2 + 300
        assert packet_bytes(topic, bytes(300)) == size_bytes
        assert (sent.sent_bytes, sent.sent_messages, sent.connections) == (size_bytes, 1, 1)
        assert (received.received_bytes, received.received_messages) == (size_bytes, 1)
        await sender.close()
        await receiver.close()

    brokers.run(main)


def test_a_cancelled_wait_leaves_the_connection_usable(brokers: LinkedBroker, topic: str) -> None:
    async def main() -> None:
        async with connected(brokers) as connection:
            for _ in range(100):  # more than can be under way at once
                task = asyncio.create_task(connection.publish(topic, b"never mind"))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            await connection.subscribe([topic])
            await connection.publish(topic, b"still here")
            payloads = set()
            while b"still here" not in payloads:
                payloads.add((await next_delivery(connection)).payload)

    brokers.run(main)


@pytest.fixture(scope="module", params=WITH_LIMITS)
def frugal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LinkedBroker]:
    """A broker that takes packets of at most 20,000 bytes, and says so."""
    yield from started(request.param, tmp_path_factory.mktemp("frugal"), max_packet=20_000)


def test_a_message_larger_than_the_broker_announced_is_refused_and_the_connection_lives(
    frugal: LinkedBroker, topic: str
) -> None:
    async def main() -> None:
        async with connected(frugal) as connection:
            assert connection.max_packet_bytes == 20_000
            await connection.subscribe([topic])
            with pytest.raises(PublishRefused, match=r"takes at most 20,000"):
                await connection.publish(topic, bytes(20_000))
            await connection.publish(topic, bytes(chunk_bytes(connection.max_packet_bytes)))
            assert len((await next_delivery(connection)).payload) == 18_976  # 20,000 - 1,024

    frugal.run(main)
