"""What lies on a simulated disk's medium, what is on its way there, and what a power cut may make of both.

The rules are those of :mod:`simulated_disk`. Names are absolute paths as text.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

import numpy as np

_MOST_NAMES_COUNTED: Final = 8  # beyond so many unsynced names, crash states are drawn
_MOST_STALE: Final = 8


class Fate(Enum):
    """What becomes of the bytes of one page that were not synced."""

    KEPT = auto()
    ZEROS = auto()
    GARBAGE = auto()
    STALE = auto()


_FATES: Final = tuple(Fate)


@dataclass
class Change:
    """One change of a file's content since it was last durable.

    Attributes:
        size: the file's after it.
        appended: what it added; empty for a truncation.
        is_size_safe: a sync has come since.
        is_safe: a sync has come since, and none before it failed.
        forsaken: a sync failed since.
    """

    size: int
    appended: bytes = b""
    is_size_safe: bool = False
    is_safe: bool = False
    forsaken: bool = False

    def apply(self, content: bytearray) -> None:
        """Do it."""
        if self.appended:
            content += self.appended
        else:
            del content[self.size :]
            content.extend(bytes(self.size - len(content)))


@dataclass
class File:
    """A file under all its names: what is durable, and what has happened since."""

    durable: bytes = b""
    pending: list[Change] = field(default_factory=list)
    size: int = 0

    def content(self) -> bytes:
        """What a reader sees."""
        if not self.pending:
            return self.durable
        content = bytearray(self.durable)
        for change in self.pending:
            change.apply(content)
        return bytes(content)

    def append(self, content: bytes) -> None:
        """Add at the end."""
        if content:
            self.size += len(content)
            self.pending.append(Change(self.size, content))

    def resize(self, size: int) -> None:
        """Cut off, or fill with zeros."""
        if size != self.size or self.pending:
            self.size = size
            self.pending.append(Change(size))

    def sync(self) -> None:
        """All of it is durable now, but for what an earlier sync failed to make so."""
        for change in self.pending:
            change.is_size_safe = True
            change.is_safe = change.is_safe or not change.forsaken
        if not self.unsafe_parts(len(self.pending)):
            self.durable, self.pending = self.content(), []

    def fail_to_sync(self) -> None:
        """What is not durable never will be."""
        for change in self.pending:
            change.forsaken = change.forsaken or not change.is_safe

    @property
    def least_changes(self) -> int:
        """How many changes of its size have been synced."""
        return max((index + 1 for index, each in enumerate(self.pending) if each.is_size_safe), default=0)

    def unsafe_parts(self, changes: int, torn: int = 0) -> list[tuple[int, int]]:
        """What was appended and is on no medium for certain, as (start, end).

        Args:
            changes: after so many of them.
            torn: and so many bytes of the next.
        """
        parts: list[tuple[int, int]] = []
        size = len(self.durable)
        for index, change in enumerate(self.pending[: changes + bool(torn)]):
            start, end = size, change.size if index < changes else size + torn
            size = end
            parts = [(first, min(last, end)) for first, last in parts if first < end]
            if change.appended and not change.is_safe:
                parts.append((start, end))
        return parts


class Directory:
    """Stands for a directory among the names."""


Node = File | Directory
Names = dict[str, Node]


@dataclass(frozen=True, eq=False)
class Naming:
    """One change of names in a directory: ``gone`` is taken away, then ``name`` leads to ``node``."""

    directory: str
    gone: str | None = None
    name: str | None = None
    node: Node | None = None

    def apply(self, names: Names) -> None:
        """Do it."""
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.name is not None and self.node is not None:
            names[self.name] = self.node


@dataclass(frozen=True)
class _Outcome:
    """What a cut leaves of one file.

    Attributes:
        changes: so many are whole.
        torn: so many bytes of the next one are there.
        fates: (start, end, fate) of what was not simply kept.
    """

    changes: int
    torn: int = 0
    fates: tuple[tuple[int, int, Fate], ...] = ()


@dataclass(frozen=True)
class _CrashState:
    """The names that a cut leaves, and what of each file that was not durable."""

    names: Names
    outcomes: dict[int, _Outcome]


class Medium:
    """Names and files: as a program sees them, and as they would be found after a power cut.

    Args:
        page_bytes: what the medium writes whole or not at all.

    Attributes:
        names: as they are seen.
    """

    def __init__(self, page_bytes: int) -> None:
        self.names: Names = {"/": Directory(), ".": Directory()}
        self._page_bytes = page_bytes
        self._durable_names = dict(self.names)
        self._namings: list[Naming] = []
        self._stale: deque[bytes] = deque(maxlen=_MOST_STALE)

    def change_names(self, naming: Naming) -> None:
        """Rename, make or remove; durable once the directory is synced."""
        naming.apply(self.names)
        self._namings.append(naming)

    def sync_names(self, directory: str) -> None:
        """Make the names in a directory durable."""
        for naming in self._namings:
            if naming.directory == directory:
                naming.apply(self._durable_names)
        self._namings = [naming for naming in self._namings if naming.directory != directory]

    def remember(self, node: Node) -> None:
        """What is overwritten or removed may turn up in pages that are used again."""
        if isinstance(node, File) and node.size:
            self._stale.append(node.content())

    def put(self, name: str, content: bytes) -> None:
        """Change what is durable, behind the program's back."""
        node = self.names.get(name)
        file = node if isinstance(node, File) else File()
        if node is None:
            self.names[name] = self._durable_names[name] = file
        file.durable, file.pending, file.size = content, [], len(content)

    def copy(self) -> "Medium":
        """The same, with all that is on its way."""
        files: dict[int, Node] = {}

        def copied(node: Node) -> Node:
            if isinstance(node, Directory):
                return node
            if id(node) not in files:
                files[id(node)] = File(node.durable, [replace(change) for change in node.pending], node.size)
            return files[id(node)]

        medium = Medium(self._page_bytes)
        medium._stale = self._stale.copy()
        medium.names = {name: copied(node) for name, node in self.names.items()}
        medium._durable_names = {name: copied(node) for name, node in self._durable_names.items()}
        medium._namings = [
            replace(naming, node=None if naming.node is None else copied(naming.node))
            for naming in self._namings
        ]
        return medium

    def crash_states(self, rng: np.random.Generator, most: int) -> Iterator["Medium"]:
        """See ``SimulatedDisk.crash_states``."""
        unsynced = len(self._namings)
        if unsynced <= _MOST_NAMES_COUNTED:
            found = list(itertools.islice(self._all_states(rng, most), most + 1))
            if len(found) <= most:
                yield from (self._after(state, rng) for state in found)
                return
        names = self._names_after((False,) * unsynced)
        outcomes = {id(file): _Outcome(file.least_changes) for file in _unsynced(names)}
        yield self._after(_CrashState(names, outcomes), rng)
        names = self._names_after((True,) * unsynced)
        outcomes = {id(file): _Outcome(len(file.pending)) for file in _unsynced(names)}
        yield self._after(_CrashState(names, outcomes), rng)
        for _ in range(most - 2):
            names = self._names_after(_drawn_names(unsynced, rng))
            outcomes = {id(file): self._drawn_outcome(file, rng) for file in _unsynced(names)}
            yield self._after(_CrashState(names, outcomes), rng)

    def _all_states(self, rng: np.random.Generator, most: int) -> Iterator[_CrashState]:
        """Every way to keep and drop what is not synced; of single bytes to tear at, some."""
        for kept in itertools.product((False, True), repeat=len(self._namings)):
            names = self._names_after(kept)
            files = _unsynced(names)
            ways = [list(itertools.islice(self._all_outcomes(file, rng), most + 1)) for file in files]
            for outcomes in itertools.product(*ways):
                yield _CrashState(names, dict(zip(map(id, files), outcomes, strict=True)))

    def _names_after(self, kept: Sequence[bool]) -> Names:
        names = dict(self._durable_names)
        is_missing_any = False
        for naming, is_kept in zip(self._namings, kept, strict=True):
            if is_kept:
                naming.apply(names)
            is_missing_any |= isinstance(naming.node, Directory) and not is_kept
        return (
            {name: node for name, node in names.items() if _leads_to(name, names)}
            if is_missing_any
            else names
        )

    def _all_outcomes(self, file: File, rng: np.random.Generator) -> Iterator[_Outcome]:
        for changes in range(file.least_changes, len(file.pending) + 1):
            for torn in self._tears(file, changes, rng):
                pages = self._unsafe_pages(file, changes, torn)
                for chosen in itertools.product(self._fates, repeat=len(pages)):
                    yield _outcome(changes, torn, pages, chosen)

    def _drawn_outcome(self, file: File, rng: np.random.Generator) -> _Outcome:
        changes = int(rng.integers(file.least_changes, len(file.pending) + 1))
        tears = self._tears(file, changes, rng)
        torn = tears[int(rng.integers(len(tears)))]
        pages = self._unsafe_pages(file, changes, torn)
        if not pages or rng.random() < 0.25:
            return _Outcome(changes, torn)
        fates = self._fates
        odds = rng.random()  # of a page that is not kept: from hardly any to nearly all
        chosen = [
            fates[int(rng.integers(1, len(fates)))] if rng.random() < odds else Fate.KEPT for _ in pages
        ]
        return _outcome(changes, torn, pages, chosen)

    @property
    def _fates(self) -> tuple[Fate, ...]:
        return _FATES if self._stale else _FATES[:-1]

    def _tears(self, file: File, changes: int, rng: np.random.Generator) -> list[int]:
        """After so many whole changes, where the next may be cut: nowhere, at pages, at some bytes."""
        if changes == len(file.pending) or len(file.pending[changes].appended) < 2:
            return [0]
        end, length = file.pending[changes].size, len(file.pending[changes].appended)
        start, size = end - length, self._page_bytes
        pages = range(start - start % size + size, end, size)
        somewhere = int(rng.integers(1, length))
        return sorted({0, 1, length - 1, somewhere, *(page - start for page in pages)})

    def _unsafe_pages(self, file: File, changes: int, torn: int) -> list[tuple[int, int]]:
        size = self._page_bytes
        return [
            (max(start, page), min(end, page + size))
            for start, end in file.unsafe_parts(changes, torn)
            for page in range(start - start % size, end, size)
        ]

    def _after(self, state: _CrashState, rng: np.random.Generator) -> "Medium":
        medium = Medium(self._page_bytes)
        medium._stale = self._stale.copy()
        files: dict[int, File] = {}
        for name, node in state.names.items():
            if isinstance(node, Directory):
                medium.names[name] = node
                continue
            if id(node) not in files:
                content = self._left_of(node, state.outcomes.get(id(node)), rng)
                files[id(node)] = File(content, [], len(content))
            medium.names[name] = files[id(node)]
        medium._durable_names = dict(medium.names)
        return medium

    def _left_of(self, file: File, outcome: _Outcome | None, rng: np.random.Generator) -> bytes:
        if outcome is None:
            return file.durable
        content = bytearray(file.durable)
        for change in file.pending[: outcome.changes]:
            change.apply(content)
        if outcome.torn:
            content += file.pending[outcome.changes].appended[: outcome.torn]
        for start, end, fate in outcome.fates:
            content[start:end] = self._bytes_of(fate, start, end, rng)
        return bytes(content)

    def _bytes_of(self, fate: Fate, start: int, end: int, rng: np.random.Generator) -> bytes:
        if fate is Fate.GARBAGE:
            return rng.bytes(end - start)
        if fate is Fate.STALE:
            stale = self._stale[int(rng.integers(len(self._stale)))]
            return stale[start:end].ljust(end - start, b"\0")
        return bytes(end - start)


def directory_of(name: str) -> str:
    """The directory that a name is in."""
    above, slash, _ = name.rpartition("/")
    return above or slash or "."


def _leads_to(name: str, names: Names) -> bool:
    """Whether every directory above a name is there."""
    while (above := directory_of(name)) != name:
        if not isinstance(names.get(above), Directory):
            return False
        name = above
    return True


def _unsynced(names: Names) -> list[File]:
    files = {id(node): node for node in names.values() if isinstance(node, File) and node.pending}
    return list(files.values())


def _outcome(changes: int, torn: int, pages: Sequence[tuple[int, int]], chosen: Sequence[Fate]) -> _Outcome:
    fates = tuple(
        (start, end, fate) for (start, end), fate in zip(pages, chosen, strict=True) if fate is not Fate.KEPT
    )
    return _Outcome(changes, torn, fates)


def _drawn_names(count: int, rng: np.random.Generator) -> list[bool]:
    """Half of the time in order, as with a file system's journal; else each by itself."""
    if rng.random() < 0.5:
        first = int(rng.integers(count + 1))
        return [index < first for index in range(count)]
    return [bool(kept) for kept in rng.random(count) < rng.random()]
