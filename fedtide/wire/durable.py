"""Writing a file so that a power cut leaves the old one or the new one, never half of it."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write beside the file, sync, rename over it, sync the directory."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames, removals and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
