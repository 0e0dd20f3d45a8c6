"""The proxy does what its script says, to real connections with a real broker, and nothing else."""

import asyncio
import contextlib
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mqtt_packets import NotMqtt, Packets, kind, matches, parsed_publish, puback, sent_again, with_flipped_bit
from mqtt_proxy import Deeds, MqttProxy
from proxy_script import CALM, Cut, Script, Toward, Trouble, Unit
from whole_fleet import until

from broker_config.local import free_port
from fedtide.wire.link import Broker, LinkDown, Session, Traffic
from fedtide.wire.mqtt import MqttDialler

PATIENCE_S = 10.0
LOW_QOS_1 = b"\x32\x0b\x00\x03a/b\x00\x07body"  # MQTT 3.1.1: topic a/b, packet id 7
NEW_QOS_1 = b"\x32\x0f\x00\x03a/b\x00\x07\x03\x23\x00\x01body"  # MQTT 5: with a topic alias, 3 bytes
LOW_QOS_0 = b"\x30\x09\x00\x03a/bbody"


def test_a_publish_packet_is_parsed_at_either_protocol_level():
    low, new, plain = parsed_publish(LOW_QOS_1, 4), parsed_publish(NEW_QOS_1, 5), parsed_publish(LOW_QOS_0, 4)
    assert (low.topic, low.qos, low.packet_id, LOW_QOS_1[low.payload_at :]) == ("a/b", 1, 7, b"body")
    assert (new.topic, new.qos, new.packet_id, NEW_QOS_1[new.payload_at :]) == ("a/b", 1, 7, b"body")
    assert (plain.topic, plain.qos, plain.packet_id, LOW_QOS_0[plain.payload_at :]) == ("a/b", 0, 0, b"body")


def test_a_repeated_publish_has_the_flag_that_qos_0_may_not_have():
    assert sent_again(LOW_QOS_1) == b"\x3a" + LOW_QOS_1[1:]
    assert sent_again(LOW_QOS_0) == LOW_QOS_0
    assert puback(0x0107) == b"\x40\x02\x01\x07"
    assert with_flipped_bit(b"\x00\x00", 1, 7) == b"\x00\x80"


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/#", "b/a", False),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("a/b", "a/b", True),
        ("a/b/c/d", "a/b", False),
    ],
)
def test_topic_filters_match_as_in_the_standard(topic_filter, topic, expected):
    assert matches(topic_filter, topic) is expected


LARGE = b"\x30\x80\x80\x01" + bytes(16384)  # a remaining length written in three bytes


@given(
    st.lists(st.sampled_from([LOW_QOS_1, LOW_QOS_0, b"\xc0\x00", LARGE]), max_size=4),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
    st.integers(100, 9000),
)
def test_packets_come_out_whole_however_the_stream_is_cut(packets, sizes, last_sizes):
    stream, cutter, found = b"".join(packets), Packets(), []
    for size in chain(sizes, repeat(last_sizes)):
        found += cutter.feed(stream[:size])
        stream = stream[size:]
        if not stream:
            break
    assert found == packets
    assert [kind(packet) for packet in found] == [packet[0] >> 4 for packet in packets]


def test_a_length_of_five_bytes_is_no_mqtt():
    with pytest.raises(NotMqtt, match="more than 4 bytes"):
        Packets().feed(b"\x30\xff\xff\xff\xff\x01")


async def dialled(port, name, *, keepalive_s=60):
    dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{port}",), keepalive_s=keepalive_s), Traffic())
    return await dial(Session(name, True, 0, 32, None), 0)


class Inbox:
    """What a subscriber has got."""

    def __init__(self):
        self.payloads = []
        self.news = asyncio.Event()

    async def listen(self, connection):
        async for delivery in connection.deliveries():
            self.payloads.append(delivery.payload)
            self.news.set()
            connection.acknowledge(delivery)

    async def has(self, many):
        async with asyncio.timeout(PATIENCE_S):
            while len(self.payloads) < many:
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def through(broker, script, seed=0):
    """A proxy with a publisher behind it, and a subscriber that speaks to the broker directly."""
    async with MqttProxy(free_port(), broker.port, script, seed) as proxy:
        listener = await dialled(broker.port, "listener")
        inbox = Inbox()
        await listener.subscribe(["proxy/#"])
        listening = asyncio.create_task(inbox.listen(listener))
        speaker = await dialled(proxy.port, "speaker")
        try:
            yield proxy, speaker, inbox
        finally:
            await speaker.close()
            await listener.close()
            await asyncio.gather(listening, return_exceptions=True)


