"""What can be wrong with a journal or the disk below it, in words that say what to do."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """A place in the journal's files that is not as it was written.

    Attributes:
        file: which.
        offset: first byte that cannot be trusted.
        sequence: number of the record there; None where the place is none.
        what: what is wrong.
    """

    file: Path
    offset: int
    sequence: int | None
    what: str

    def __str__(self) -> str:
        record = "" if self.sequence is None else f", record {self.sequence}"
        return f"{self.file}, byte {self.offset}{record}: {self.what}"


class JournalDamaged(Exception):
    """The journal cannot be used; the text says what is wrong and what would help.

    Attributes:
        damage: where, if it is a place in a file.
    """

    def __init__(self, problem: str | Damage) -> None:
        if isinstance(problem, Damage):
            super().__init__(
                f"{problem}. See all of it with: fedtide journal verify; then: fedtide journal repair"
            )
        else:
            super().__init__(problem)
        self.damage = problem if isinstance(problem, Damage) else None


class StorageFailed(Exception):
    """The disk is full or failed. Nothing that was not durable before has been acknowledged."""


@contextlib.contextmanager
def storing(path: Path, what: str, safe: str = "Nothing was lost") -> Iterator[None]:
    """Name the file and the remedy where the disk fails.

    Args:
        path: what is written.
        what: doing what, for example ``"appending 512 bytes"``.
        safe: what is not affected, without a full stop.

    Raises:
        StorageFailed: instead of ``OSError``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageFailed(
            f"{path}: {what} failed: {reason}. {safe}: whatever a device has a receipt for is durable. "
            "Make room on this disk, or replace it if it fails, then start the coordinator again"
        ) from error
