"""Shares: how many messages each device may send before any more are dropped unread. Pure.

A token bucket per device: it holds ``burst_messages`` and fills by ``messages_per_s``. Those who are not in
the roster share one, so that memory is bounded by the roster.

Whoever can publish in a device's place (a broker without access rules) can empty its bucket. Whatever comes
first after a token then gets through: an honest message among f forged ones a second with probability
``messages_per_s`` / f. Its device sends it again for ever, so it is late, not lost.
"""

import math
from dataclasses import dataclass

from coordinator.settings import Share
from fedtide.wire.ids import DeviceId


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens at a moment.

    Attributes:
        tokens: messages that may come at once.
        moment: when there were so many.
    """

    tokens: float
    moment: float


def taken(bucket: Bucket | None, now: float, settings: Share) -> tuple[Bucket, bool]:
    """The bucket after a message, and whether that message may be read.

    Args:
        bucket: before; None: nothing ever came, it is full.
        now: seconds of a clock that only grows.
        settings: its size and how fast it fills.
    """
    size = float(settings.burst_messages)
    tokens = size
    if bucket is not None:
        tokens = min(size, bucket.tokens + (now - bucket.moment) * settings.messages_per_s)
    if tokens < 1.0:
        return Bucket(tokens, now), False
    return Bucket(tokens - 1.0, now), True


class Shares:
    """The buckets of a fleet.

    Args:
        settings: of every bucket.
        answer_every_s: how often a device that is over its share is told so.
    """

    def __init__(self, settings: Share, answer_every_s: float) -> None:
        self._settings = settings
        self._answer_every_s = answer_every_s
        self._buckets: dict[DeviceId | None, Bucket] = {}
        self._answered: dict[DeviceId, float] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, device: DeviceId | None, now: float) -> bool:
        """Whether one more message of this device may be read; None: of anybody who is not enrolled."""
        self._buckets[device], allowed = taken(self._buckets.get(device), now, self._settings)
        return allowed

    def answers(self, device: DeviceId | None, now: float) -> bool:
        """Whether a device whose message was just dropped shall be told so now. Strangers are not."""
        if device is None or now - self._answered.get(device, -math.inf) < self._answer_every_s:
            return False
        self._answered[device] = now
        return True

    def forget_idle(self, now: float) -> None:
        """Forget buckets that are full again, so that devices which are not heard of cost nothing."""
        full_s = self._settings.burst_messages / self._settings.messages_per_s
        for device in [name for name, bucket in self._buckets.items() if now - bucket.moment >= full_s]:
            del self._buckets[device]
        for name in [name for name, moment in self._answered.items() if now - moment >= self._answer_every_s]:
            del self._answered[name]
