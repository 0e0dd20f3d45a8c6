"""Torn and damaged journals: what a cut tore is cut off; damage is found and named, never passed over."""

import errno
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from journal_files import DIRECTORY, begin, some_files, update, with_files
from simulated_disk import SimulatedDisk

from coordinator.journal import Counted, History, Journal, JournalDamaged
from coordinator.journal.check import verify
from coordinator.journal.files import end_file, segment_file, snapshot_file
from coordinator.journal.format import END_BYTES, HEAD_BYTES, HEADER_BYTES, MARK

SEGMENT = segment_file(DIRECTORY, 1)
END = end_file(DIRECTORY)


def three_batches():
    """The files after each of: the beginning, one update, a batch of three records."""
    disk = SimulatedDisk()
    journal = Journal(DIRECTORY, disk)
    found = []
    begin(journal)
    found.append(disk.files())
    journal.add(update(1))
    found.append(disk.files())
    journal.add(update(2), update(3), Counted("duplicate", 1))
    found.append(disk.files())
    journal.close()
    return found


def numbers(disk):
    return [number for number, _ in History(DIRECTORY, disk).records_after(0)]


def test_a_batch_torn_at_any_byte_never_happened():
    _, before, after = three_batches()
    for length in range(len(before[SEGMENT]), len(after[SEGMENT])):
        files = {**before, SEGMENT: after[SEGMENT][:length]}
        disk = with_files(files)
        assert numbers(disk) == [1, 2, 3]
        assert verify(DIRECTORY, disk).damages == []
        assert verify(DIRECTORY, disk).torn_bytes == length - len(before[SEGMENT])
        journal = Journal(DIRECTORY, disk)
        assert disk.files()[SEGMENT] == before[SEGMENT]
        journal.add(update(2))
        journal.close()
        assert numbers(disk) == [1, 2, 3, 4]


def test_a_whole_batch_that_no_note_of_the_end_knows_yet_happened():
    _, before, after = three_batches()
    disk = with_files({**before, SEGMENT: after[SEGMENT]})
    Journal(DIRECTORY, disk).close()
    assert numbers(disk) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rubbish", [b"\0" * 700, b"\xff" * 100, MARK * 50, MARK + b"\0" * 60])
def test_rubbish_after_the_last_batch_is_cut_off(rubbish):
    files = three_batches()[-1]
    disk = with_files({**files, SEGMENT: files[SEGMENT] + rubbish})
    assert verify(DIRECTORY, disk).damages == []
    Journal(DIRECTORY, disk).close()
    assert disk.files()[SEGMENT] == files[SEGMENT]


def test_a_segment_that_is_shorter_than_what_was_synced_is_damaged():
    """The file system lost what it had promised to keep: at any byte, it says where."""
    files = three_batches()[-1]
    for length in range(HEADER_BYTES, len(files[SEGMENT]), 3):
        disk = with_files({**files, SEGMENT: files[SEGMENT][:length]})
        with pytest.raises(JournalDamaged, match=r"000000000001.segment, byte \d+, record [1-6]:"):
            Journal(DIRECTORY, disk)
        assert [damage.file for damage in verify(DIRECTORY, disk).damages] == [SEGMENT]


@pytest.mark.parametrize("kept", [END_BYTES - 1, 0])
def test_without_a_note_of_the_end_a_flip_before_the_last_batch_is_still_damage(kept):
    """A power cut lost ``end``. What comes after the flip was appended after a sync of it."""
    before, _, after = three_batches()
    place = len(before[SEGMENT]) + HEAD_BYTES + 10  # in the body of update 1, with one batch after it
    for offset in (place, place - HEAD_BYTES):
        content = bytearray(after[SEGMENT])
        content[offset] ^= 4
        disk = with_files({**after, SEGMENT: bytes(content), END: after[END][:kept]})
        with pytest.raises(JournalDamaged, match="record 3: the "):
            Journal(DIRECTORY, disk)


def test_records_that_a_device_put_into_its_update_are_not_taken_for_ours():
    """Torn just there, a batch that holds them is still torn, and not damage."""
    disk = SimulatedDisk()
    journal = Journal(DIRECTORY, disk)
    begin(journal)
    before = disk.files()
    forged = before[SEGMENT][HEADER_BYTES:]  # whole records of this journal, later numbers not known outside
    journal.add(msgspec.structs.replace(update(1), envelope=forged * 3))
    journal.close()
    for place in range(len(before[SEGMENT]), len(before[SEGMENT]) + HEAD_BYTES):
        content = bytearray(disk.files()[SEGMENT])
        content[place] ^= 1
        torn = with_files({**before, SEGMENT: bytes(content)})
        Journal(DIRECTORY, torn).close()
        assert numbers(torn) == [1, 2]