def published(broker, script, messages, arrive, seed=0):
    """Publish the numbers from 0 on; what arrived, and what the proxy did."""

    async def scenario():
        async with through(broker, script, seed) as (proxy, speaker, inbox):
            numbers = [b"%03d" % number for number in range(messages)]
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(speaker.publish("proxy/n", number) for number in numbers))
                await inbox.has(arrive(proxy.deeds))
                # Had there been more, it would have come before this, which nothing befalls.
                proxy.script = CALM
                await speaker.publish("proxy/last", b"last")
                await inbox.has(arrive(proxy.deeds) + 1)
            assert inbox.payloads[-1] == b"last"
            return numbers, inbox.payloads[:-1], proxy.deeds

    return asyncio.run(scenario())


def to_broker(**trouble):
    return Script(troubles=(Trouble(Toward.BROKER, "proxy/#", **trouble),))


def test_a_calm_proxy_changes_nothing(brokers):
    numbers, arrived, deeds = published(brokers, CALM, 50, lambda _: 50)
    assert arrived == numbers
    assert deeds.connections >= 1
    assert deeds == Deeds(connections=deeds.connections, published=51)


def test_dropped_messages_are_acknowledged_and_never_arrive(brokers):
    numbers, arrived, deeds = published(brokers, to_broker(drop=0.3), 60, lambda deeds: 60 - deeds.dropped)
    assert 8 <= deeds.dropped <= 30
    assert len(set(arrived)) == len(arrived) == 60 - deeds.dropped
    assert set(arrived) < set(numbers)


def test_a_seed_decides_which_messages_are_dropped(broker):
    first, again, other = (
        published(broker, to_broker(drop=0.3), 40, lambda deeds: 40 - deeds.dropped, seed)[1]
        for seed in (5, 5, 6)
    )
    assert first == again != other


def test_duplicated_messages_come_twice(broker):
    numbers, arrived, deeds = published(
        broker, to_broker(duplicate=0.5), 40, lambda deeds: 40 + deeds.duplicated
    )
    assert deeds.duplicated >= 8
    assert set(arrived) == set(numbers)
    assert len(arrived) == 40 + deeds.duplicated


def test_reordered_messages_all_come_in_another_order(broker):
    numbers, arrived, deeds = published(broker, to_broker(reorder=0.3), 60, lambda _: 60)
    assert deeds.reordered >= 8
    assert sorted(arrived) == numbers
    assert arrived != numbers


