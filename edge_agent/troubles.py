"""What can keep a device from training: what each failure is called, and which will not pass by itself.

A full disk passes when somebody makes room: the agent rests, and tries what was not done once more. Nothing
was lost, and each attempt writes a new file. After any other error of the disk nobody knows what is on it:
pages of a failed sync can still be read and are gone after a power cut (Rebello et al., "Can Applications
Recover from fsync Failures?", USENIX ATC 2020). So the agent reports it and ends, and the service starts it
again with nothing in memory but what can be read; what was not done, it does not rely on.
"""

import errno
from typing import Final

from edge_agent.data_sources import DataError
from edge_agent.local_update import TrainingDiverged
from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_runtime import MemoryLimitExceeded, StepDeadlineExceeded
from edge_agent.plan_session import StepFailed
from fedtide.wire.errors import UnknownCodec, UnsupportedVersion
from fedtide.wire.ids import ModelVersion
from fedtide.wire.link import PublishRefused
from fedtide.wire.messages import Trouble

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFull(Exception):
    """The disk, or this user's share of it, is full."""


class DiskFailed(Exception):
    """The disk did not do what it was asked; what is on it now is known after the next start."""


LASTING: Final = (
    PublishRefused,
    PlanRefused,
    DataError,
    TrainingDiverged,
    StepFailed,
    UnknownCodec,
    ValueError,
)
"""What will most likely be the same the next time; a person, or a newer head, has to change something."""
_EVENTS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (PublishRefused, "publish.refused"),
    (PlanRefused, "plan.refused"),
    (DataError, "data.unusable"),
    (TrainingDiverged, "training.diverged"),
    (StepDeadlineExceeded, "step.deadline"),
    (MemoryLimitExceeded, "step.memory"),
    (StepFailed, "step.failed"),
    (UnsupportedVersion, "protocol.unsupported"),
    (DiskFull, "disk.full"),
    (DiskFailed, "disk.failed"),
    (Exception, "training.failed"),
)
_MOST_DETAIL: Final = 200


def event_of(error: Exception) -> str:
    """What logs and reports call a failure: the first that fits."""
    return next(name for kind, name in _EVENTS if isinstance(error, kind))


def of_the_disk(error: OSError) -> DiskFull | DiskFailed:
    """What an error of the disk means to a person."""
    if error.errno in _NO_ROOM:
        return DiskFull(f"{error}; nothing is lost: make room on that disk, and the agent goes on by itself")
    return DiskFailed(
        f"{error}; the agent ends, and its service starts it again; if this comes again, replace the disk"
    )


def trouble(event: str, error: Exception, version: ModelVersion | None) -> Trouble:
    """A report of what went wrong, its text short enough for a table."""
    return Trouble(event=event, detail=str(error)[:_MOST_DETAIL], version=version)
