"""What every data source has in common."""

import csv
import zipfile
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Annotated, Final, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from edge_agent.dataset import Dataset
from fedtide.wire.plan import PlanManifest

T = TypeVar("T")

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=1024)]

# What numpy, zipfile and csv raise for files that are cut, damaged or something else altogether.
UNREADABLE: Final = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


class DataError(Exception):
    """Examples that cannot be read or do not fit the plan; the text says which and what is needed."""


class Reader(Protocol):
    """What reads a data source's examples, again and again."""

    def load(self, manifest: PlanManifest) -> Dataset:
        """Read all examples, with the plan's dtypes and shapes; bad ones are skipped and counted.

        Raises:
            DataError: they cannot be read, do not fit, or none is good.
        """

    def changed_since(self, stamp: Hashable) -> Hashable:
        """A stamp of what would be read now, if it is another than ``stamp``; None if nothing changed.

        Raises:
            DataError: there is nothing to read from.
        """


class Read(Protocol):
    """Runs what reads examples, which may take long; one after the other."""

    async def __call__(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, or raises."""


async def read_at_once(work: Callable[[], T]) -> T:
    """Read in the event loop, for examples that are in memory already."""
    return work()


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every ``[data]`` table may say.

    Attributes:
        min_examples: the device does not train before there are so many.
        min_new_examples: after a training, the device does not train again before so many have come.
    """

    min_examples: Count = 1
    min_new_examples: Annotated[int, Meta(ge=0)] = 0

    def opened(self) -> Reader:
        """What reads it; kept for as long as the agent runs."""
        raise NotImplementedError


class FileSource(Source, frozen=True):
    """A source that reads itself from files.

    Attributes:
        path: the file, or the folder.
    """

    path: Path

    def opened(self) -> Reader:
        """Nothing needs to be kept between readings."""
        return self

    def load(self, manifest: PlanManifest) -> Dataset:
        """See :meth:`Reader.load`."""
        try:
            return self._read(manifest)
        except UNREADABLE as error:
            raise DataError(f"{self.path}: {error}") from error

    def changed_since(self, stamp: Hashable) -> Hashable:
        """See :meth:`Reader.changed_since`."""
        try:
            now = self._stamp()
        except OSError as error:
            raise DataError(f"{self.path}: {error}") from error
        return None if now == stamp else now

    def _stamp(self) -> Hashable:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size

    def _read(self, manifest: PlanManifest) -> Dataset:
        raise NotImplementedError
