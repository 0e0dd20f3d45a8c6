"""The line: what has arrived and waits to be judged, within bounds; of each device one update. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.intake import Arrived, Refused
from coordinator.settings import Journal
from fedtide.wire.ids import DeviceId
from fedtide.wire.link import Connection, Delivery


@dataclass(frozen=True)
class Waiting:
    """Something that arrived and waits to be judged."""

    arrival: Arrived | Refused
    delivery: Delivery
    connection: Connection

    @property
    def size_bytes(self) -> int:
        """Of the update, or of the message where it is none."""
        return len(self.arrival.raw if isinstance(self.arrival, Arrived) else self.delivery.payload)

    @property
    def device(self) -> DeviceId | None:
        """Whose update; None where it is none that could be verified."""
        return self.arrival.envelope.header.device if isinstance(self.arrival, Arrived) else None


class Line:
    """Who waits, in order.

    Args:
        bounds: of a group commit; beyond one, nothing more should be put.
    """

    def __init__(self, bounds: Journal) -> None:
        self._bounds = bounds
        self._waiting: list[Waiting] = []
        self._bytes = 0
        self._first: dict[DeviceId, Waiting] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether as much waits as goes into a batch."""
        return len(self._waiting) >= self._bounds.max_batch or self._bytes >= self._bounds.max_batch_bytes

    def put(self, waiting: Waiting) -> None:
        """Let it wait."""
        if waiting.device is not None:
            self._first.setdefault(waiting.device, waiting)
        self._waiting.append(waiting)
        self._bytes += waiting.size_bytes

    def first_of(self, device: DeviceId) -> Waiting | None:
        """The update of this device that waits, or is being judged."""
        return self._first.get(device)

    def next_part(self) -> list[Waiting]:
        """Take what goes into the next batch: at least one, in order."""
        part, size_bytes = list[Waiting](), 0
        for waiting in self._waiting[: self._bounds.max_batch]:
            size_bytes += waiting.size_bytes
            if part and size_bytes > self._bounds.max_batch_bytes:
                break
            part.append(waiting)
        del self._waiting[: len(part)]
        self._bytes -= sum(waiting.size_bytes for waiting in part)
        return part

    def leave(self, part: Sequence[Waiting]) -> None:
        """These were judged: the next updates of their devices may come."""
        for waiting in part:
            if waiting.device is not None and self._first.get(waiting.device) is waiting:
                del self._first[waiting.device]
