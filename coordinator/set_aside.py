"""The watch over what is read: its note on disk, and the directory where poison is set aside for a person."""

import logging
import mmap
from pathlib import Path
from typing import Final

from coordinator.poison import MOST_ENDS, NAME_BYTES, NOTE_BYTES, NOTHING, note_of, suspects_after
from fedtide.wire.disk import UNSYNCED_DISK

log = logging.getLogger(__name__)

MOST_FILES: Final = 100
MOST_BYTES: Final = 64 << 20


class PoisonWatch:
    """Takes note of what is being read. See ``coordinator.poison.Watch``.

    The note is a file in memory that the kernel writes back: it is written thousands of times a second, and
    only has to outlive the process.

    Args:
        directory: the coordinator's state; the note is ``reading`` in it, poison goes to ``set-aside``.
    """

    def __init__(self, directory: Path) -> None:
        self._aside = directory / "set-aside"
        self._disk = UNSYNCED_DISK
        note = directory / "reading"
        self._disk.make_directory(directory)
        self._suspects = _suspects_of_earlier_runs(note)
        # A new file: nobody else can have this one mapped, or cut it short under us.
        new = note.with_name(note.name + ".new")
        self._disk.write(new, note_of(self._suspects))
        self._disk.replace(new, note)
        with note.open("r+b") as file:
            self._note = mmap.mmap(file.fileno(), NOTE_BYTES)
        self._reading = NOTHING

    def is_poison(self, name: bytes) -> bool:
        """See ``Watch.is_poison``."""
        return self._suspects.get(name, 0) >= MOST_ENDS

    def begins(self, name: bytes) -> None:
        """See ``Watch.begins``."""
        self._reading = self._note[:NAME_BYTES] = name

    def ends(self) -> None:
        """See ``Watch.ends``."""
        if self._suspects.pop(self._reading, None) is not None:
            self._note[:] = note_of(self._suspects)
        self._note[:NAME_BYTES] = NOTHING

    def set_aside(self, device: str, name: bytes, content: bytes, error: Exception | None) -> None:
        """See ``Watch.set_aside``. Beyond a number of files or bytes nothing more is kept, or told of."""
        path = self._aside / f"{device}-{name.hex()[:16]}"
        try:
            if not self._keep(path, content):
                return
        except OSError as failure:
            log.warning("%s cannot be written: %s", path, failure, extra={"event": "poison.not_kept"})
        cause = "it ended the coordinator twice" if error is None else f"{type(error).__name__}: {error}"
        log.error(
            "%d bytes of %s cannot be read and were set aside as %s: %s", len(content), device, path, cause,
            exc_info=error, extra={"event": "update.unreadable"},
        )  # fmt: skip

    def _keep(self, path: Path, content: bytes) -> bool:
        """Whether it is news, and there is room for it."""
        names = self._disk.names(self._aside)
        if path.name in names:
            return False
        held_bytes = sum(self._disk.size(self._aside / name) for name in names)
        if len(names) >= MOST_FILES or held_bytes + len(content) > MOST_BYTES:
            return False
        self._disk.make_directory(self._aside)
        self._disk.write(path, content)
        return True


def _suspects_of_earlier_runs(note: Path) -> dict[bytes, int]:
    try:
        suspects = suspects_after(UNSYNCED_DISK.read(note))
    except FileNotFoundError:
        return {}
    for name, ends in suspects.items():
        log.warning("The coordinator ended %d times in a row while it read %s", ends, name.hex(),
                    extra={"event": "poison.suspected"})  # fmt: skip
    return suspects
