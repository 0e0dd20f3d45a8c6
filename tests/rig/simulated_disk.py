"""A disk in memory that keeps what a power cut may leave, and fails where a test says so.

    disk = SimulatedDisk()                  a fedtide.wire.disk.Disk; only "/" and "." exist
    disk.watch(callback)                    called with the Operation after each one that changed something
    disk.crash_states(rng, most=100)        disks that a power cut at this moment may leave
    disk.killed()                           the disk as kill -9 leaves it: all that was written, synced or not
    disk.fail(fault)                        fault(operation) gives the errno that it fails with, or None
    disk.operations                         how many there were: number n is the same one in every equal run
    disk.files(), disk.used_bytes           what is visible now
    disk.damage(path, content)              change what lies on the medium, behind the program's back

A power cut at a named operation: raise from the callback (``PowerCut`` is there for it; as a BaseException
nothing in the program catches it), then take ``crash_states``. Or take them inside the callback and go on:
one run then shows every moment. A crash state is a disk of its own, with everything on it durable.

What a cut may leave (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 3):

- What was synced is there: a file's content after its sync, a directory's names after the directory's.
- Each creation, rename, link and removal that was not synced is kept or dropped, independently of all others
  and of the content of the files; a rename is one step.
- Changes of one file's size are kept in their order, up to any of them; an append may be cut at any byte.
- In each page appended and not synced are the bytes written, zeros, garbage, or what another file had there.
- Content not synced when a file's sync failed stays so: it can be read, later syncs succeed, and a cut
  takes it all the same (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
- When a directory's sync fails with anything but a full disk, the file system can be read and no longer
  written to, as ext4, XFS and Btrfs do when their journal fails, until the machine starts again.

An append that fails leaves half of itself. A write that fails may leave the file empty or half of it.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from medium import Directory, File, Medium, Naming, directory_of

Kind = Literal[
    "read", "size", "names", "mkdir", "create", "empty", "open", "append", "truncate", "sync", "replace",
    "link", "remove", "syncdir",
]  # fmt: skip
CHANGES: Final = frozenset(
    {"mkdir", "create", "empty", "append", "truncate", "sync", "replace", "link", "remove", "syncdir"}
)
GROWS: Final = frozenset({"mkdir", "create", "append", "link", "replace"})
"""What a full disk refuses."""


class PowerCut(BaseException):
    """The power went away; no program catches it."""


@dataclass(frozen=True)
class Operation:
    """One thing asked of the disk.

    Attributes:
        index: its number, from 0.
        kind: what; ``write`` of the protocol is create or empty, append, sync, and ``make_directory`` is
            mkdir and syncdir for each directory that was not there.
        path: of what; the target of a rename or a link.
    """

    index: int
    kind: Kind
    path: Path


Fault = Callable[[Operation], int | None]


def at(index: int, number: int) -> Fault:
    """Exactly this operation fails with this errno."""
    return lambda operation: number if operation.index == index else None


def full(operation: Operation) -> int | None:
    """A full disk: everything that needs room fails."""
    return errno.ENOSPC if operation.kind in GROWS - {"replace"} else None


def broken(operation: Operation) -> int | None:
    """A disk that has become read-only after an error: it can be read and that is all."""
    return errno.EIO if operation.kind in CHANGES else None


class _SimulatedLog:
    def __init__(self, disk: "SimulatedDisk", file: File, path: Path) -> None:
        self._disk = disk
        self._file = file
        self._path = path
        self._closed = False

    def append(self, content: bytes) -> None:
        """See ``Log.append``."""
        self._check_open()
        self._disk._append(self._file, self._path, bytes(content))

    def sync(self) -> None:
        """See ``Log.sync``."""
        self._check_open()
        self._disk._sync(self._file, self._path)

    def close(self) -> None:
        """See ``Log.close``."""
        self._check_open()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class SimulatedDisk:
    """See the module.

    Args:
        page_bytes: what the medium writes whole or not at all.

    Attributes:
        operations: how many there were.
        is_read_only: whether a directory's sync has failed.
    """

    def __init__(self, *, page_bytes: int = 512, medium: Medium | None = None) -> None:
        self.operations = 0
        self._medium = medium or Medium(page_bytes)
        self.is_read_only = False
        self._fault: Fault | None = None
        self._watcher: Callable[[Operation], None] | None = None

    # What tests ask for.

    def watch(self, callback: Callable[[Operation], None] | None) -> None:
        """Have every operation that changed something told, right after it."""
        self._watcher = callback

    def fail(self, fault: Fault | None) -> None:
        """From here on, operations fail as this says."""
        self._fault = fault

    def killed(self) -> "SimulatedDisk":
        """What kill -9 leaves: everything written; what was not synced may still be lost to a power cut."""
        disk = SimulatedDisk(medium=self._medium.copy())
        disk.is_read_only = self.is_read_only
        return disk

    def crash_states(self, rng: np.random.Generator, most: int = 100) -> Iterator["SimulatedDisk"]:
        """Disks that a power cut now may leave: all of them if they are few, else ``most`` drawn ones.

        Where they are drawn, the first is what was synced and nothing else, the second everything written.
        """
        for medium in self._medium.crash_states(rng, most):
            yield SimulatedDisk(medium=medium)

    def files(self) -> dict[Path, bytes]:
        """Every file's content as a reader sees it."""
        return {
            Path(name): node.content() for name, node in self._medium.names.items() if isinstance(node, File)
        }

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, each once however many names it has."""
        files = {id(node): node for node in self._medium.names.values() if isinstance(node, File)}
        return sum(file.size for file in files.values())

    def damage(self, path: Path, content: bytes) -> None:
        """Put other content on the medium; names and operations are as they were."""
        self._medium.put(str(path), content)

    # The protocol.

    def read(self, path: Path, start: int = 0, length: int | None = None) -> bytes:
        """See ``Disk.read``."""
        self._begin("read", path)
        content = self._file(path).content()
        return content[start : None if length is None else start + length]

    def size(self, path: Path) -> int:
        """See ``Disk.size``."""
        self._begin("size", path)
        return self._file(path).size

    def names(self, directory: Path) -> list[str]:
        """See ``Disk.names``."""
        self._begin("names", directory)
        name = str(directory)
        if isinstance(self._medium.names.get(name), File):
            raise _error(errno.ENOTDIR, directory)
        start = name.rstrip("/") + "/"
        rest = (other[len(start) :] for other in self._medium.names if other.startswith(start))
        return sorted(each for each in rest if each and "/" not in each)

    def make_directory(self, path: Path) -> None:
        """See ``Disk.make_directory``."""
        if self._is_directory(path):
            return
        self.make_directory(path.parent)
        operation = self._begin("mkdir", path)
        if str(path) in self._medium.names:
            raise _error(errno.EEXIST, path)
        self._change_names(path, node=Directory())
        self._end(operation)
        self.sync_directory(path.parent)

    def write(self, path: Path, content: bytes) -> None:
        """See ``Disk.write``."""
        file = self._opened(path, empty=True)
        if content:
            self._append(file, path, bytes(content))
        self._sync(file, path)

    def open_log(self, path: Path) -> _SimulatedLog:
        """See ``Disk.open_log``."""
        return _SimulatedLog(self, self._opened(path), path)

    def truncate(self, path: Path, size_bytes: int) -> None:
        """See ``Disk.truncate``."""
        operation = self._begin("truncate", path)
        file = self._file(path)
        self._medium.remember(file)
        file.resize(size_bytes)
        self._end(operation)
        self._sync(file, path)

    def replace(self, source: Path, target: Path) -> None:
        """See ``Disk.replace``."""
        operation = self._begin("replace", target)
        file = self._file(source)
        _check_same_directory(source, target)
        over = self._medium.names.get(str(target))
        if isinstance(over, Directory):
            raise _error(errno.EISDIR, target)
        if over is not file:  # renaming a file onto another name of itself does nothing
            if over is not None:
                self._medium.remember(over)
            self._change_names(target, gone=source, node=file)
        self._end(operation)

    def link(self, source: Path, target: Path) -> None:
        """See ``Disk.link``."""
        operation = self._begin("link", target)
        file = self._file(source)
        _check_same_directory(source, target)
        if str(target) in self._medium.names:
            raise _error(errno.EEXIST, target)
        self._change_names(target, node=file)
        self._end(operation)

    def remove(self, path: Path) -> None:
        """See ``Disk.remove``."""
        operation = self._begin("remove", path)
        node = self._medium.names.get(str(path))
        if isinstance(node, Directory):
            raise _error(errno.EISDIR, path)
        if node is not None:
            self._medium.remember(node)
            self._change_names(None, gone=path)
        self._end(operation)

    def sync_directory(self, directory: Path) -> None:
        """See ``Disk.sync_directory``."""
        try:
            operation = self._begin("syncdir", directory)
        except OSError as error:
            self.is_read_only |= error.errno not in {errno.ENOSPC, errno.EDQUOT}
            raise
        if not self._is_directory(directory):
            raise _error(errno.ENOTDIR if str(directory) in self._medium.names else errno.ENOENT, directory)
        self._medium.sync_names(str(directory))
        self._end(operation)

    # How.

    def _begin(self, kind: Kind, path: Path) -> Operation:
        operation = Operation(self.operations, kind, path)
        self.operations += 1
        number = None if self._fault is None else self._fault(operation)
        if self.is_read_only and kind in CHANGES:
            number = errno.EROFS
        if number is not None:
            raise _error(number, path)
        return operation

    def _end(self, operation: Operation) -> None:
        if self._watcher is not None:
            self._watcher(operation)

    def _is_directory(self, path: Path) -> bool:
        return isinstance(self._medium.names.get(str(path)), Directory)

    def _file(self, path: Path) -> File:
        node = self._medium.names.get(str(path))
        if isinstance(node, File):
            return node
        raise _error(errno.EISDIR if node else errno.ENOENT, path)

    def _opened(self, path: Path, *, empty: bool = False) -> File:
        if str(path) in self._medium.names:
            operation = self._begin("empty" if empty else "open", path)
            file = self._file(path)
            if empty:
                self._medium.remember(file)
                file.resize(0)
                self._end(operation)
            return file
        operation = self._begin("create", path)
        if not self._is_directory(path.parent):
            raise _error(errno.ENOENT, path)
        file = File()
        self._change_names(path, node=file)
        self._end(operation)
        return file

    def _append(self, file: File, path: Path, content: bytes) -> None:
        try:
            operation = self._begin("append", path)
        except OSError:
            file.append(content[: len(content) // 2])
            raise
        file.append(content)
        self._end(operation)

    def _sync(self, file: File, path: Path) -> None:
        try:
            operation = self._begin("sync", path)
        except OSError:
            file.fail_to_sync()
            raise
        file.sync()
        self._end(operation)

    def _change_names(
        self, name: Path | None, *, gone: Path | None = None, node: File | Directory | None = None
    ) -> None:
        named, taken = (None if path is None else str(path) for path in (name, gone))
        self._medium.change_names(Naming(directory_of(named or taken or ""), taken, named, node))


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def _check_same_directory(source: Path, target: Path) -> None:
    if source.parent != target.parent:
        raise ValueError(f"{source} to {target}: names across directories are not simulated")
