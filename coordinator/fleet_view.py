"""What the devices say of themselves: presence and training events. For people; no decision rests on it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from coordinator.marks import Mark
from coordinator.status import DeviceStatus
from fedtide.wire import frame
from fedtide.wire.errors import WireError
from fedtide.wire.ids import DeviceId
from fedtide.wire.messages import Presence, TrainingEvent
from fedtide.wire.signatures import PublicKey

M = TypeVar("M", bound=frame.Message)


@dataclass
class FleetView:
    """The latest word of every enrolled device.

    Attributes:
        presence: by device.
        events: the latest training event by device.
        malformed: messages that were neither.
    """

    presence: dict[DeviceId, Presence] = field(default_factory=dict)
    events: dict[DeviceId, TrainingEvent] = field(default_factory=dict)
    malformed: int = 0

    def note_presence(self, device: DeviceId, payload: bytes) -> Presence | None:
        """Take a message of the ``st`` topic; an old session's late will is ignored."""
        presence = self._decode(payload, Presence)
        known = self.presence.get(device)
        if presence is None or (
            known and known.online and not presence.online and known.boot != presence.boot
        ):
            return None
        self.presence[device] = presence
        return presence

    def note_event(self, device: DeviceId, payload: bytes) -> None:
        """Take a message of the ``ev`` topic."""
        event = self._decode(payload, TrainingEvent)
        if event is not None:
            self.events[device] = event

    def statuses(self, devices: Iterable[DeviceId], marks: dict[DeviceId, Mark]) -> tuple[DeviceStatus, ...]:
        """One row per device."""
        total_weight = sum(mark.weight for mark in marks.values()) or 1.0
        return tuple(self._status(device, marks.get(device), total_weight) for device in devices)

    def _status(self, device: DeviceId, mark: Mark | None, total_weight: float) -> DeviceStatus:
        presence = self.presence.get(device)
        event = self.events.get(device)
        return DeviceStatus(
            device=device,
            online=presence is not None and presence.online,
            model_version=presence.model_version if presence else None,
            applied=mark.applied if mark else 0,
            rejected=mark.rejected if mark else 0,
            mean_staleness=mark.staleness / mark.applied if mark and mark.applied else 0.0,
            weight_share=mark.weight / total_weight if mark else 0.0,
            last_rejection=mark.reason.value if mark and mark.reason else None,
            loss=event.loss if event else None,
        )

    def _decode(self, payload: bytes, kind: type[M]) -> M | None:
        try:
            return frame.from_frame(payload, kind)
        except WireError:
            self.malformed += 1
            return None


def shown_key(presence: Presence) -> PublicKey | None:
    """The key a device shows, if it shows one."""
    try:
        return PublicKey(presence.public_key)
    except ValueError:
        return None
