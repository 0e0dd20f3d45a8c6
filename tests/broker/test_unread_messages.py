"""What its owner does not take, a link does not read: memory is bounded, whatever a broker sends.

mosquitto 2.0.11 keeps a receive maximum only until the first acknowledgement: from then on it answers each
with as many messages again, as long as it has any.
"""

import asyncio

from fedtide.wire import mqtt
from fedtide.wire.link import Broker, Session, Traffic
from fedtide.wire.mqtt import MqttDialler

MESSAGES = 1000
DEADLINE_S = 60.0
TOPIC = "fl/1/pumps/up/0/pump-1"


async def dialled(broker, name, receive_maximum=32):
    dial = MqttDialler(Broker(hosts=(f"{broker.host}:{broker.port}",)), Traffic())
    return await dial(
        Session(name, clean_start=True, expiry_s=0, receive_maximum=receive_maximum, will=None), 0
    )


def with_a_backlog(broker, payload_bytes, qos, scenario):
    """Run ``scenario`` on a link for which so many messages are on their way or at the broker."""

    async def main():
        async with asyncio.timeout(DEADLINE_S):
            receiver, sender = await dialled(broker, "receiver"), await dialled(broker, "sender")
            await receiver.subscribe([TOPIC], qos=qos)
            payloads = [number.to_bytes(4, "big") * (payload_bytes // 4) for number in range(MESSAGES)]
            for start in range(0, MESSAGES, 16):
                part = payloads[start : start + 16]
                await asyncio.gather(*(sender.publish(TOPIC, payload) for payload in part))
            await scenario(receiver, payloads)
            await receiver.close()
            await sender.close()

    asyncio.run(main())


async def taken(receiver, count, most_waiting):
    """So many messages, each acknowledged at once, while no more than ``most_waiting`` lie unread."""
    payloads = []
    async for delivery in receiver.deliveries():
        receiver.acknowledge(delivery)
        payloads.append(delivery.payload)
        assert receiver._inbox.qsize() <= most_waiting
        if len(payloads) == count:
            return payloads
        await asyncio.sleep(0)  # the loop reads what it may
    raise AssertionError("the link ended by itself")


def test_however_fast_the_broker_sends_few_messages_lie_unread_and_none_is_left_out(broker):
    async def scenario(receiver, payloads):
        assert await taken(receiver, MESSAGES, mqtt._MAX_WAITING) == payloads

    with_a_backlog(broker, 2_000, 1, scenario)


def test_large_messages_are_bounded_by_their_bytes(broker, monkeypatch):
    async def scenario(receiver, payloads):
        assert await taken(receiver, MESSAGES, 11) == payloads

    monkeypatch.setattr(mqtt, "_MAX_WAITING_BYTES", 20_000)
    with_a_backlog(broker, 2_000, 1, scenario)


def test_an_owner_who_takes_nothing_for_a_while_gets_everything_then(broker):
    async def scenario(receiver, payloads):
        await asyncio.sleep(0.2)  # time in which all of it would have come
        assert receiver._inbox.qsize() <= mqtt._MAX_WAITING
        assert await taken(receiver, MESSAGES, mqtt._MAX_WAITING) == payloads

    with_a_backlog(broker, 2_000, 0, scenario)


def test_what_is_sent_at_most_once_leaves_while_nothing_is_read(broker):
    """A coordinator answers while more than it reads comes in: waiting for one another would never end."""

    async def scenario(receiver, _payloads):
        await taken(receiver, 20, mqtt._MAX_WAITING)
        listener = await dialled(broker, "listener")
        await listener.subscribe(["fl/1/pumps/dn/pump-1"], qos=0)
        for number in range(500):
            await receiver.publish("fl/1/pumps/dn/pump-1", number.to_bytes(2, "big"), qos=0)
        heard = [delivery.payload async for delivery in first(listener, 500)]
        assert heard == [number.to_bytes(2, "big") for number in range(500)]
        await listener.close()

    with_a_backlog(broker, 2_000, 1, scenario)


async def first(connection, count):
    async for delivery in connection.deliveries():
        yield delivery
        count -= 1
        if not count:
            return