def test_a_corrupted_payload_differs_in_one_bit(brokers):
    numbers, arrived, deeds = published(brokers, to_broker(corrupt=0.3), 40, lambda _: 40)
    flipped = [
        (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()
        for one, other in zip(numbers, arrived, strict=True)
    ]
    assert set(flipped) == {0, 1}
    assert sum(flipped) == deeds.corrupted >= 5


def test_only_the_topics_and_the_direction_named_are_troubled(broker):
    elsewhere = Trouble(Toward.BROKER, "other/#", drop=1.0)
    backwards = Trouble(Toward.PEER, drop=1.0)
    numbers, arrived, deeds = published(broker, Script(troubles=(elsewhere, backwards)), 20, lambda _: 20)
    assert arrived == numbers
    assert deeds.dropped == 0


def test_what_a_broker_sends_can_be_dropped_too_and_the_rest_keeps_coming(broker):
    """More messages than the broker sends unacknowledged: it must believe that the dropped ones came."""

    async def scenario():
        script = Script(troubles=(Trouble(Toward.PEER, "proxy/#", drop=0.5),))
        async with MqttProxy(free_port(), broker.port, script, 1) as proxy:
            speaker, listener = await dialled(broker.port, "speaker"), await dialled(proxy.port, "listener")
            inbox = Inbox()
            await listener.subscribe(["proxy/#"])
            listening = asyncio.create_task(inbox.listen(listener))
            for number in range(200):
                await speaker.publish("proxy/n", b"%d" % number)
            await until(
                lambda: len(inbox.payloads) + proxy.deeds.dropped == 200, PATIENCE_S, lambda: "too few"
            )
            await listener.close()
            await speaker.close()
            await asyncio.gather(listening, return_exceptions=True)
            return proxy.deeds.dropped

    assert 70 <= asyncio.run(scenario()) <= 130


def test_a_delay_delays_and_keeps_the_order(broker):
    async def scenario():
        async with through(broker, Script(delay_s=0.1, jitter_s=0.1)) as (_, speaker, inbox):
            loop = asyncio.get_running_loop()
            began = loop.time()
            await asyncio.gather(*(speaker.publish("proxy/n", b"%03d" % number) for number in range(16)))
            return loop.time() - began, inbox.payloads

    took_s, arrived = asyncio.run(scenario())
    assert took_s >= 0.2  # there, and the acknowledgement back
    assert arrived == sorted(arrived)


def test_a_connection_is_cut_after_so_many_messages_and_all_of_these_arrive(broker):
    async def scenario():
        cut = Cut(Toward.BROKER, Unit.PUBLISHES, least=5, most=5, topics="proxy/#")
        async with through(broker, Script(cuts=(cut,))) as (proxy, speaker, inbox):
            await speaker.publish("another/topic", b"does not count")
            with pytest.raises(LinkDown):
                await asyncio.gather(*(speaker.publish("proxy/n", b"%d" % number) for number in range(9)))
            await inbox.has(5)
            again = await dialled(proxy.port, "speaker")  # the next connection has a fuse of its own
            await asyncio.gather(*(again.publish("proxy/n", b"again") for _ in range(4)))
            await inbox.has(9)
            await again.close()
            return inbox.payloads, proxy.deeds

    arrived, deeds = asyncio.run(scenario())
    assert arrived == [b"0", b"1", b"2", b"3", b"4", *[b"again"] * 4]
    assert (deeds.connections, deeds.cut) == (2, 1)


def test_a_connection_is_cut_in_the_middle_of_a_message(broker):
    async def scenario():
        cut = Cut(Toward.BROKER, Unit.BYTES, least=2000, most=2000)
        async with through(broker, Script(cuts=(cut,))) as (proxy, speaker, inbox):
            await speaker.publish("proxy/n", bytes(1000))
            with pytest.raises(LinkDown):
                await speaker.publish("proxy/n", bytes(2000))
            await inbox.has(1)
            return [len(payload) for payload in inbox.payloads], proxy.deeds.cut

    assert asyncio.run(scenario()) == ([1000], 1)


def test_a_half_open_connection_takes_everything_and_gives_nothing(broker):
    async def scenario():
        cut = Cut(Toward.BROKER, Unit.PUBLISHES, least=1, most=1, topics="proxy/#", silent=True)
        async with through(broker, Script(cuts=(cut,))) as (proxy, speaker, inbox):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await asyncio.gather(*(speaker.publish("proxy/n", b"%d" % number) for number in range(3)))
            await inbox.has(1)
            return inbox.payloads, proxy.deeds

    arrived, deeds = asyncio.run(scenario())
    assert arrived == [b"0"]
    assert (deeds.half_open, deeds.cut) == (1, 0)


def test_a_frozen_proxy_gives_everything_once_it_thaws(broker):
    async def scenario():
        async with through(broker, CALM) as (proxy, speaker, inbox):
            proxy.freeze()
            sending = asyncio.gather(*(speaker.publish("proxy/n", b"%d" % number) for number in range(5)))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.shield(sending)
            assert inbox.payloads == []
            proxy.thaw()
            await sending
            await inbox.has(5)
            return inbox.payloads

    assert asyncio.run(scenario()) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_proxy_without_its_broker_hangs_up(tmp_path):
    async def scenario():
        async with MqttProxy(free_port(), free_port()) as proxy:
            with pytest.raises(LinkDown):
                await dialled(proxy.port, "alone")

    asyncio.run(scenario())
