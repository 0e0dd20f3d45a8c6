"""The clock: two ways to tell the time, given to whatever waits or writes a date. Tests bring their own."""

import time
from typing import Final, Protocol


class Clock(Protocol):
    """What time it is."""

    def now(self) -> float:
        """Seconds of a clock that only grows; its zero means nothing. For every wait and every limit."""

    def wall(self) -> float:
        """Seconds since 1970, as far as this machine knows; it may jump. For people, never for a decision."""


class SystemClock:
    """The machine's."""

    def now(self) -> float:
        """See ``Clock.now``."""
        return time.monotonic()

    def wall(self) -> float:
        """See ``Clock.wall``."""
        return time.time()


SYSTEM_CLOCK: Final = SystemClock()
