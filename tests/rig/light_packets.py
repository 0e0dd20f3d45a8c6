"""The MQTT 5 packets that a device writes. No I/O: values in, bytes out. ``mqtt_packets`` reads them.

Section numbers are those of MQTT 5.
"""

from collections.abc import Sequence
from typing import Final

LEVEL: Final = 5
CONNACK: Final = 2  # section 2.1.2, as the others
PUBACK: Final = 4
SUBACK: Final = 9
PINGREQ: Final = b"\xc0\x00"
DISCONNECT: Final = b"\xe0\x00"
RECEIVE_MAXIMUM: Final = 4
"""As of an edge agent."""
KEEPALIVE_S: Final = 60
_CLEAN_START_WITH_RETAINED_WILL: Final = 0x2E  # section 3.1.2.3: clean start, will at QoS 1, retained


def connect_packet(client_id: str, will_topic: str, will: bytes) -> bytes:
    """CONNECT (section 3.1): a clean start, and a retained will."""
    properties = b"\x21" + RECEIVE_MAXIMUM.to_bytes(2, "big")
    header = (
        _field(b"MQTT") + bytes((LEVEL, _CLEAN_START_WITH_RETAINED_WILL)) + KEEPALIVE_S.to_bytes(2, "big")
    )
    payload = _field(client_id.encode()) + b"\0" + _field(will_topic.encode()) + _field(will)
    return _packet(0x10, header + bytes((len(properties),)) + properties + payload)


def publish_packet(topic: str, payload: bytes, packet_id: int, *, retain: bool = False) -> bytes:
    """PUBLISH at QoS 1 (section 3.3) without properties."""
    return _packet(0x32 | retain, _field(topic.encode()) + packet_id.to_bytes(2, "big") + b"\0" + payload)


def subscribe_packet(filters: Sequence[str], packet_id: int) -> bytes:
    """SUBSCRIBE at QoS 1 (section 3.8)."""
    wanted = b"".join(_field(name.encode()) + b"\x01" for name in filters)
    return _packet(0x82, packet_id.to_bytes(2, "big") + b"\0" + wanted)


def _packet(first: int, rest: bytes) -> bytes:
    """Section 2.1: type and flags, the remaining length as a variable byte integer, the rest."""
    length, left = bytearray(), len(rest)
    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes((first, *length, left)) + rest


def _field(content: bytes) -> bytes:
    """A string or binary data with its length before it (sections 1.5.4 and 1.5.6)."""
    return len(content).to_bytes(2, "big") + content
