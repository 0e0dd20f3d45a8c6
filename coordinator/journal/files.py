"""The files of a journal's directory.

{first:012d}.segment       records, from number ``first`` on: the log between two snapshots
{first:012d}.safetensors   the snapshot it begins with: state and ledger after record first − 1
end                        how much of the last segment was synced; a second witness, never synced itself
"""

from pathlib import Path
from typing import Final

from fedtide.wire.disk import Disk

_SEGMENT: Final = ".segment"
_SNAPSHOT: Final = ".safetensors"
_UNFINISHED: Final = ".new"


def segment_file(directory: Path, first: int) -> Path:
    """The segment whose first record has this number."""
    return directory / f"{first:012d}{_SEGMENT}"


def snapshot_file(directory: Path, first: int) -> Path:
    """The snapshot that the segment begins with."""
    return directory / f"{first:012d}{_SNAPSHOT}"


def end_file(directory: Path) -> Path:
    """Says how much of the last segment was synced."""
    return directory / "end"


def segments(disk: Disk, directory: Path) -> list[int]:
    """First records of the segments, oldest first."""
    return _numbers(disk, directory, _SEGMENT)


def snapshots(disk: Disk, directory: Path) -> list[int]:
    """Segments that have a snapshot file, oldest first."""
    return _numbers(disk, directory, _SNAPSHOT)


def unfinished(disk: Disk, directory: Path) -> list[Path]:
    """What was being written when the power went away."""
    return [directory / name for name in disk.names(directory) if name.endswith(_UNFINISHED)]


def _numbers(disk: Disk, directory: Path, ending: str) -> list[int]:
    stems = [name.removesuffix(ending) for name in disk.names(directory) if name.endswith(ending)]
    return sorted(int(stem) for stem in stems if stem.isdigit())
