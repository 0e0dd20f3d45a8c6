"""What fedtide needs of a broker, asked of each one that can be installed."""

import contextlib
import time

import numpy as np
import pytest
from broker_peer import Peer, Refused, Will

from broker_config.local import available_brokers, free_port, start_local_broker
from broker_config.nats import embedded

CHUNK_BYTES = 122_880
CHUNKS = 9
RECONNECTS = 50
RECONNECT_S = 0.1


@pytest.fixture(
    scope="module", params=[pytest.param("mosquitto", marks=pytest.mark.mosquitto), pytest.param("nats")]
)
def broker(request, tmp_path_factory):
    if request.param not in available_brokers():
        pytest.skip(f"{request.param} is not installed: pip install 'fedtide[broker]'")
    directory = tmp_path_factory.mktemp(request.param)
    port = free_port()
    # NATS redelivers after ack_wait, 30 s by default; one second is its shortest.
    config = embedded(port, directory / "state", ack_wait=1) if request.param == "nats" else None
    with start_local_broker(directory, request.param, config=config, port=port) as started:
        yield started


@contextlib.contextmanager
def peer(broker, name, **options):
    with contextlib.ExitStack() as stack:
        for attempts_left in range(RECONNECTS, -1, -1):
            # NATS hangs up on a name whose last connection it has not finished with; devices try again.
            try:
                joined = Peer((broker.host, broker.port), name, version=broker.mqtt_version, **options)
                stack.enter_context(joined)
                break
            except Refused:
                if attempts_left == 0 or broker.kind != "nats":
                    raise
                time.sleep(RECONNECT_S)
        yield joined


def retained(broker, topic):
    """What a new subscription to the topic gets at once, or None."""
    with peer(broker, "pump-1") as device:
        device.subscribe(topic, qos=0)
        message = device.receive_soon()
        return None if message is None else message.payload


def test_a_device_pulls_retained_chunks_one_exact_topic_at_a_time(broker):
    content = np.random.default_rng(7).bytes(CHUNKS * CHUNK_BYTES)
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    with peer(broker, "coordinator") as coordinator:
        for index, chunk in enumerate(chunks):
            assert coordinator.publish(f"fl/1/pumps/model/b/0a/{index}", chunk, retain=True) in {0, 0x10}
    with peer(broker, "pump-1") as device:
        pulled = []
        for index in range(CHUNKS):
            topic = f"fl/1/pumps/model/b/0a/{index}"
            device.subscribe(topic, qos=0)
            message = device.receive()
            assert message.topic == topic
            assert message.retain
            pulled.append(message.payload)
            device.unsubscribe(topic)
    assert b"".join(pulled) == content


def test_an_empty_retained_message_clears_the_chunk(broker):
    with peer(broker, "coordinator") as coordinator, peer(broker, "pump-1") as device:
        coordinator.publish("fl/1/pumps/model/b/0b/0", b"old", retain=True)
        coordinator.publish("fl/1/pumps/model/b/0b/0", b"", retain=True)
        device.subscribe("fl/1/pumps/model/b/0b/0", "fl/1/pumps/dn/pump-1", qos=0)
        coordinator.publish("fl/1/pumps/dn/pump-1", b"after")
        assert device.receive().payload == b"after"


def test_a_message_that_was_not_acknowledged_comes_again_after_a_reconnect(broker):
    with peer(broker, "coordinator", persistent=True, acknowledges=False) as coordinator:
        coordinator.subscribe("fl/1/pumps/up/0/pump-1")
        with peer(broker, "pump-1") as device:
            device.publish("fl/1/pumps/up/0/pump-1", b"update")
        assert coordinator.receive().payload == b"update"
        coordinator.vanish()
    with peer(broker, "coordinator", persistent=True) as again:
        assert again.session_present
        assert again.receive().payload == b"update"
        again.unsubscribe("fl/1/pumps/up/0/pump-1")


def test_a_persistent_session_gets_in_order_what_arrived_while_it_was_away(broker):
    with peer(broker, "collector", persistent=True) as collector:
        collector.subscribe("fl/1/pumps/up/1/+")
    with peer(broker, "pump-1") as device:
        for number in range(50):
            device.publish("fl/1/pumps/up/1/pump-1", b"%d" % number)
    with peer(broker, "collector", persistent=True) as collector:
        assert collector.session_present
        assert [int(collector.receive().payload) for _ in range(50)] == list(range(50))
        collector.unsubscribe("fl/1/pumps/up/1/+")


def test_a_will_is_published_when_the_socket_closes_without_a_word(broker):
    with peer(broker, "coordinator") as coordinator:
        coordinator.subscribe("fl/1/pumps/st/pump-1")
        with peer(broker, "pump-1", will=Will("fl/1/pumps/st/pump-1", b"offline")) as device:
            device.publish("fl/1/pumps/st/pump-1", b"online", retain=True)
            assert coordinator.receive().payload == b"online"
            device.vanish()
        assert coordinator.receive().payload == b"offline"


def test_a_polite_disconnect_publishes_no_will(broker):
    with peer(broker, "coordinator") as coordinator:
        coordinator.subscribe("fl/1/pumps/st/pump-2", "fl/1/pumps/st/pump-3")
        with peer(broker, "pump-2", will=Will("fl/1/pumps/st/pump-2", b"offline")) as device:
            device.publish("fl/1/pumps/st/pump-2", b"online")
        with peer(broker, "pump-3") as later:
            later.publish("fl/1/pumps/st/pump-3", b"marker")
        assert [coordinator.receive().payload for _ in range(2)] == [b"online", b"marker"]


def test_a_restart_keeps_retained_messages_and_the_port(broker):
    port = broker.port
    with peer(broker, "coordinator") as coordinator:
        coordinator.publish("fl/1/pumps/model/head", b"version 1", retain=True)
    broker.restart()
    assert broker.port == port
    # NATS answers subscriptions before it has read its retained messages, and does not send them later.
    assert any(retained(broker, "fl/1/pumps/model/head") == b"version 1" for _ in range(20))


def test_an_emptied_broker_forgets_retained_messages_and_sessions(broker):
    with peer(broker, "coordinator", persistent=True) as coordinator:
        coordinator.subscribe("fl/1/pumps/up/0/+")
        coordinator.publish("fl/1/pumps/model/head", b"version 1", retain=True)
    broker.restart(empty=True)
    with peer(broker, "coordinator", persistent=True) as coordinator:
        assert not coordinator.session_present
        coordinator.subscribe("fl/1/pumps/model/head", "fl/1/pumps/coord")
        coordinator.publish("fl/1/pumps/coord", b"marker")
        assert coordinator.receive().payload == b"marker"
