"""What the coordinator has said of this device's updates: the newest of each kind, until it is read."""

import logging

from edge_agent.outbox import Pending
from fedtide.wire.messages import MissingChunks, Reason, Receipt, Verdict

log = logging.getLogger(__name__)

NO_MESSAGES: frozenset[bytes] = frozenset()


class Answers:
    """The newest receipt and the newest request for chunks.

    Attributes:
        resync: whether everything is to be sent again.
    """

    def __init__(self) -> None:
        self._receipt: Receipt | None = None
        self._missing: MissingChunks | None = None
        self.resync = False

    def forget(self) -> None:
        """What was answered to an earlier attempt does not count."""
        self._receipt = self._missing = None
        self.resync = False

    def hear_receipt(self, receipt: Receipt) -> None:
        """File a receipt."""
        if receipt.verdict is Verdict.REJECTED:
            log.warning(
                "Update %d was rejected: %s", receipt.counter, receipt.detail,
                extra={"event": "update.rejected", "reason": receipt.reason},
            )  # fmt: skip
        if receipt.reason is not Reason.TOO_MANY:  # which is of no update
            self._receipt = receipt

    def hear_missing(self, missing: MissingChunks) -> None:
        """File a request for chunks."""
        self._missing = missing

    def receipt(self, pending: Pending, messages: frozenset[bytes] = NO_MESSAGES) -> Receipt | None:
        """The receipt of an update.

        A message that could not be read as part of an update is refused by its own digest: what a chunk says
        of its envelope anybody can say. So that is a receipt of the update if the message was this device's.

        Args:
            pending: the update.
            messages: digests of the messages (``envelope.update_digest``) in which it was sent.
        """
        receipt = self._receipt
        if receipt is None:
            return None
        of_message = receipt.verdict is Verdict.REJECTED and receipt.digest in messages
        return receipt if of_message or _answers(receipt, pending) else None

    def missing(self, pending: Pending) -> MissingChunks | None:
        """What the coordinator lacks of an update."""
        missing = self._missing
        return missing if missing is not None and _answers(missing, pending) else None

    def forget_missing(self) -> None:
        """A request for chunks is met."""
        self._missing = None

    def has(self, pending: Pending, messages: frozenset[bytes] = NO_MESSAGES) -> bool:
        """Whether either is there."""
        return self.receipt(pending, messages) is not None or self.missing(pending) is not None


def _answers(message: Receipt | MissingChunks, pending: Pending) -> bool:
    return message.counter == pending.counter and message.digest == pending.digest
