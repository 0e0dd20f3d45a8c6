"""The disk: the operating system's and the simulated one do the same, and what must be synced is."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_disk import Operation, SimulatedDisk, at

from fedtide.wire.disk import OS_DISK, UNSYNCED_DISK, Disk, write_durably


@dataclass(frozen=True)
class Place:
    """A disk, and a directory on it."""

    disk: Disk
    directory: Path

    def __truediv__(self, name: str) -> Path:
        return self.directory / name


def simulated(directory: Path = Path("/state")) -> Place:
    disk = SimulatedDisk()
    disk.make_directory(directory)
    return Place(disk, directory)


@pytest.fixture(params=["operating system", "unsynced", "simulated"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "operating system":
            return Place(OS_DISK, tmp_path)
        case "unsynced":
            return Place(UNSYNCED_DISK, tmp_path)
        case _:
            return simulated()


def test_what_was_written_is_read_whole_and_in_parts(place: Place) -> None:
    disk, file = place.disk, place / "file"
    disk.write(file, b"longer than the next")
    disk.write(file, b"0123456789")
    assert disk.read(file) == b"0123456789"
    assert disk.read(file, 7) == b"789"
    assert disk.read(file, 2, 3) == b"234"
    assert disk.read(file, 8, 100) == b"89"
    assert disk.read(file, 100) == b""
    assert disk.size(file) == 10


def test_a_log_grows_and_goes_on_where_it_ended(place: Place) -> None:
    disk, file = place.disk, place / "log"
    log = disk.open_log(file)
    assert disk.size(file) == 0
    log.append(b"one")
    log.append(b"two")
    log.sync()
    log.close()
    again = disk.open_log(file)
    again.append(b"three")
    again.append(b"")
    again.close()
    assert disk.read(file) == b"onetwothree"
    with pytest.raises(OSError, match="Bad file descriptor"):
        again.append(b"four")


def test_a_log_appends_behind_what_was_cut_off(place: Place) -> None:
    disk, file = place.disk, place / "log"
    log = disk.open_log(file)
    log.append(b"0123456789")
    disk.truncate(file, 4)
    log.append(b"ab")
    log.close()
    assert disk.read(file) == b"0123ab"
    disk.truncate(file, 8)
    assert disk.read(file) == b"0123ab\0\0"


def test_a_log_follows_its_file_and_not_its_name(place: Place) -> None:
    disk = place.disk
    log = disk.open_log(place / "log")
    disk.replace(place / "log", place / "moved")
    log.append(b"here")
    disk.remove(place / "moved")
    log.append(b"nowhere")
    log.sync()
    log.close()
    assert disk.names(place.directory) == []


def test_a_rename_takes_the_place_of_what_was_there(place: Place) -> None:
    disk = place.disk
    disk.write(place / "old", b"old")
    disk.write(place / "new", b"new")
    disk.replace(place / "new", place / "old")
    disk.sync_directory(place.directory)
    assert disk.names(place.directory) == ["old"]
    assert disk.read(place / "old") == b"new"


def test_two_names_of_a_file_have_one_content_and_renaming_one_onto_the_other_does_nothing(
    place: Place,
) -> None:
    disk = place.disk
    disk.write(place / "a", b"both")
    disk.link(place / "a", place / "b")
    disk.truncate(place / "b", 2)
    assert disk.read(place / "a") == b"bo"
    disk.replace(place / "a", place / "b")
    assert disk.names(place.directory) == ["a", "b"]
    disk.remove(place / "a")
    assert disk.read(place / "b") == b"bo"
    with pytest.raises(FileExistsError):
        disk.link(place / "b", place / "b")


def test_removing_what_is_not_there_is_fine(place: Place) -> None:
    place.disk.remove(place / "nothing")
    place.disk.remove(place / "nowhere" / "nothing")


def test_directories_are_made_with_their_parents_and_listed_in_order(place: Place) -> None:
    disk = place.disk
    disk.make_directory(place / "b" / "c" / "d")
    disk.make_directory(place / "b" / "c")
    disk.write(place / "b" / "a", b"")
    assert disk.names(place.directory) == ["b"]
    assert disk.names(place / "b") == ["a", "c"]
    assert disk.names(place / "b" / "c" / "d") == []
    assert disk.names(place / "nowhere") == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda disk, directory: disk.read(directory / "nothing"),
        lambda disk, directory: disk.size(directory / "nothing"),
        lambda disk, directory: disk.truncate(directory / "nothing", 0),
        lambda disk, directory: disk.replace(directory / "nothing", directory / "file"),
        lambda disk, directory: disk.link(directory / "nothing", directory / "file"),
        lambda disk, directory: disk.write(directory / "nowhere" / "file", b""),
        lambda disk, directory: disk.open_log(directory / "nowhere" / "file"),
    ],
    ids=["read", "size", "truncate", "replace", "link", "write", "open_log"],
)
def test_what_is_not_there_raises_file_not_found(
    place: Place, operation: Callable[[Disk, Path], object]
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        operation(place.disk, place.directory)
    assert error.value.errno == errno.ENOENT
    assert place.disk.names(place.directory) == []


def test_an_error_of_a_descriptor_names_its_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as error:
        UNSYNCED_DISK.write(Path("/dev/full"), b"1")
    assert error.value.errno == errno.ENOSPC
    log = UNSYNCED_DISK.open_log(Path("/dev/full"))
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.append(b"1")
    log.close()


NAMES: Final = st.sampled_from(["a", "b", "c", "d/a", "d/b", "e"])
CONTENT: Final = st.binary(max_size=20)
ONE_NAME: Final = ("read", "size", "names", "remove", "open_log", "make_directory")
STEPS: Final = st.one_of(
    st.tuples(st.sampled_from(ONE_NAME), NAMES),
    st.tuples(st.just("write"), NAMES, CONTENT),
    st.tuples(st.just("truncate"), NAMES, st.integers(0, 30)),
    st.tuples(st.just("read"), NAMES, st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.just("append"), st.integers(0, 3), CONTENT),
    st.tuples(st.sampled_from(["replace", "link"]), NAMES, NAMES),
)


class Trace:
    """Does steps on a disk and notes what came of each."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._logs: list[object] = []

    def did(self, step: tuple[object, ...]) -> object:
        try:
            return self._do(*step)
        except OSError as error:
            return error.errno

    def _do(self, kind: str, *arguments: object) -> object:
        disk, values = self._place.disk, [self._place / v if isinstance(v, str) else v for v in arguments]
        if kind == "append":
            return self._logs[values[0]].append(values[1]) if values[0] < len(self._logs) else None
        if kind == "open_log":
            self._logs.append(disk.open_log(*values))
            return None
        if kind == "make_directory" and values[0].name != "d":
            return None
        if kind in {"replace", "link"} and values[0].parent != values[1].parent:
            return None
        return getattr(disk, kind)(*values)

    def end(self) -> None:
        for log in self._logs:
            log.sync()
            log.close()


