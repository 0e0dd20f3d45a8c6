"""Pace: how far apart devices shall send, so that together they offer less than is sustained here. Pure.

A fleet that is back after a partition sends what it has at one moment, and a broker drops what it cannot
queue without a word. So devices are told a time over which to spread: the coordinator says only how long, and
each device draws its own moment (pace steering: Bonawitz et al., "Towards Federated Learning at Scale", MLSys
2019, section 2.3). A receipt's ``retry_after_s`` does the same for those that are in step.
"""

from dataclasses import dataclass
from typing import Final

from coordinator.settings import Pacing

_MEMORY: Final = 256  # updates; a batch weighs n / (n + 256) against everything before it
_FULL_BATCH: Final = 16  # half of what the broker sends us unacknowledged: more were waiting there
_SHORTEST_S: Final = 1e-6
_NEWS: Final = 2.0  # a spread that differs by less than this factor is not worth a message to everybody


@dataclass(frozen=True)
class Pace:
    """What is known of our own speed.

    Attributes:
        updates_per_s: sustained, as far as was measured.
    """

    updates_per_s: float


def at_first(settings: Pacing) -> Pace:
    """The pace before anything was measured."""
    return Pace(settings.at_first_per_s)


def after_batch(pace: Pace, updates: int, seconds: float, *, more: bool) -> Pace:
    """The pace once a batch was judged, committed and answered.

    A group commit costs an fsync however little is in it. So a batch that nobody waited behind tells only
    what is sustained at least, and can only raise the pace.

    Args:
        pace: before.
        updates: in the batch.
        seconds: it took, from the first judgement to the last receipt.
        more: whether others were waiting when it was done.
    """
    measured = updates / max(seconds, _SHORTEST_S)
    if measured < pace.updates_per_s and not (more or updates >= _FULL_BATCH):
        return pace
    weight = updates / (updates + _MEMORY)
    return Pace(pace.updates_per_s + weight * (measured - pace.updates_per_s))


def spread_s(pace: Pace, devices: int, settings: Pacing) -> float:
    """Seconds over which so many devices shall spread what they send; 0 where they may come at once."""
    beyond = devices - settings.at_once
    if beyond <= 0:
        return 0.0
    sustained = min(max(pace.updates_per_s, settings.least_per_s), settings.most_per_s)
    return min(beyond / (settings.share * sustained), settings.longest_s)


def is_news(announced_s: float, now_s: float) -> bool:
    """Whether devices must be told the new spread: they can make do with one that is nearly right."""
    low, high = sorted((announced_s, now_s))
    return high > _NEWS * low


def jittered_s(wait_s: float, digest: bytes) -> float:
    """``wait_s`` times 0.5 to 1.5, by the digest of the update that is answered; the mean stays ``wait_s``.

    Without it devices that were answered in one batch would come again in one.
    """
    return wait_s * (0.5 + int.from_bytes(digest[:4], "little") / 2**32)


class Pacer:
    """The pace of one coordinator, and what it tells the devices.

    Args:
        settings: the bounds.

    Attributes:
        pace: as measured so far.
        spread_s: what devices that come back together were told last.
    """

    def __init__(self, settings: Pacing) -> None:
        self._settings = settings
        self._rest_s = 0.0
        self.pace = at_first(settings)
        self.spread_s = 0.0

    def note_batch(self, updates: int, seconds: float, *, more: bool) -> None:
        """See :func:`after_batch`."""
        self.pace = after_batch(self.pace, updates, seconds, more=more)

    def look(self, enrolled: int, online: int) -> bool:
        """Reckon anew; whether :attr:`spread_s` is another one now, and the devices must be told.

        Args:
            enrolled: devices that may come back at once. After a partition the broker calls all of them
                offline, so who is online says nothing about it.
            online: devices that are there and send again and again.
        """
        self._rest_s = spread_s(self.pace, online, self._settings)
        spread = spread_s(self.pace, enrolled, self._settings)
        if not is_news(self.spread_s, spread):
            return False
        self.spread_s = spread
        return True

    def rest_s(self, digest: bytes) -> float:
        """Seconds that the sender of this update shall wait before its next one."""
        return jittered_s(self._rest_s, digest)
