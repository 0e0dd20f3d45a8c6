"""A data source of the device owner's own: one class, named in agent.toml."""

import importlib
import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.data_sources.base import DataError, Reader, Source
from edge_agent.data_sources.fitting import Arrays, fitted
from edge_agent.dataset import Dataset
from fedtide.wire.plan import PlanManifest

_NAMED: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@runtime_checkable
class ExampleSource(Protocol):
    """What a class named in agent.toml provides. It is made once, with the ``[data.options]`` as arguments.

    Whatever it raises is told as a ``DataError``, and the agent tries again later. It is not called while a
    training runs.
    """

    def stamp(self) -> Hashable:
        """Anything that is equal to the last one if and only if ``examples`` would give the same."""

    def examples(self) -> "Examples":
        """All examples there are now."""


class Examples(msgspec.Struct, frozen=True, kw_only=True):
    """What an :class:`ExampleSource` gives.

    Attributes:
        inputs: one array, or a tuple with one for each input of the model, of shape ``(examples, ...)`` as
            the plan takes them, of any real dtype.
        targets: shape ``(examples, ...)``; None for a model that gives back its input.
        total: how many examples there ever were, these being the newest of them; None: these are all.
    """

    inputs: Any
    targets: Any = None
    total: int | None = None


class Custom(Source, frozen=True, tag="custom"):
    """Examples of a class of the owner's own, an :class:`ExampleSource`.

    Attributes:
        class_: ``package.module:ClassName``; the module is installed, or lies beside agent.toml.
        options: keyword arguments that the class is made with.
    """

    # Decoded as a path, because paths in settings are relative to the folder of agent.toml: its name says
    # which class, its parent where the module may lie.
    class_: Path = msgspec.field(name="class")
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if not _NAMED.fullmatch(self.class_.name):
            raise ValueError(f"class {self.class_.name!r} must be 'package.module:ClassName'")

    def opened(self) -> Reader:
        """Makes the class when it is first read from."""
        return _CustomReader(self)


class _CustomReader:
    """Reads from one object of the owner's class."""

    def __init__(self, settings: Custom) -> None:
        self._settings = settings
        self._name = settings.class_.name
        self._made: ExampleSource | None = None

    def load(self, manifest: PlanManifest) -> Dataset:
        """See :meth:`Reader.load`."""
        try:
            given = self._source().examples()
            return fitted(_arrays(given), manifest, may_be_empty=True)
        except Exception as error:
            raise DataError(f"{self._name}: {type(error).__name__}: {error}") from error

    def changed_since(self, stamp: Hashable) -> Hashable:
        """See :meth:`Reader.changed_since`."""
        try:
            now = self._source().stamp()
        except Exception as error:
            raise DataError(f"{self._name}: {type(error).__name__}: {error}") from error
        return None if now == stamp else now

    def _source(self) -> ExampleSource:
        if self._made is None:
            made = _found(self._settings.class_)(**self._settings.options)
            if not isinstance(made, ExampleSource):
                raise TypeError("the class needs the methods stamp() and examples()")
            self._made = made
        return self._made


def _found(named: Path) -> Any:
    """The class ``module:Class`` of this path's name; the module may lie in its parent.

    Raises:
        ImportError: there is no such module or class.
    """
    module_name, _, class_name = named.name.partition(":")
    folder = str(named.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that nothing installed is hidden by a file of the same name
    module = importlib.import_module(module_name)
    if not hasattr(module, class_name):
        raise ImportError(f"module {module_name!r} has no {class_name!r}")
    return getattr(module, class_name)


def _arrays(given: Any) -> Arrays:
    if not isinstance(given, Examples):
        raise TypeError(
            f"examples() gave {type(given).__name__}; it must give edge_agent.data_sources.Examples"
        )
    inputs = given.inputs if isinstance(given.inputs, tuple) else (given.inputs,)
    arrived = None
    if given.total is not None and inputs:
        count = len(inputs[0])
        if given.total < count:
            raise ValueError(f"total is {given.total}, and there are {count} examples")
        arrived = _last_of(given.total, count)
    copies = [np.array(each) for each in inputs]  # the class may go on writing into its own
    return Arrays(copies, None if given.targets is None else np.array(given.targets), arrived)


def _last_of(total: int, count: int) -> npt.NDArray[np.int64]:
    return np.arange(total - count, total, dtype=np.int64) + 1
