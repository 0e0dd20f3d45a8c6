"""From a training's result to an update in the outbox, and from its receipt to what the next one carries.

What is written, and in which order, so that a power cut between any two writes neither loses nor repeats
anything: the counter; the feedback; the update. And with a receipt: that it was applied; then the outbox.

Where the disk does not take one of these, the rest waits in memory and is done before anything else: the
update as it was made, since another training on the same version would be carried beside it; and the
receipt, since without it the update would be sent again.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.feedback_file import FeedbackFile
from edge_agent.local_update import Author, LocalUpdate, sealed_update
from edge_agent.model_slots import InstalledModel
from edge_agent.outbox import Outbox
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import FEEDBACK_FILE, AgentSettings
from fedtide.wire.disk import OS_DISK, Disk
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
        Reason.UNREADABLE,
    }
)
"""Refused before the coordinator looked whether it had applied the update, or because it no longer knows.

A disk that was put back to an earlier state sends an update again after later ones; and whoever can publish
in a device's place can send a bad chunk that bears an update's digest.
"""


@dataclass(frozen=True)
class _Settlement:
    """What a receipt says of an update."""

    counter: Counter
    verdict: Verdict
    reason: Reason | None


@dataclass(frozen=True)
class _Made:
    """An update that is to be in the outbox."""

    counter: Counter
    update: LocalUpdate


class Submission:
    """Makes updates and settles them.

    Args:
        settings: from ``agent.toml``.
        key: the device's.
        clock: seconds since 1970.
        disk: where the files are.

    Attributes:
        outbox: where updates wait.

    Raises:
        OSError: the directory cannot be listed or written to. A file that cannot be read is a damaged one.
    """

    def __init__(
        self,
        settings: AgentSettings,
        key: SigningKey,
        clock: Callable[[], float] = time.time,
        disk: Disk = OS_DISK,
    ) -> None:
        self.outbox = Outbox(settings.state / _OUTBOX, clock, disk)
        self._feedback = FeedbackFile(settings.state / FEEDBACK_FILE, disk)
        self._author = Author(settings.device, key)
        self._clock = clock
        self._has_told = False
        self._settlement: _Settlement | None = None
        self._made: _Made | None = None
        self._drop_superseded()
        self._drop_unknown()

    def submit(self, model: InstalledModel, result: LocalResult) -> None:
        """Put what training on ``model`` gave into the outbox: :meth:`make`, then :meth:`finish`."""
        self.make(model, result)
        self.finish()

    def make(self, model: InstalledModel, result: LocalResult) -> None:
        """Make an update of what training on ``model`` gave; :meth:`finish` puts it into the outbox.

        Raises:
            TrainingDiverged: there is nothing to send; what is carried stays for the next update.
            UnknownCodec, ValueError: as ``local_update.requested``.
            OSError: the disk is full or failed; there is no update.
        """
        self.finish()
        residual = self._feedback.residual(model.plan)
        counter = self.outbox.reserve()
        update = sealed_update(model, result, self._author, counter, self._clock(), residual=residual)
        self._tell_once_what_is_left_behind(update.share)
        self._made = _Made(counter, update)

    def settle(self, counter: Counter, verdict: Verdict, reason: Reason | None = None) -> None:
        """An update's receipt has come. Applied before is applied; what was rejected is carried on.

        Where it may have been applied before nevertheless, it is not: nothing may be applied twice.

        Raises:
            OSError: the disk is full or failed; :meth:`finish` does it.
        """
        self._settlement = _Settlement(counter, verdict, reason)
        self.finish()

    def finish(self) -> None:
        """Do what the disk did not take before; to be called before anything else is sent or trained.

        Raises:
            OSError: it still does not.
        """
        if self._settlement is not None:
            self._file_receipt(self._settlement)
            self._settlement = None
        if self._made is not None:
            if self._made.update.feedback is not None:
                self._feedback.keep(self._made.update.feedback)
            self.outbox.put(self._made.counter, self._made.update.envelope)
            self._made = None

    def _file_receipt(self, receipt: _Settlement) -> None:
        if receipt.verdict is not Verdict.REJECTED:
            self._feedback.settle(receipt.counter)
        elif receipt.reason in _NOT_LOOKED_UP:
            self._feedback.drop(receipt.counter)
        self.outbox.remove(receipt.counter)

    def has_feedback(self, counter: Counter) -> bool:
        """Whether this update's receipt decides on what the next one carries."""
        return counter == self._feedback.counter

    def _drop_superseded(self) -> None:
        """After a power cut: what was never sent and is in a later update's feedback must not be sent now."""
        last = self._feedback.counter
        if last is not None:
            self.outbox.supersede_before(last)
            self.outbox.go_above(last)

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
