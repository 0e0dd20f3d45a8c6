"""What is too large for us never reaches us: the broker is told so."""

import asyncio
from pathlib import Path
from typing import Final

import pytest

from broker_config.local import start_local_broker
from fedtide.wire import mqtt
from fedtide.wire.link import Broker, Connection, Session, Traffic
from fedtide.wire.mqtt import MAX_PACKET_BYTES, MqttDialler

TOPIC: Final = "fl/1/pumps/up/0/pump-7"


async def connected(port: int, name: str) -> Connection:
    dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{port}",)), Traffic())
    return await dial(Session(name, clean_start=True, expiry_s=0, receive_maximum=32, will=None), 0)


async def next_payload(connection: Connection) -> bytes:
    delivery = await anext(connection.deliveries())
    connection.acknowledge(delivery)
    return delivery.payload


@pytest.mark.mosquitto
@pytest.mark.parametrize("qos", [0, 1])
def test_mosquitto_drops_what_is_larger_than_we_announced_and_brings_what_comes_after(
    tmp_path: Path, qos: int
) -> None:
    async def main(port: int) -> tuple[bytes, int]:
        receiver, sender = await connected(port, "receiver"), await connected(port, "sender")
        await receiver.subscribe([TOPIC])
        await sender.publish(TOPIC, bytes(4 * MAX_PACKET_BYTES), qos=qos)
        await sender.publish(TOPIC, b"small", qos=qos)
        received = await next_payload(receiver)
        assert isinstance(receiver, mqtt.MqttConnection)
        await receiver.close()
        await sender.close()
        return received, receiver._traffic.received_messages

    with start_local_broker(tmp_path, "mosquitto") as broker:
        assert asyncio.run(asyncio.wait_for(main(broker.port), 20)) == (b"small", 1)
