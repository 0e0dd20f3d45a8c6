"""MQTT packets, parsed just enough to lose, repeat, reorder and damage them. No I/O: bytes in, packets out.

Sections are those of MQTT 5; MQTT 3.1.1 writes the same things the same way, but for properties.
"""

from dataclasses import dataclass
from typing import Final

CONNECT: Final = 1
PUBLISH: Final = 3

_DUPLICATE_FLAG: Final = 0x08
_LONGEST_LENGTH_BYTES: Final = 4
_MQTT_5: Final = 5


class NotMqtt(Exception):
    """Bytes that are no MQTT packet."""


class Packets:
    """Cuts a stream into packets, however the stream is cut into pieces."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, content: bytes) -> list[bytes]:
        """The packets that are whole now.

        Raises:
            NotMqtt: a remaining length of more than four bytes.
        """
        self._rest += content
        packets = []
        while (size_bytes := _packet_bytes(self._rest)) is not None and len(self._rest) >= size_bytes:
            packets.append(bytes(self._rest[:size_bytes]))
            del self._rest[:size_bytes]
        return packets


@dataclass(frozen=True)
class Publish:
    """A PUBLISH packet.

    Attributes:
        topic: its topic name.
        qos: 0, 1 or 2.
        packet_id: 0 at QoS 0.
        payload_at: where in the packet its payload begins.
    """

    topic: str
    qos: int
    packet_id: int
    payload_at: int


def kind(packet: bytes) -> int:
    """The packet's type, as :data:`PUBLISH`."""
    return packet[0] >> 4


def protocol_level(connect: bytes) -> int:
    """Of a CONNECT packet: 4 for MQTT 3.1.1, 5 for MQTT 5."""
    start = _fixed_header_bytes(connect)
    name_bytes = int.from_bytes(connect[start : start + 2], "big")
    return connect[start + 2 + name_bytes]


def parsed_publish(packet: bytes, level: int) -> Publish:
    """What a PUBLISH packet of a connection of that protocol level says."""
    start = _fixed_header_bytes(packet)
    topic_end = start + 2 + int.from_bytes(packet[start : start + 2], "big")
    topic = packet[start + 2 : topic_end].decode()
    qos = packet[0] >> 1 & 3
    at, packet_id = topic_end, 0
    if qos:
        packet_id, at = int.from_bytes(packet[at : at + 2], "big"), at + 2
    if level >= _MQTT_5:
        properties_bytes, length_bytes = _variable_integer(packet[at : at + 4])
        at += length_bytes + properties_bytes
    return Publish(topic, qos, packet_id, at)


def sent_again(packet: bytes) -> bytes:
    """The same PUBLISH as its sender repeats it: at QoS 1 with the DUP flag (section 3.3.1.1)."""
    flagged = packet[0] | _DUPLICATE_FLAG if packet[0] >> 1 & 3 else packet[0]
    return bytes((flagged,)) + packet[1:]


def with_flipped_bit(packet: bytes, byte: int, bit: int) -> bytes:
    """The packet with one bit changed."""
    damaged = bytearray(packet)
    damaged[byte] ^= 1 << bit
    return bytes(damaged)


def puback(packet_id: int) -> bytes:
    """The acknowledgement of a QoS 1 PUBLISH: success, which both protocol levels write the same way."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic filter matches a topic name (section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(
        want in ("+", level) for want, level in zip(wanted, levels, strict=True)
    )


def _packet_bytes(content: bytearray) -> int | None:
    """Bytes of the packet that begins here; None while its length is not here."""
    for length_bytes in range(1, _LONGEST_LENGTH_BYTES + 1):
        if len(content) <= length_bytes:
            return None
        if not content[length_bytes] & 0x80:
            remaining, _ = _variable_integer(bytes(content[1 : 1 + length_bytes]))
            return 1 + length_bytes + remaining
    raise NotMqtt(f"a remaining length of more than {_LONGEST_LENGTH_BYTES} bytes: {bytes(content[:5])!r}")


def _variable_integer(content: bytes) -> tuple[int, int]:
    """A variable byte integer (section 1.5.5 of MQTT 5), and in how many bytes it is written."""
    value = 0
    for index, byte in enumerate(content):
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value, index + 1
    raise NotMqtt(f"a variable byte integer without an end: {content!r}")


def _fixed_header_bytes(packet: bytes) -> int:
    _, length_bytes = _variable_integer(packet[1:5])
    return 1 + length_bytes
