"""The disk: every file that must survive a power cut is written through here.

What is written is in the machine's memory until it is synced, and so is every new name, rename and removal
until the directory is synced. A power cut may keep, drop or tear each thing that was not synced, in any order
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). Tests bring a disk that does just that.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol


class Log(Protocol):
    """A file that only grows, kept open: one descriptor, so that no error of its writes goes unreported."""

    def append(self, content: bytes) -> None:
        """Write at the end. Raises ``OSError``; then some of it may be there."""

    def sync(self) -> None:
        """Make everything appended durable. Raises ``OSError``; then nobody knows how much of it is."""

    def close(self) -> None:
        """Close the file; what was not synced may still be lost."""


class Disk(Protocol):
    """What fedtide asks of a file system. Paths that are not there raise ``FileNotFoundError``."""

    def read(self, path: Path, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start``, or all to the end; fewer where the file ends first."""

    def size(self, path: Path) -> int:
        """Bytes in a file."""

    def names(self, directory: Path) -> list[str]:
        """Names in a directory, sorted; none where it does not exist."""

    def make_directory(self, path: Path) -> None:
        """Make it and its parents durably, where they are not there."""

    def write(self, path: Path, content: bytes) -> None:
        """Make or empty a file, write it and sync its content. Its name is durable once its directory is."""

    def open_log(self, path: Path) -> Log:
        """Open a file to append to; made where it is not there."""

    def truncate(self, path: Path, size_bytes: int) -> None:
        """Cut a file to its first bytes and sync that."""

    def replace(self, source: Path, target: Path) -> None:
        """Rename over what is there, in one step."""

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""

    def remove(self, path: Path) -> None:
        """Remove a name; one that is not there is fine."""

    def sync_directory(self, directory: Path) -> None:
        """Make renames, removals and new names in a directory durable."""


def write_durably(disk: Disk, path: Path, content: bytes) -> None:
    """Write beside the file, sync, rename over it, sync the directory: the old one or the new, never half.

    Raises:
        OSError: the disk is full or failed. The old file is still there.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        disk.write(temporary, content)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk should not stay full of what could not be finished
            disk.remove(temporary)
        raise
    disk.replace(temporary, path)
    disk.sync_directory(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have errors say of which file they are; those of a descriptor do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class _OsLog:
    """A descriptor that appends."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._sync = sync

    def append(self, content: bytes) -> None:
        """See ``Log.append``."""
        left = memoryview(content)
        with _named(self._path):
            while left:
                left = left[os.write(self._descriptor, left) :]

    def sync(self) -> None:
        """See ``Log.sync``."""
        if self._sync:
            with _named(self._path):
                os.fdatasync(self._descriptor)

    def close(self) -> None:
        """See ``Log.close``."""
        os.close(self._descriptor)


class OsDisk:
    """The operating system's.

    Args:
        sync: False leaves the syncs out, for simulated devices whose disk need not survive anything.
    """

    def __init__(self, *, sync: bool = True) -> None:
        self._sync = sync

    def read(self, path: Path, start: int = 0, length: int | None = None) -> bytes:
        """See ``Disk.read``."""
        with _named(path), path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def size(self, path: Path) -> int:
        """See ``Disk.size``."""
        return path.stat().st_size

    def names(self, directory: Path) -> list[str]:
        """See ``Disk.names``."""
        try:
            return sorted(entry.name for entry in directory.iterdir())
        except FileNotFoundError:
            return []

    def make_directory(self, path: Path) -> None:
        """See ``Disk.make_directory``."""
        if path.is_dir():
            return
        self.make_directory(path.parent)
        path.mkdir(exist_ok=True)
        self.sync_directory(path.parent)

    def write(self, path: Path, content: bytes) -> None:
        """See ``Disk.write``."""
        with _named(path), path.open("wb") as file:
            file.write(content)
            if self._sync:
                file.flush()
                os.fsync(file.fileno())

    def open_log(self, path: Path) -> Log:
        """See ``Disk.open_log``."""
        return _OsLog(path, sync=self._sync)

    def truncate(self, path: Path, size_bytes: int) -> None:
        """See ``Disk.truncate``."""
        with _named(path), path.open("r+b") as file:
            file.truncate(size_bytes)
            if self._sync:
                os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """See ``Disk.replace``."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """See ``Disk.link``."""
        target.hardlink_to(source)

    def remove(self, path: Path) -> None:
        """See ``Disk.remove``."""
        path.unlink(missing_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """See ``Disk.sync_directory``."""
        if not self._sync:
            return
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with _named(directory):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


OS_DISK: Final = OsDisk()
UNSYNCED_DISK: Final = OsDisk(sync=False)
