"""What the devices say of themselves: presence, training, evaluations, trouble.

For people. None of it is signed: the broker's access rules are what ties it to a device. No decision rests on
it, but for a release gate on the federated metric where the operator has asked for that one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.federated import FederatedEvaluations
from coordinator.marks import Mark
from coordinator.status import DeviceEvaluation, DeviceStatus, DeviceTrouble
from fedtide.wire import frame
from fedtide.wire.errors import UnsupportedVersion, WireError
from fedtide.wire.ids import DeviceId, ModelVersion
from fedtide.wire.messages import DeviceEvent, EvaluationEvent, Presence, TrainingEvent, Trouble
from fedtide.wire.signatures import PublicKey

_WORD: Final = re.compile(r"[a-z][a-z_]{0,30}(\.[a-z][a-z_]{0,30})?")
_OTHER: Final = "other"
PROTOCOL: Final = "protocol.unsupported"
"""The word for a device whose messages are in another version of the protocol than this build reads."""
_MOST_WORDS: Final = 32  # each becomes a time series of its own, so a device may not invent them for ever
_MOST_DETAIL: Final = 200


@dataclass
class FleetView:
    """The latest word of every enrolled device.

    Attributes:
        evaluations: what they found on the examples they hold out.
        presence: by device.
        events: the latest training event by device.
        troubles: the latest trouble of each device that has not trained since.
        trouble_counts: how many reports of trouble came, by their word.
        malformed: messages that were none of these, or cannot be true.
    """

    evaluations: FederatedEvaluations
    presence: dict[DeviceId, Presence] = field(default_factory=dict)
    events: dict[DeviceId, TrainingEvent] = field(default_factory=dict)
    troubles: dict[DeviceId, DeviceTrouble] = field(default_factory=dict)
    trouble_counts: Counter[str] = field(default_factory=Counter)
    malformed: int = 0

    @property
    def size(self) -> int:
        """Of how many devices something is kept, at least."""
        return max(len(self.presence), len(self.troubles))

    def note_presence(self, device: DeviceId, payload: bytes) -> Presence | None:
        """Take a message of the ``st`` topic; an old session's late will is ignored."""
        try:
            presence = frame.from_frame(payload, Presence)
        except UnsupportedVersion as error:
            self.malformed += 1
            self._note_trouble(device, Trouble(event=PROTOCOL, detail=f"its presence was {error}"))
            return None
        except WireError:
            self.malformed += 1
            return None
        known = self.presence.get(device)
        if known and known.online and not presence.online and known.boot != presence.boot:
            return None
        if (trouble := self.troubles.get(device)) is not None and trouble.event == PROTOCOL:
            del self.troubles[device]
        self.presence[device] = presence
        return presence

    def note_event(self, device: DeviceId, payload: bytes, newest: ModelVersion) -> None:
        """Take a message of the ``ev`` topic; ``newest`` is the newest version devices were offered."""
        try:
            event = frame.from_frame_any(payload, DeviceEvent)
        except WireError:
            self.malformed += 1
            return
        match event:
            case TrainingEvent() if math.isfinite(event.loss):
                self.events[device] = event
                self.troubles.pop(device, None)
            case EvaluationEvent() if self.evaluations.add(device, event, newest):
                pass
            case Trouble():
                self._note_trouble(device, event)
            case _:
                self.malformed += 1

    def _note_trouble(self, device: DeviceId, event: Trouble) -> None:
        word = event.event if _WORD.fullmatch(event.event) else _OTHER
        if word not in self.trouble_counts and len(self.trouble_counts) >= _MOST_WORDS:
            word = _OTHER
        self.trouble_counts[word] += 1
        # It ends up on terminals, which obey control characters.
        shown = event.detail[:_MOST_DETAIL]
        detail = "".join(character if character.isprintable() else " " for character in shown)
        self.troubles[device] = DeviceTrouble(event=word, detail=detail, version=event.version)

    def statuses(self, devices: Iterable[DeviceId], marks: dict[DeviceId, Mark]) -> tuple[DeviceStatus, ...]:
        """One row per device."""
        total_weight = sum(mark.weight for mark in marks.values()) or 1.0
        return tuple(self._status(device, marks.get(device), total_weight) for device in devices)

    def _status(self, device: DeviceId, mark: Mark | None, total_weight: float) -> DeviceStatus:
        presence = self.presence.get(device)
        event = self.events.get(device)
        found = self.evaluations.latest.get(device)
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
            evaluation=DeviceEvaluation(
                version=found.version, examples=found.num_examples, loss=found.loss, metric=found.metric
            )
            if found
            else None,
            trouble=self.troubles.get(device),
        )


def shown_key(presence: Presence) -> PublicKey | None:
    """The key a device shows, if it shows one."""
    try:
        return PublicKey(presence.public_key)
    except ValueError:
        return None