@settings(max_examples=60)
@given(steps=st.lists(STEPS, max_size=40), into_a_directory=st.booleans())
def test_both_disks_do_the_same_whatever_is_asked_of_them(
    steps: list[tuple[object, ...]], *, into_a_directory: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        traces = [Trace(Place(UNSYNCED_DISK, Path(directory))), Trace(simulated())]
        if into_a_directory:
            steps = [("make_directory", "d"), *steps]
        for step in steps:
            real, imitated = (trace.did(step) for trace in traces)
            assert real == imitated, step
        for trace in traces:
            trace.end()


class TestWritingDurably:
    """The old content or the new, whenever the power fails."""

    def test_what_was_written_is_there_and_nothing_else(self, place: Place) -> None:
        write_durably(place.disk, place / "counter", b"old and longer")
        write_durably(place.disk, place / "counter", b"new")
        assert place.disk.read(place / "counter") == b"new"
        assert place.disk.names(place.directory) == ["counter"]

    def test_content_is_synced_then_renamed_then_the_directory_is_synced(self) -> None:
        place = simulated()
        done: list[tuple[str, str]] = []
        place.disk.watch(lambda operation: done.append((operation.kind, operation.path.name)))
        write_durably(place.disk, place / "counter", b"new")
        assert done == [
            ("create", "counter.new"),
            ("append", "counter.new"),
            ("sync", "counter.new"),
            ("replace", "counter"),
            ("syncdir", "state"),
        ]

    def test_every_power_cut_leaves_the_old_or_the_new_and_after_the_return_the_new(self, rng) -> None:
        place = simulated()
        write_durably(place.disk, place / "counter", b"old")
        found: set[bytes] = set()

        def look(_: Operation) -> None:
            found.update(disk.read(place / "counter") for disk in place.disk.crash_states(rng, 1000))

        place.disk.watch(look)
        write_durably(place.disk, place / "counter", b"new")
        assert found == {b"old", b"new"}
        left = {disk.read(place / "counter") for disk in place.disk.crash_states(rng)}
        assert left == {b"new"}

    def test_whatever_fails_the_old_or_the_new_is_there_and_the_next_write_goes_through(self, rng) -> None:
        failed = 0
        while True:
            place = simulated()
            write_durably(place.disk, place / "counter", b"old")
            place.disk.fail(at(place.disk.operations + failed, errno.EIO))
            try:
                write_durably(place.disk, place / "counter", b"new")
                break
            except OSError:
                pass
            for disk in (place.disk, *place.disk.crash_states(rng)):
                assert disk.read(place / "counter") in {b"old", b"new"}
            for disk in place.disk.crash_states(rng):
                write_durably(disk, place / "counter", b"newer")
                assert {each.read(place / "counter") for each in disk.crash_states(rng)} == {b"newer"}
            failed += 1
        assert failed == 5

    def test_a_full_disk_does_not_stay_full_of_what_could_not_be_finished(self) -> None:
        place = simulated()
        place.disk.fail(lambda operation: errno.ENOSPC if operation.kind == "append" else None)
        with pytest.raises(OSError, match="No space left"):
            write_durably(place.disk, place / "counter", b"new")
        assert place.disk.names(place.directory) == []
        assert place.disk.used_bytes == 0

    def test_the_operating_systems_disk_syncs_content_and_directory(
        self, tmp_path: Path, synced: list[str]
    ) -> None:
        write_durably(OS_DISK, tmp_path / "counter", b"new")
        assert synced == ["counter.new", tmp_path.name]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what the operating system was told to sync."""
    names: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def watched(descriptor: int, real: Callable[[int], None] = real) -> None:
            names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            real(descriptor)

        monkeypatch.setattr(os, name, watched)
    return names


def test_every_durable_operation_of_the_operating_systems_disk_syncs(
    tmp_path: Path, synced: list[str]
) -> None:
    OS_DISK.make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path.name, "a"]
    synced.clear()
    log = OS_DISK.open_log(tmp_path / "log")
    log.append(b"1234")
    assert synced == []
    log.sync()
    log.close()
    OS_DISK.truncate(tmp_path / "log", 2)
    OS_DISK.sync_directory(tmp_path)
    assert synced == ["log", "log", tmp_path.name]


def test_simulated_devices_sync_nothing(tmp_path: Path, synced: list[str]) -> None:
    UNSYNCED_DISK.make_directory(tmp_path / "a")
    write_durably(UNSYNCED_DISK, tmp_path / "file", b"new")
    UNSYNCED_DISK.truncate(tmp_path / "file", 2)
    log = UNSYNCED_DISK.open_log(tmp_path / "log")
    log.sync()
    log.close()
    assert synced == []
    assert UNSYNCED_DISK.read(tmp_path / "file") == b"ne"
