"""From a training's result to an update in the outbox, and from its receipt to what the next one carries.

What is written, and in which order, so that a power cut between any two writes neither loses nor repeats
anything: the counter; the feedback; the update. And with a receipt: that it was applied; then the outbox.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from edge_agent.feedback_file import FeedbackFile
from edge_agent.local_update import Author, sealed_update
from edge_agent.model_slots import InstalledModel
from edge_agent.outbox import Outbox
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import FEEDBACK_FILE, AgentSettings
from fedtide.wire.ids import Counter
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.signatures import SigningKey

log = logging.getLogger(__name__)

_OUTBOX: Final = "outbox"
_NOT_LOOKED_UP: Final = frozenset(
    {
        Reason.MALFORMED,
        Reason.TOO_LARGE,
        Reason.UNSUPPORTED_VERSION,
        Reason.WRONG_DEVICE,
        Reason.BAD_SIGNATURE,
        Reason.REPLAYED_COUNTER,
    }
)
"""Refused before the coordinator looked whether it had applied the update, or because it no longer knows.

A disk that was put back to an earlier state sends an update again after later ones; and whoever can publish
in a device's place can send a bad chunk that bears an update's digest.
"""


class Submission:
    """Makes updates and settles them.

    Args:
        settings: from ``agent.toml``.
        key: the device's.
        clock: seconds since 1970.
        sync: False for simulated devices.

    Attributes:
        outbox: where updates wait.
    """

    def __init__(
        self,
        settings: AgentSettings,
        key: SigningKey,
        clock: Callable[[], float] = time.time,
        *,
        sync: bool = True,
    ) -> None:
        self.outbox = Outbox(settings.state / _OUTBOX, clock, sync=sync)
        self._feedback = FeedbackFile(settings.state / FEEDBACK_FILE, sync=sync)
        self._author = Author(settings.device, key)
        self._clock = clock
        self._has_told = False
        self._drop_superseded()
        self._drop_unknown()

    def submit(self, model: InstalledModel, result: LocalResult) -> None:
        """Put what training on ``model`` gave into the outbox.

        Raises:
            TrainingDiverged: there is nothing to send; what is carried stays for the next update.
            UnknownCodec, ValueError: as ``local_update.requested``.
        """
        residual = self._feedback.residual(model.plan)
        counter = self.outbox.reserve()
        update = sealed_update(model, result, self._author, counter, self._clock(), residual=residual)
        self._tell_once_what_is_left_behind(update.share)
        if update.feedback is not None:
            self._feedback.keep(update.feedback)
        self.outbox.put(counter, update.envelope)

    def settle(self, counter: Counter, verdict: Verdict, reason: Reason | None = None) -> None:
        """An update's receipt has come. Applied before is applied; what was rejected is carried on.

        Where it may have been applied before nevertheless, it is not: nothing may be applied twice.
        """
        if verdict is not Verdict.REJECTED:
            self._feedback.settle(counter)
        elif reason in _NOT_LOOKED_UP:
            self._feedback.drop(counter)
        self.outbox.remove(counter)

    def has_feedback(self, counter: Counter) -> bool:
        """Whether this update's receipt decides on what the next one carries."""
        return counter == self._feedback.counter

    def _drop_superseded(self) -> None:
        """After a power cut: what was never sent and is in a later update's feedback must not be sent now."""
        last = self._feedback.counter
        while last is not None and (old := self.outbox.oldest()) is not None and old.counter < last:
            self.outbox.remove(old.counter)

    def _drop_unknown(self) -> None:
        """A damaged update may have been applied, and no receipt will say so."""
        last = self._feedback.counter
        if last is not None and self.outbox.was_damaged(last):
            self._feedback.drop(last)

    def _tell_once_what_is_left_behind(self, share: float) -> None:
        if share < 1 and not self._has_told:
            self._has_told = True
            log.info(
                "Updates have left out more than the next one should carry; %.0f %% of that is given up",
                100 * (1 - share),
                extra={"event": "feedback.shortened"},
            )
