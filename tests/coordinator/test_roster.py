"""The roster follows its files: enrolled, refused, revoked."""

import os

import pytest
from small_fleet import DEVICES, device_key

from coordinator.roster import KeyConflict, Roster, RosterFull

PUMP, OTHER, THIRD = DEVICES[:3]
KEY, ANOTHER = device_key(PUMP).public, device_key(OTHER).public


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def roster(tmp_path, clock):
    return Roster(tmp_path / "roster", 2, clock)


def test_nobody_is_enrolled_where_there_is_no_directory(roster):
    assert roster.key(PUMP) is None
    assert roster.devices() == ()


def test_an_enrolled_device_has_its_key_at_once_and_after_a_restart(roster, tmp_path):
    roster.enrol(PUMP, KEY)
    assert roster.key(PUMP) == KEY
    assert Roster(tmp_path / "roster", 2).key(PUMP) == KEY


def test_enrolling_again_with_the_same_key_changes_nothing(roster):
    roster.enrol(PUMP, KEY)
    roster.enrol(PUMP, KEY)
    assert roster.devices() == (PUMP,)


def test_another_key_for_an_enrolled_device_is_refused(roster):
    roster.enrol(PUMP, KEY)
    with pytest.raises(KeyConflict, match=f"{PUMP} is enrolled with key {KEY}; remove .*{PUMP}.pub"):
        roster.enrol(PUMP, ANOTHER)
    assert roster.key(PUMP) == KEY


def test_one_device_more_than_allowed_is_refused(roster):
    roster.enrol(PUMP, KEY)
    roster.enrol(OTHER, ANOTHER)
    with pytest.raises(RosterFull, match="2 devices are enrolled; max_devices is 2"):
        roster.enrol(THIRD, KEY)
    assert roster.devices() == (PUMP, OTHER)


def test_a_file_added_by_somebody_else_is_noticed_within_a_second(roster, clock, tmp_path):
    assert roster.key(PUMP) is None
    Roster(tmp_path / "roster", 2).enrol(PUMP, KEY)
    clock.now += 1.0
    assert roster.key(PUMP) == KEY


def test_a_removed_file_revokes_within_a_second(roster, clock, tmp_path):
    roster.enrol(PUMP, KEY)
    (tmp_path / "roster" / f"{PUMP}.pub").unlink()
    clock.now += 1.0
    assert roster.key(PUMP) is None


def test_after_a_revocation_another_key_may_be_enrolled(roster, tmp_path):
    roster.enrol(PUMP, KEY)
    (tmp_path / "roster" / f"{PUMP}.pub").unlink()
    roster.enrol(PUMP, ANOTHER)
    assert roster.key(PUMP) == ANOTHER


def test_the_directory_is_not_read_for_every_message(roster, clock, tmp_path):
    assert roster.key(PUMP) is None
    Roster(tmp_path / "roster", 2).enrol(PUMP, KEY)
    clock.now += 0.9
    assert roster.key(PUMP) is None


def test_a_file_that_was_half_written_when_it_was_read_is_read_again(roster, clock, tmp_path):
    """Writing the rest into a file does not change the time of its directory."""
    roster.enrol(OTHER, ANOTHER)
    file = tmp_path / "roster" / f"{PUMP}.pub"
    file.write_text("")
    clock.now += 1.0
    assert roster.key(PUMP) is None
    file.write_text(f"{KEY}\n")
    clock.now += 1.0
    assert roster.key(PUMP) == KEY


def test_when_one_device_is_enrolled_the_files_of_the_others_are_not_read_again(roster, clock, tmp_path):
    file = tmp_path / "roster" / f"{PUMP}.pub"
    file.parent.mkdir()
    file.write_text(f"{KEY}\n")
    long_ago = file.stat().st_mtime_ns - 10**10
    os.utime(file, ns=(long_ago, long_ago))
    assert roster.key(PUMP) == KEY
    file.write_text("x" * 65)  # what it holds now would enrol nobody; to the file system it looks the same
    os.utime(file, ns=(long_ago, long_ago))
    Roster(tmp_path / "roster", 2).enrol(OTHER, ANOTHER)
    for _ in range(3):
        clock.now += 1.0
        assert roster.devices() == (PUMP, OTHER)


def test_an_old_file_that_was_rewritten_in_place_is_read_when_the_directory_changes(roster, clock, tmp_path):
    roster.enrol(PUMP, KEY)
    file = tmp_path / "roster" / f"{PUMP}.pub"
    long_ago = file.stat().st_mtime_ns - 10**10
    os.utime(file, ns=(long_ago, long_ago))
    clock.now += 1.0
    assert roster.key(PUMP) == KEY
    file.write_text(f"{ANOTHER}\n")
    (tmp_path / "roster" / "something-else").touch()
    clock.now += 1.0
    assert roster.key(PUMP) == ANOTHER


def test_a_directory_that_was_away_for_a_while_is_read_again(roster, clock, tmp_path):
    roster.enrol(PUMP, KEY)
    clock.now += 1.0
    assert roster.key(PUMP) == KEY
    clock.now += 1.0
    assert roster.key(PUMP) == KEY
    (tmp_path / "roster").rename(tmp_path / "aside")
    clock.now += 1.0
    assert roster.key(PUMP) is None
    (tmp_path / "aside").rename(tmp_path / "roster")
    clock.now += 1.0
    assert roster.key(PUMP) == KEY


@pytest.mark.parametrize("content", ["", "not hexadecimal", "ab" * 31, "ab" * 33, "é"])
def test_a_file_that_is_no_key_enrols_nobody_and_harms_nobody(roster, tmp_path, content):
    directory = tmp_path / "roster"
    directory.mkdir()
    (directory / f"{PUMP}.pub").write_text(content, encoding="utf-8")
    (directory / f"{OTHER}.pub").write_text(f"{ANOTHER}\n")
    (directory / "NOT AN ID.pub").write_text(f"{KEY}\n")
    (directory / "readme.txt").write_text("keys of the pumps")
    assert roster.devices() == (OTHER,)
