"""Writing a file so that a power cut leaves the old one or the new one, never half of it."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write beside the file, sync, rename over it, sync the directory.

    Args:
        path: the file.
        content: all of it.
        sync: False leaves the syncs out, for simulated devices whose disk need not survive anything.
    """
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if sync:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames, removals and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
