"""A device's turn: when it may send what waits in its outbox, so that a fleet that is back comes one by one.

The coordinator says over how many seconds devices shall spread; each draws its own moment (pace steering:
Bonawitz et al., "Towards Federated Learning at Scale", MLSys 2019, section 2.3).
"""

from typing import Final

import numpy as np

from fedtide.wire.clock import Clock
from fedtide.wire.messages import CoordinatorState

_LONGEST_S: Final = 3600.0  # whatever the coordinator says


class Turn:
    """Draws the moment.

    Args:
        rng: draws.
        clock: tells the time.

    Attributes:
        moment: of the clock, from which on this device may send.
    """

    def __init__(self, rng: np.random.Generator, clock: Clock) -> None:
        self._rng = rng
        self._clock = clock
        self.moment = clock.now()

    @property
    def left_s(self) -> float:
        """Seconds until it is this device's turn; 0 when it is."""
        return max(0.0, self.moment - self._clock.now())

    def come_back(self, state: CoordinatorState | None) -> None:
        """This device is back, or asked for all it has: others may be at the same moment."""
        self.moment = self._drawn(state)

    def hear(self, before: CoordinatorState | None, state: CoordinatorState) -> None:
        """The coordinator says how it is: back itself, or over which time devices shall now spread."""
        back = before is None or not before.online or (before.epoch, before.run) != (state.epoch, state.run)
        if back:
            self.come_back(state)
        elif self.left_s:
            # Those that have not sent yet spread over the new time; later than drawn before nobody has to.
            self.moment = min(self.moment, self._drawn(state))

    def _drawn(self, state: CoordinatorState | None) -> float:
        spread_s = state.spread_s if state is not None else 0.0
        if not spread_s > 0.0:
            return self._clock.now()
        return self._clock.now() + float(self._rng.uniform(0.0, min(spread_s, _LONGEST_S)))