def flipped(files, path, bit):
    content = bytearray(files[path])
    content[bit // 8] ^= 1 << bit % 8
    return {**files, path: bytes(content)}


def check_flip(files, whole, path, bit):
    disk = with_files(flipped(files, path, bit))
    damages = verify(DIRECTORY, disk).damages
    assert damages, f"bit {bit} of {path} was not noticed"
    assert damages[0].file == path
    assert damages[0].offset <= bit // 8
    if path.suffix == ".segment":
        record = max((place for place in whole[path] if place <= bit // 8), default=0)
        assert damages[0].offset == record, f"bit {bit} of {path} was found at {damages[0].offset}"
    if path == END:
        assert damages[0].offset == bit // 8 // END_BYTES * END_BYTES
    with suppress(JournalDamaged):  # unless what is needed for the state is elsewhere
        assert History(DIRECTORY, disk).ledger == whole["ledger"]


def whole_places(files):
    disk = with_files(files)
    history = History(DIRECTORY, disk)
    places = {"ledger": history.ledger}
    for path, stored in history.stored_after(0):
        places.setdefault(path, [0]).append(stored.offset)
    return places


def run_flips(files, count, seed):
    whole, rng = whole_places(files), np.random.default_rng(seed)
    sizes = np.array([len(content) for content in files.values()])
    paths = list(files)
    for _ in range(count):
        path = paths[int(rng.choice(len(paths), p=sizes / sizes.sum()))]
        check_flip(files, whole, path, int(rng.integers(8 * len(files[path]))))


def test_every_sampled_flip_is_noticed_and_located():
    files = some_files(batches=12, size=800)
    assert 90_000 < sum(map(len, files.values())) < 150_000
    run_flips(files, 100, seed=1)


def test_every_flip_in_what_is_not_a_body_is_noticed_and_located():
    """Headers, heads and the notes of the end: each byte of them, in a small journal."""
    files = some_files(batches=1, segments=2, size=20)
    whole = whole_places(files)
    for path, content in files.items():
        step = 1 if path == END else 17
        for bit in range(0, 8 * len(content), 8 * step):
            check_flip(files, whole, path, bit + bit // 8 % 8)


@pytest.mark.long
def test_a_hundred_thousand_flips_are_noticed_and_located():
    run_flips(some_files(batches=2, segments=2, size=100), 100_000, seed=2)


def test_a_segment_that_is_missing_is_told():
    files = some_files()
    firsts = sorted(int(path.stem) for path in files if path.suffix == ".segment")
    middle = firsts[1]
    left = {path: content for path, content in files.items() if path != segment_file(DIRECTORY, middle)}
    damages = verify(DIRECTORY, with_files(left)).damages
    assert [(damage.file.name, damage.sequence) for damage in damages] == [
        (f"{firsts[2]:012d}.segment", middle)
    ]
    assert f"records {middle} to {firsts[2] - 1} are missing" in damages[0].what


def test_segments_of_two_journals_do_not_make_one():
    files, other = some_files(size=100), some_files(size=101)
    firsts = sorted(int(path.stem) for path in files if path.suffix == ".segment")
    last = segment_file(DIRECTORY, firsts[-1])
    swapped = {
        **files,
        last: other[last],
        snapshot_file(DIRECTORY, firsts[-1]): other[snapshot_file(DIRECTORY, firsts[-1])],
    }
    damages = verify(DIRECTORY, with_files(swapped)).damages
    assert "the segment does not continue the one before" in {damage.what for damage in damages}


def test_a_snapshot_whose_totals_are_others_than_the_records_is_told():
    disk = SimulatedDisk()
    journal = Journal(DIRECTORY, disk)
    state = begin(journal)
    journal.add(update(1))
    journal.ledger.totals["applied"] += 1  # a defect
    journal.snapshot(state)
    journal.close()
    (damage,) = verify(DIRECTORY, disk).damages
    assert damage.file == snapshot_file(DIRECTORY, 4)
    assert "are not what the records before it add up to" in damage.what


def test_verifying_says_how_far_it_is():
    files, said = some_files(), []
    verify(DIRECTORY, with_files(files), lambda done, total: said.append((done, total)))
    total = sum(len(content) for path, content in files.items() if path.suffix == ".segment")
    assert said[0] == (0, total)
    assert said[-1] == (total, total)


def test_a_segment_that_cannot_be_read_is_told():
    disk = with_files(some_files())
    disk.fail(lambda operation: errno.EIO if (operation.kind, operation.path) == ("read", SEGMENT) else None)
    damages = verify(DIRECTORY, disk).damages
    assert damages[0].file == SEGMENT
    assert damages[0].what == "it or its snapshot cannot be read: Input/output error"
