"""Thousands of devices in one process: of an edge agent only what a broker and a coordinator see of it.

Each is an ``asyncio.Protocol`` that writes and reads the few MQTT 5 packets an agent uses, at a tenth of the
CPU and memory of a real one. It announces itself, listens where agents listen, waits as long as the
coordinator asks for, sends one signed update, again and again with growing waits, and stops at its receipt.

Receipts are told by what they name, and their signatures are checked when all have come: until then the
processor belongs to the coordinator. Section numbers are those of MQTT 5.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import light_packets as light
import mqtt_packets as mqtt
import numpy as np

from edge_agent.turn import Turn
from fedtide.wire import frame, topics
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.envelope import update_digest
from fedtide.wire.ids import Counter, DeviceId, FleetId
from fedtide.wire.link import full_jitter
from fedtide.wire.messages import (
    CoordinatorState,
    DownMessage,
    MissingChunks,
    Presence,
    Reason,
    Receipt,
    Resync,
)
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, PublicKey

_RECONNECT_MIN_S: Final = 1.0
_RECONNECT_MAX_S: Final = 120.0
_LONGEST_RECEIPT_WAIT_S: Final = 120.0
_PRESENCE_ID: Final = 1
_SUBSCRIBE_ID: Final = 2
_UPDATE_IDS: Final = range(3, 65_536)


@dataclass(frozen=True, slots=True)
class LightUpdate:
    """One device's signed update as it goes over MQTT.

    Attributes:
        device: who sends it.
        counter: the update's.
        digest: the envelope's identity.
        messages: the frames that carry it.
    """

    device: DeviceId
    counter: Counter
    digest: bytes
    messages: tuple[bytes, ...]

    @classmethod
    def of(cls, envelope: bytes, device: DeviceId, counter: Counter) -> "LightUpdate":
        """A signed envelope, cut as agents cut it."""
        messages = update_chunks(envelope, counter, MAX_CHUNK_BYTES)
        return cls(device, counter, update_digest(envelope), tuple(messages))


@dataclass(frozen=True)
class Place:
    """Where devices connect, and whom they believe.

    Attributes:
        port: the broker's, on loopback.
        fleet: which fleet.
        coordinator: the coordinator's key.
        receipt_timeout_s: the first wait for a receipt; each further one is twice as long, up to 120 s.
    """

    port: int
    fleet: FleetId
    coordinator: PublicKey
    receipt_timeout_s: float = 10.0


@dataclass
class LightRecord:
    """What the devices have in common, and what became of their updates. Times are the event loop's, seconds.

    Attributes:
        place: where they connect.
        rng: draws every wait.
        connected: when each device's subscriptions were acknowledged for the first time.
        receipted: when each device had its receipt.
        receipts: each device's, as it came.
        sent: how often an update was sent, repetitions included.
        lost_connections: how often a connection ended before its device had its receipt, or was not made.
    """

    place: Place
    rng: np.random.Generator
    connected: dict[DeviceId, float] = field(default_factory=dict)
    receipted: dict[DeviceId, float] = field(default_factory=dict)
    receipts: dict[DeviceId, bytes] = field(default_factory=dict)
    sent: int = 0
    lost_connections: int = 0
    _state: tuple[bytes, CoordinatorState] | None = None

    def opened_state(self, sealed: bytes) -> CoordinatorState:
        """The coordinator's state; the same bytes come to every device, and are opened once.

        Raises:
            WireError: it is not the coordinator's.
        """
        if self._state is None or self._state[0] != sealed:
            state = unseal(sealed, CoordinatorState, self.place.coordinator, COORDINATOR_DOMAIN)
            self._state = sealed, state
        return self._state[1]


class LightDevice(asyncio.Protocol):
    """One device.

    Args:
        record: where it notes what happens to it.
        update: what it sends.
        dial: connects it.
        on_receipt: called when it has its receipt.
    """

    __slots__ = (
        "_attempt",
        "_dial",
        "_done",
        "_losses",
        "_on_receipt",
        "_packets",
        "_published",
        "_ready",
        "_record",
        "_sent",
        "_state",
        "_timer",
        "_transport",
        "_turn",
        "_unacknowledged",
        "_update",
    )

    def __init__(
        self,
        record: LightRecord,
        update: LightUpdate,
        dial: "Callable[[LightDevice], None]",
        on_receipt: Callable[[], None],
    ) -> None:
        self._record = record
        self._update = update
        self._dial = dial
        self._on_receipt = on_receipt
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unacknowledged: set[int] = set()
        self._published = 0
        self._attempt = 0
        self._losses = 0
        self._state: CoordinatorState | None = None
        self._turn = Turn(record.rng, SYSTEM_CLOCK)
        self._ready = False
        self._sent = False
        self._done = False

    def start(self) -> None:
        """Connect."""
        self._dial(self)

    def leave(self) -> None:
        """Say goodbye: no will is published."""
        self._done = True
        self._stop_waiting()
        if self._transport:
            self._transport.write(light.DISCONNECT)
            self._transport.close()

    def ping(self) -> None:
        """Give a sign of life."""
        if self._transport:
            self._transport.write(light.PINGREQ)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._packets = mqtt.Packets()
        fleet, device = self._record.place.fleet, self._update.device
        will = frame.to_frame(Presence(online=False, boot="light"))
        topic = topics.PRESENCE.name(fleet, device=device)
        transport.write(light.connect_packet(f"{fleet}-{device}", topic, will))

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = None
        self._ready = self._sent = False
        self._unacknowledged.clear()
        if self._done:
            return
        self._record.lost_connections += 1
        wait_s = full_jitter(self._losses, _RECONNECT_MIN_S, _RECONNECT_MAX_S, self._record.rng)
        self._losses += 1
        self._wait(wait_s, self.start)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        for packet in self._packets.feed(data):
            kind = mqtt.kind(packet)
            if kind == mqtt.PUBLISH:
                self._take_publish(packet)
            elif kind == light.PUBACK:
                self._take_puback(int.from_bytes(packet[2:4], "big"))
            elif kind == light.CONNACK:
                self._announce()
            elif kind == light.SUBACK:
                self._take_suback()

    def _announce(self) -> None:
        presence = Presence(online=True, boot="light", public_key=bytes(32), agent_version="light")
        topic = topics.PRESENCE.name(self._record.place.fleet, device=self._update.device)
        self._write(light.publish_packet(topic, frame.to_frame(presence), _PRESENCE_ID, retain=True))

    def _take_puback(self, packet_id: int) -> None:
        if packet_id == _PRESENCE_ID:
            fleet = self._record.place.fleet
            down = topics.DOWN.name(fleet, device=self._update.device)
            filters = [topics.COORDINATOR.name(fleet), topics.HEAD.name(fleet), down]
            self._write(light.subscribe_packet(filters, _SUBSCRIBE_ID))
        elif packet_id in self._unacknowledged:
            self._unacknowledged.discard(packet_id)
            if not self._unacknowledged and not self._done:
                self._await_receipt()

    def _take_suback(self) -> None:
        now = asyncio.get_running_loop().time()
        self._record.connected.setdefault(self._update.device, now)
        self._losses = 0
        self._ready = True
        self._turn.come_back(self._state)
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        """Send when it is this device's turn; while the coordinator is away it is nobody's."""
        if self._ready and not (self._sent or self._done) and self._state is not None and self._state.online:
            self._wait(self._turn.left_s, self._send)

    def _send(self) -> None:
        self._record.sent += 1
        self._sent = True
        self._unacknowledged.clear()
        self._publish(self._update.messages)

    def _send_again(self) -> None:
        self._sent = False
        self._wait_for_turn()

    def _publish(self, messages: Sequence[bytes]) -> None:
        fleet, device = self._record.place.fleet, self._update.device
        shards = self._state.shards if self._state else 1
        topic = topics.UPDATE.name(fleet, shard=topics.shard_of(device, shards), device=device)
        for message in messages:
            packet_id = _UPDATE_IDS[self._published % len(_UPDATE_IDS)]
            self._published += 1
            self._unacknowledged.add(packet_id)
            self._write(light.publish_packet(topic, message, packet_id))

    def _await_receipt(self) -> None:
        longest_s = min(_LONGEST_RECEIPT_WAIT_S, self._record.place.receipt_timeout_s * 2.0**self._attempt)
        self._attempt = min(self._attempt + 1, 10)
        self._wait(longest_s * float(self._record.rng.uniform(0.75, 1.0)), self._send_again)

    def _take_publish(self, packet: bytes) -> None:
        publish = mqtt.parsed_publish(packet, light.LEVEL)
        if publish.qos:
            self._write(mqtt.puback(publish.packet_id))
        if publish.topic.endswith("/coord"):
            before, self._state = self._state, self._record.opened_state(packet[publish.payload_at :])
            self._turn.hear(before, self._state)
            self._wait_for_turn()
        elif topics.DOWN.parse(publish.topic):
            self._take_down(packet[publish.payload_at :])

    def _take_down(self, sealed: bytes) -> None:
        digest = self._update.digest
        match _unchecked(sealed):
            case _ if self._done:
                pass
            case Receipt(digest=named, reason=Reason.UNKNOWN_DEVICE, retry_after_s=wait_s) if named == digest:
                self._wait(wait_s, self._send_again)
            case Receipt(digest=named) if named == digest:
                self._done = True
                self._stop_waiting()
                self._record.receipts[self._update.device] = sealed
                self._record.receipted[self._update.device] = asyncio.get_running_loop().time()
                self._on_receipt()
            case MissingChunks(digest=named, indexes=indexes) if named == digest:
                self._publish([self._update.messages[index] for index in indexes])
            case Resync():
                self._turn.come_back(self._state)
                self._send_again()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _write(self, packet: bytes) -> None:
        if self._transport:
            self._transport.write(packet)


def _unchecked(sealed: bytes) -> frame.Message:
    """The message inside, whoever signed it."""
    content = frame.strip_version(sealed, frame.MAX_MESSAGE_BYTES)
    packed, _ = frame.unpack_byte_strings(content, tuple[bytes, bytes])
    return frame.unpack_any(packed, DownMessage)
