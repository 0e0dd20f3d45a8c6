import os
from pathlib import Path

import pytest

from fedtide.wire.durable import write_durably


class Power:
    """Lets every fsync through until it is cut, and notes what was synced while which content was there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Path) -> None:
        self.synced: list[tuple[str, bytes | None]] = []
        self.cut_after: int | None = None
        self._watched = watched
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if len(self.synced) == self.cut_after:
            raise OSError("no power")
        self._fsync(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        self.synced.append((name, self._watched.read_bytes() if self._watched.exists() else None))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "counter"


def test_what_was_written_is_there_and_nothing_else(file: Path) -> None:
    write_durably(file, b"old and longer")
    write_durably(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]


def test_the_content_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(b"old")
    power = Power(monkeypatch, file)
    write_durably(file, b"new")
    assert power.synced == [("counter.new", b"old"), (file.parent.name, b"new")]


def test_a_power_cut_before_the_rename_leaves_the_old_file_and_does_not_matter_later(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_durably(file, b"old")
    power = Power(monkeypatch, file)
    power.cut_after = 0
    with pytest.raises(OSError, match="no power"):
        write_durably(file, b"new")
    assert file.read_bytes() == b"old"
    power.cut_after = None
    write_durably(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert list(file.parent.iterdir()) == [file]


def test_simulated_devices_sync_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    power = Power(monkeypatch, file)
    write_durably(file, b"new", sync=False)
    assert file.read_bytes() == b"new"
    assert power.synced == []
