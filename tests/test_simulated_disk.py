"""The simulated disk: what a power cut may leave of it, counted by hand."""

import errno
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from simulated_disk import Operation, PowerCut, SimulatedDisk, at, broken, full

WORK: Final = Path("/state")
FILE: Final = WORK / "file"
OTHER: Final = WORK / "other"
LOG: Final = WORK / "log"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def disk() -> SimulatedDisk:
    made = SimulatedDisk(page_bytes=4)
    made.make_directory(WORK)
    return made


def contents(disk: SimulatedDisk) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((path.name, content) for path, content in disk.files().items()))


def left(
    disk: SimulatedDisk, rng: np.random.Generator, most: int = 1000
) -> set[tuple[tuple[str, bytes], ...]]:
    return {contents(state) for state in disk.crash_states(rng, most)}


def kept_file(disk: SimulatedDisk, content: bytes) -> None:
    disk.write(FILE, content)
    disk.sync_directory(WORK)


def test_what_was_synced_is_all_there_is(disk: SimulatedDisk, rng: np.random.Generator) -> None:
    kept_file(disk, b"1234")
    states = list(disk.crash_states(rng))
    assert [contents(state) for state in states] == [(("file", b"1234"),)]
    assert states[0].names(WORK) == ["file"]


def test_a_name_lives_or_dies_with_its_directory_whatever_of_its_content_was_synced(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    disk.write(FILE, b"1234")
    assert left(disk, rng) == {(), (("file", b"1234"),)}


def test_a_directory_that_was_not_synced_takes_everything_in_it_along(rng: np.random.Generator) -> None:
    disk = SimulatedDisk()
    disk.fail(lambda operation: errno.ENOSPC if operation.kind == "syncdir" else None)
    with pytest.raises(OSError, match="/"):
        disk.make_directory(WORK)
    disk.fail(None)
    disk.write(FILE, b"1234")
    disk.sync_directory(WORK)
    assert left(disk, rng) == {(), (("file", b"1234"),)}


def test_names_are_kept_and_dropped_each_by_itself(disk: SimulatedDisk, rng: np.random.Generator) -> None:
    kept_file(disk, b"old")
    disk.write(OTHER, b"new")
    disk.sync_directory(WORK)
    disk.replace(OTHER, FILE)
    disk.link(FILE, LOG)
    old, new, linked = ("file", b"old"), ("file", b"new"), ("log", b"new")
    assert left(disk, rng) == {
        (old, ("other", b"new")),
        (new,),
        (old, linked, ("other", b"new")),
        (new, linked),
    }
    disk.remove(FILE)
    assert (linked,) in left(disk, rng)
    disk.sync_directory(WORK)
    assert left(disk, rng) == {(linked,)}


def test_an_append_is_cut_at_any_byte_and_its_pages_are_kept_or_zeros_or_garbage(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    log = disk.open_log(LOG)
    disk.sync_directory(WORK)
    log.append(b"ab")
    log.sync()
    log.append(b"cdefgh")  # two bytes of a page that is there, a page of its own
    found = {dict(state)["log"] for state in left(disk, rng)}
    assert all(content.startswith(b"ab") for content in found)
    assert {b"ab", b"abc", b"abcdefg", b"abcdefgh"} <= found
    assert {b"ab\0\0efgh", b"abcd\0\0\0\0", b"ab\0\0\0\0\0\0", b"ab\0"} <= found
    pages = {(content[2:4], content[4:]) for content in found if len(content) == 8}
    strange = [part for each in pages for part in each if part not in {b"cd", b"efgh", b"\0\0", bytes(4)}]
    assert len(pages) == 9  # three fates of each page
    assert strange
    log.sync()
    assert left(disk, rng) == {(("log", b"abcdefgh"),)}


def test_appends_are_kept_in_their_order(disk: SimulatedDisk, rng: np.random.Generator) -> None:
    log = disk.open_log(LOG)
    disk.sync_directory(WORK)
    log.append(b"1234")
    log.append(b"5678")
    whole = {content for state in left(disk, rng) if set(content := dict(state)["log"]) <= set(b"12345678")}
    assert {b"", b"1234", b"12345678"} <= whole
    assert all(b"12345678".startswith(content) for content in whole)


def test_a_file_that_is_written_over_may_be_old_or_empty_or_new_or_neither(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    kept_file(disk, b"old!")
    found: set[bytes] = set()
    disk.watch(lambda _: found.update(dict(state)["file"] for state in left(disk, rng)))
    disk.write(FILE, b"new!")
    assert {b"old!", b"", b"n", b"new", b"new!", bytes(4)} <= found
    assert left(disk, rng) == {(("file", b"new!"),)}


def test_a_truncation_is_there_or_not_until_it_is_synced(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    kept_file(disk, b"12345678")
    moments = []
    disk.watch(lambda operation: moments.append((operation.kind, left(disk, rng))))
    disk.truncate(FILE, 3)
    assert moments == [
        ("truncate", {(("file", b"12345678"),), (("file", b"123"),)}),
        ("sync", {(("file", b"123"),)}),
    ]


def test_pages_used_again_may_show_what_was_there_before(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    kept_file(disk, b"secret")
    disk.remove(FILE)
    disk.sync_directory(WORK)
    log = disk.open_log(LOG)
    disk.sync_directory(WORK)
    log.append(b"public")
    assert b"secret" in {dict(state)["log"] for state in left(disk, rng)}


def test_many_unsynced_changes_are_drawn_and_the_extremes_come_first(rng: np.random.Generator) -> None:
    disk = SimulatedDisk(page_bytes=4)
    disk.make_directory(WORK)
    for number in range(10):
        disk.open_log(WORK / str(number)).append(b"0123456789")
    states = list(disk.crash_states(rng, 50))
    assert len(states) == 50
    assert states[0].files() == {}
    assert states[1].files() == disk.files()
    assert len({contents(state) for state in states}) > 40


def test_the_same_seed_draws_the_same_states(disk: SimulatedDisk) -> None:
    for number in range(10):
        disk.open_log(WORK / str(number)).append(b"0123456789")
    drawn = [[contents(state) for state in disk.crash_states(np.random.default_rng(7), 20)] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_crash_state_is_a_disk_of_its_own(disk: SimulatedDisk, rng: np.random.Generator) -> None:
    kept_file(disk, b"1234")
    disk.link(FILE, OTHER)
    for state in disk.crash_states(rng):
        log = state.open_log(FILE)
        log.append(b"5")
        if "other" in state.names(WORK):
            assert state.read(OTHER) == b"12345"
        assert {dict(each)["file"][:4] for each in left(state, rng)} == {b"1234"}
    assert disk.read(FILE) == b"1234"


def test_a_killed_process_leaves_everything_and_a_power_cut_after_that_may_take_it(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    log = disk.open_log(LOG)
    log.append(b"1234")
    again = disk.killed()
    assert again.files() == disk.files() == {LOG: b"1234"}
    assert left(again, np.random.default_rng(5)) == left(disk, np.random.default_rng(5))
    again.open_log(LOG).sync()
    again.sync_directory(WORK)
    assert left(again, rng) == {(("log", b"1234"),)}
    assert () in left(disk, rng)


def test_an_operation_fails_by_its_number_and_no_other(disk: SimulatedDisk) -> None:
    first = disk.operations
    disk.fail(at(first + 4, errno.EIO))
    disk.write(FILE, b"1234")  # create, append, sync
    disk.sync_directory(WORK)
    with pytest.raises(OSError, match="Input/output error: '/state/file'") as error:
        disk.read(FILE)
    assert error.value.errno == errno.EIO
    assert disk.read(FILE) == b"1234"
    assert disk.operations == first + 6


def test_a_full_disk_takes_half_of_an_append_and_can_be_tidied(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    kept_file(disk, b"1234")
    log = disk.open_log(LOG)
    disk.sync_directory(WORK)
    disk.fail(full)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"abcdef")
    assert disk.read(LOG) == b"abc"
    with pytest.raises(OSError, match="No space left"):
        disk.write(OTHER, b"1")
    assert disk.names(WORK) == ["file", "log"]
    disk.truncate(LOG, 0)
    disk.remove(FILE)
    disk.sync_directory(WORK)
    assert left(disk, rng) == {(("log", b""),)}
    assert disk.used_bytes == 0


def test_a_broken_disk_can_be_read_and_nothing_else(disk: SimulatedDisk) -> None:
    kept_file(disk, b"1234")
    disk.fail(broken)
    for change in (lambda: disk.write(FILE, b"5"), lambda: disk.remove(FILE), lambda: disk.truncate(FILE, 1)):
        with pytest.raises(OSError, match="Input/output error"):
            change()
    assert disk.read(FILE) == b"1234"
    assert disk.names(WORK) == ["file"]


def test_what_a_failed_sync_left_is_never_safe_again_but_what_is_written_anew_is(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    log = disk.open_log(LOG)
    disk.sync_directory(WORK)
    log.append(b"1234")
    disk.fail(lambda operation: errno.EIO if operation.kind == "sync" else None)
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    disk.fail(None)
    log.sync()  # the system says that all is well
    assert (("log", bytes(4)),) in left(disk, rng)
    log.append(b"5678")
    log.sync()
    assert {dict(state)["log"][4:] for state in left(disk, rng)} == {b"5678"}
    assert len(left(disk, rng)) == 3  # the first page kept, zeros or garbage
    disk.truncate(LOG, 0)
    log.append(b"abcd")
    log.sync()
    assert left(disk, rng) == {(("log", b"abcd"),)}


def test_a_file_system_whose_directory_could_not_be_synced_is_read_only_until_the_next_start(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    kept_file(disk, b"old")
    disk.write(OTHER, b"new")
    disk.replace(OTHER, FILE)
    disk.fail(lambda operation: errno.EIO if operation.kind == "syncdir" else None)
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_directory(WORK)
    disk.fail(None)
    for running in (disk, disk.killed()):
        assert running.read(FILE) == b"new"
        for change in (lambda: running.sync_directory(WORK), lambda: running.remove(FILE)):  # noqa: B023
            with pytest.raises(OSError, match="Read-only file system"):
                change()
    assert {dict(state)["file"] for state in left(disk, rng)} == {b"old", b"new"}
    for started in disk.crash_states(rng):
        started.write(FILE, b"newer")


def test_a_directory_that_a_full_disk_could_not_sync_is_synced_later(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    disk.write(FILE, b"new")
    disk.fail(lambda operation: errno.ENOSPC if operation.kind == "syncdir" else None)
    with pytest.raises(OSError, match="No space"):
        disk.sync_directory(WORK)
    assert left(disk, rng) == {(), (("file", b"new"),)}
    disk.fail(None)
    disk.sync_directory(WORK)
    assert left(disk, rng) == {(("file", b"new"),)}


def test_a_power_cut_inside_an_operation_leaves_it_done_and_nothing_after_it(
    disk: SimulatedDisk, rng: np.random.Generator
) -> None:
    def cut(operation: Operation) -> None:
        if operation.kind == "append":
            raise PowerCut

    disk.watch(cut)
    with pytest.raises(PowerCut):
        disk.write(FILE, b"1234")
    disk.watch(None)
    assert disk.files() == {FILE: b"1234"}
    assert (("file", b"12"),) in left(disk, rng)


def test_damage_is_on_the_medium(disk: SimulatedDisk, rng: np.random.Generator) -> None:
    kept_file(disk, b"1234")
    before = disk.operations
    disk.damage(FILE, b"1334")
    disk.damage(OTHER, b"from nowhere")
    assert left(disk, rng) == {(("file", b"1334"), ("other", b"from nowhere"))}
    assert disk.operations == before
