"""Reading settings: TOML straight into typed, frozen objects. A typo is an error with its path."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

S = TypeVar("S")


class SettingsError(Exception):
    """A settings file that cannot be used; the text names the file and the place in it."""


def load(path: Path, kind: type[S]) -> S:
    """Read a TOML file as ``kind``. Relative paths in it are relative to the file's own directory.

    Raises:
        SettingsError: no such file, not TOML, an unknown key, a wrong type or a value out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    return parse(text, kind, str(path), path.parent)


def parse(text: str, kind: type[S], name: str, directory: Path) -> S:
    """The same for text already read; ``name`` is what errors call it.

    Raises:
        SettingsError: as :func:`load`.
    """
    try:
        return msgspec.convert(tomllib.loads(text), kind, strict=True, dec_hook=_paths_below(directory))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise SettingsError(f"{name}: {error}") from error


def _paths_below(directory: Path) -> Callable[[type, Any], Any]:
    def decode(kind: type, value: Any) -> Any:
        if issubclass(kind, Path) and isinstance(value, str):
            return directory / value
        raise TypeError(f"expected {kind.__name__}, got {value!r}")

    return decode
