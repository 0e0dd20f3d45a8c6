"""Eligibility by examples: whether enough have come to train, for the first time or again."""

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.checked_file import body_of, checked
from edge_agent.dataset import Dataset
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.errors import MalformedFrame

log = logging.getLogger(__name__)

_MAGIC: Final = b"fte1"
_MARK: Final = struct.Struct("<q")

FIRST_LOOK_S: Final = 1.0
LONGEST_LOOK_S: Final = 30.0
"""While examples are awaited, the source is looked at after 1 s, 2 s, 4 s … and then every 30 s."""


@dataclass(frozen=True)
class Shortage:
    """Why a device does not train yet."""

    there: int
    needed: int
    new: bool

    def __str__(self) -> str:
        kind, purpose = ("new examples", "train again") if self.new else ("examples", "train")
        return f"{self.there} of the {self.needed} {kind} needed to {purpose}"


def shortage(
    dataset: Dataset, *, needed: int, needed_new: int = 0, trained_to: int | None = None
) -> Shortage | None:
    """What is missing before a device may train.

    Args:
        dataset: what there is.
        needed: examples without which no training makes sense.
        needed_new: examples that must have come since the last training.
        trained_to: the newest example of the last training; None: there was none.
    """
    if len(dataset) < needed:
        return Shortage(len(dataset), needed, new=False)
    new = len(dataset) if trained_to is None else dataset.new_since(trained_to)
    if new < needed_new:
        return Shortage(new, needed_new, new=True)
    return None


class TrainedTo:
    """The newest example that was trained on, on disk.

    Args:
        file: where it is kept.
        disk: where the file is.
    """

    def __init__(self, file: Path, disk: Disk = OS_DISK) -> None:
        self._file = file
        self._disk = disk
        self.mark = self._read()

    def note(self, mark: int) -> None:
        """Remember it over restarts; written only when it is another.

        Raises:
            OSError: the disk is full or failed; the mark is as it was.
        """
        if mark != self.mark:
            write_durably(self._disk, self._file, checked(_MAGIC, _MARK.pack(mark)))
            self.mark = mark

    def _read(self) -> int | None:
        try:
            body = body_of(_MAGIC, self._disk.read(self._file), _MARK.size)
        except FileNotFoundError:
            return None
        except (MalformedFrame, OSError) as error:
            log.warning(
                "%s is damaged, and all examples count as new: %s", self._file, error,
                extra={"event": "examples.unknown"},
            )  # fmt: skip
            return None
        return int(_MARK.unpack(body)[0])
