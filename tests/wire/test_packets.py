"""Packets read the short way say what the library says of them; the rest is left to the library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.enums import MQTTProtocolVersion

from fedtide.wire.packets import plain_puback, plain_publish

TOPICS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
FIRST = st.sampled_from([0x30, 0x31, 0x32, 0x33, 0x3A, 0x3B])


def publish(first, topic, packet_id, payload, *, properties=b"\0"):
    """All of a PUBLISH after its remaining length; MQTT 3.1.1 has no properties."""
    name = topic.encode()
    number = packet_id.to_bytes(2, "big") if first >> 1 & 3 else b""
    return len(name).to_bytes(2, "big") + name + number + properties + payload


@given(
    first=FIRST,
    topic=TOPICS,
    packet_id=st.integers(1, 65_535),
    payload=st.binary(max_size=300),
    with_properties=st.booleans(),
)
def test_a_plain_publish_reads_as_the_library_reads_it(first, topic, packet_id, payload, with_properties):
    content = publish(first, topic, packet_id, payload, properties=b"\0" if with_properties else b"")
    protocol = MQTTProtocolVersion.MQTTv5 if with_properties else MQTTProtocolVersion.MQTTv311
    expected = _packet.decode_publish(first, content, protocol)
    read = plain_publish(first, bytearray(content), with_properties=with_properties)
    assert read is not None
    assert (read.topic.encode(), read.payload, read.packet_id, read.qos, read.retained) == (
        expected.topic,
        bytes(expected.payload),
        expected.mid,
        expected.qos,
        expected.retain,
    )


@pytest.mark.parametrize(
    ("first", "content"),
    [
        pytest.param(0x34, publish(0x34, "up", 1, b"x"), id="QoS 2"),
        pytest.param(0x36, publish(0x36, "up", 1, b"x"), id="no QoS there is"),
        pytest.param(0x32, publish(0x32, "up", 1, b"x", properties=b"\x02\x01\x01"), id="properties"),
        pytest.param(0x32, b"\0\x02\xff\xff\0\x01\0x", id="a topic that is not UTF-8"),
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_the_library(first, content):
    assert plain_publish(first, content, with_properties=True) is None


@given(content=st.binary(max_size=12), first=FIRST, with_properties=st.booleans())
def test_bytes_that_are_no_publish_are_left_to_the_library(content, first, with_properties):
    read = plain_publish(first, content, with_properties=with_properties)
    if read is not None:
        properties = b"\0" if with_properties else b""
        assert publish(first, read.topic, read.packet_id, read.payload, properties=properties) == content


@pytest.mark.parametrize("cut", range(6))
def test_a_publish_cut_short_is_left_to_the_library(cut):
    assert plain_publish(0x32, publish(0x32, "up", 1, b"")[:cut], with_properties=True) is None


def test_a_puback_of_two_bytes_is_success_and_any_other_is_left_to_the_library():
    assert plain_puback(b"\x12\x34") == 0x1234
    assert plain_puback(b"\x12\x34\x87") is None
    assert plain_puback(b"\x12\x34\x00\x00") is None
    assert plain_puback(b"\x12") is None
