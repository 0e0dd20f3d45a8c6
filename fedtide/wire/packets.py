"""The MQTT packets that come by the thousand, read without the detours of a general library. Pure.

What is not as plain as it nearly always is, is left to the library: properties, QoS 2, anything malformed.
Sections are those of MQTT 5.
"""

from typing import Final

from fedtide.wire.link import Delivery

_RETAIN: Final = 0x01
_MOST_QOS: Final = 1
_PACKET_ID_BYTES: Final = 2


def plain_publish(first: int, content: bytes | bytearray, *, with_properties: bool) -> Delivery | None:
    """A PUBLISH (section 3.3) without properties; None for any other.

    Args:
        first: the packet's first byte.
        content: all after its remaining length.
        with_properties: whether the protocol has properties: MQTT 5, but not 3.1.1.
    """
    qos = first >> 1 & 3
    topic_end = 2 + int.from_bytes(content[:2], "big")
    start = topic_end + (_PACKET_ID_BYTES if qos else 0)
    payload = start + with_properties
    if qos > _MOST_QOS or len(content) < payload or (with_properties and content[start]):
        return None
    try:
        topic = content[2:topic_end].decode()
    except UnicodeDecodeError:
        return None
    packet_id = int.from_bytes(content[topic_end:start], "big")
    with memoryview(content) as view:
        return Delivery(topic, bytes(view[payload:]), packet_id, qos, bool(first & _RETAIN))


def plain_puback(content: bytes | bytearray) -> int | None:
    """The packet identifier of a PUBACK that says no more than success (section 3.4.2.1); None for others."""
    return int.from_bytes(content, "big") if len(content) == _PACKET_ID_BYTES else None


def packet_bytes(topic: str, payload: bytes) -> int:
    """Bytes of a PUBLISH packet (MQTT 3.1.1 section 3.3): fixed header, topic, packet identifier, payload.

    MQTT 5 adds at least one byte of properties, not counted.
    """
    remaining = 2 + len(topic.encode()) + 2 + len(payload)
    length_bytes = 1 + (remaining > 127) + (remaining > 16_383) + (remaining > 2_097_151)
    return 1 + length_bytes + remaining
