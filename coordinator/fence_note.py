"""The note that a run leaves in the fleet's directory when another run of the coordinator has the fleet."""

from pathlib import Path
from typing import Final

from coordinator.fencing import Claim, Fenced
from fedtide.wire.disk import Disk, write_durably
from fedtide.wire.ids import Epoch

_NOTE: Final = "fenced"


def leave_note(directory: Path, fenced: Fenced, disk: Disk) -> None:
    """Make it durable that this directory's coordinator gave way, and to what epoch."""
    write_durably(disk, directory / _NOTE, f"{fenced.rival.epoch} {fenced.rival.run}\n".encode())


def noted(directory: Path, disk: Disk) -> Claim | None:
    """To whom the last run here gave way; None if it did not."""
    try:
        epoch, _, run = disk.read(directory / _NOTE).decode().strip().partition(" ")
        return Claim(Epoch(int(epoch)), run)
    except FileNotFoundError:
        return None
    except ValueError:  # damaged; that it is there says enough
        return Claim(Epoch(0), "")


def remove_note(directory: Path, disk: Disk) -> None:
    """A person decided that this directory is the one to go on with."""
    disk.remove(directory / _NOTE)
