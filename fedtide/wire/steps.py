"""The steps on which a promise depends, by name: tests end the process, or cut the power, at any of them.

The program only says that it has come to a step. Outside tests nobody listens.
"""

from collections.abc import Callable
from enum import StrEnum


class Step(StrEnum):
    """A place between two effects. The name says what has happened just before."""

    # Coordinator, in the order of one update's path.
    UPDATE_RECEIVED = "coordinator.received"
    UPDATE_VERIFIED = "coordinator.verified"
    UPDATES_FOLDED = "coordinator.folded"
    BATCH_APPENDED = "coordinator.appended"
    BATCH_SYNCED = "coordinator.synced"
    UPDATE_ACKNOWLEDGED = "coordinator.acknowledged"
    RECEIPT_SENT = "coordinator.receipt-sent"
    MODEL_SAVED = "coordinator.model-saved"
    VERSION_RECORDED = "coordinator.version-recorded"
    BLOBS_PUBLISHED = "coordinator.blobs-published"
    HEAD_PUBLISHED = "coordinator.head-published"
    SNAPSHOT_WRITTEN = "coordinator.snapshot-written"
    SNAPSHOT_RECORDED = "coordinator.snapshot-recorded"
    SEGMENT_REMOVED = "coordinator.segment-removed"

    # Device.
    TRAINED = "device.trained"
    COUNTER_RESERVED = "device.counter-reserved"
    FEEDBACK_KEPT = "device.feedback-kept"
    UPDATE_KEPT = "device.update-kept"
    CHUNK_SENT = "device.chunk-sent"
    UPDATE_SENT = "device.update-sent"
    RECEIPT_TAKEN = "device.receipt-taken"
    FEEDBACK_SETTLED = "device.feedback-settled"
    UPDATE_REMOVED = "device.update-removed"
    MODEL_FETCHED = "device.model-fetched"
    MODEL_INSTALLED = "device.model-installed"


Listener = Callable[[Step], None]

_listener: Listener | None = None


def reached(step: Step) -> None:
    """Say that this step has been reached."""
    if _listener is not None:
        _listener(step)


def listen(listener: Listener | None) -> None:
    """Have every step told to ``listener``, or to nobody."""
    global _listener  # noqa: PLW0603 - one process, one place to die at; an argument would go through everything
    _listener = listener
