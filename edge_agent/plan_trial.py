"""The first update on a new plan is a trial, noted on disk: a plan cannot end the process again and again.

A plan may end the process: by a fault of onnxruntime, by memory that the system takes the process's life for,
or because one operator runs so long that the agent gives up (:mod:`edge_agent.plan_watchdog`). The service
starts again, finds the note, and after three such ends leaves the plan alone until there is another. After
the first whole update nothing more is written for this plan.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.checked_file import body_of, checked
from edge_agent.plan_guard import PlanRefused
from fedtide.wire import frame
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.errors import WireError
from fedtide.wire.frame import Message
from fedtide.wire.ids import PlanId

log = logging.getLogger(__name__)

_MAGIC: Final = b"ftt1"
MOST_TRIALS: Final = 3
"""A power cut during a trial looks the same as a crash; three in a row during the first update do not."""


class _Note(Message, frozen=True, kw_only=True):
    """What the file holds: how often the plan was begun without a whole update, and why it is refused."""

    plan: str
    begun: int = 0
    passed: bool = False
    refused: str = ""


class PlanTrial:
    """The note about the plan in use.

    Args:
        path: its file; the directory must be there.
        disk: where it is.
    """

    def __init__(self, path: Path, disk: Disk = OS_DISK) -> None:
        self._path = path
        self._disk = disk
        self._note = self._read()

    def check(self, plan: PlanId) -> None:
        """Before anything of the plan is run.

        Raises:
            PlanRefused: it ended the agent before.
        """
        note = self._note
        if note is None or note.plan != plan:
            return
        if note.refused:
            raise PlanRefused(self._refusal(note.refused))
        if note.begun >= MOST_TRIALS:
            raise PlanRefused(
                self._refusal(f"the agent ended {note.begun} times in a first update on this plan")
            )

    @contextmanager
    def update(self, plan: PlanId) -> Iterator[None]:
        """Around opening the plan and training on it. An error that the agent survives is no end of it.

        Raises:
            PlanRefused: as for :meth:`check`.
            OSError: the disk is full or failed; nothing was begun, or what was begun has ended well.
        """
        with self.evaluation(plan):
            yield
        if self._note is not None and not self._note.passed:
            self._write(msgspec.structs.replace(self._note, begun=0, passed=True))

    @contextmanager
    def evaluation(self, plan: PlanId) -> Iterator[None]:
        """Around evaluating the plan. To end well shows nothing of the training: that is still a trial.

        Raises:
            PlanRefused: as for :meth:`check`.
            OSError: as for :meth:`update`.
        """
        self.check(plan)
        note = self._note if self._note is not None and self._note.plan == plan else _Note(plan=plan)
        if note.passed:
            yield
            return
        self._write(msgspec.structs.replace(note, begun=note.begun + 1))
        try:
            yield
        finally:
            self._note = note  # the process is alive, whatever the disk says
            self._write(note)

    def refuse(self, plan: PlanId, reason: str) -> None:
        """Never run this plan again.

        Raises:
            OSError: the disk is full or failed.
        """
        self._write(_Note(plan=plan, refused=reason))

    def _refusal(self, reason: str) -> str:
        return (
            f"{reason}; the plan is not tried again. Another plan is, and so is this one once {self._path} "
            "is removed and the agent is started again"
        )

    def _write(self, note: _Note) -> None:
        write_durably(self._disk, self._path, checked(_MAGIC, frame.pack(note)))
        self._note = note

    def _read(self) -> _Note | None:
        try:
            return frame.unpack(body_of(_MAGIC, self._disk.read(self._path)), _Note)
        except FileNotFoundError:
            return None
        except (WireError, OSError) as error:
            log.warning("%s is damaged and left out: %s", self._path, error, extra={"event": "trial.damaged"})
            return None
