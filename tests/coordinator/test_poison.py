"""Bytes that break whoever reads them: set aside, counted, answered, and never a crash loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_fleet import DEVICES, PLAN, SCHEMA, Bench, assert_same_state, constant, device_key, make_update
from test_coordinator_service import make, run, update

from coordinator import writer
from coordinator.accounting import REJECTED
from coordinator.intake import Arrived, Intake, Refused
from coordinator.poison import MOST_SUSPECTS, NOTE_BYTES, NOTHING, name_of, note_of, suspects_after
from coordinator.set_aside import MOST_FILES, PoisonWatch
from fedtide.wire import frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.codecs import get as get_codec
from fedtide.wire.envelope import update_digest
from fedtide.wire.messages import Reason, UpdateChunk, Verdict

ONE, TWO = DEVICES[:2]
A, B = bytes([1]) * 32, bytes([2]) * 32
NAMES = {"a": A, "b": B}


class Broken(Exception):
    """A failure that nobody foresaw."""


# The note.


def note(current=NOTHING, **suspects):
    """A note of a run that was reading ``current``, with earlier suspects by a number each."""
    return current + note_of({NAMES[name]: ends for name, ends in suspects.items()})[32:]


def test_what_was_being_read_at_an_end_is_suspect_and_at_two_in_a_row_doubly():
    assert suspects_after(note()) == {}
    assert suspects_after(note(A)) == {A: 1}
    assert suspects_after(note(A, a=1)) == {A: 2}


def test_an_end_at_another_leaves_a_suspect_what_it_was():
    assert suspects_after(note(B, a=1)) == {A: 1, B: 1}


def test_a_note_that_was_cut_short_is_read_as_far_as_it_goes():
    whole = note(B, a=1)
    assert suspects_after(whole[:31]) == {}
    assert suspects_after(whole[:32]) == {B: 1}
    assert suspects_after(whole[: 32 + 32]) == {B: 1}
    assert suspects_after(whole[: 32 + 33]) == {A: 1, B: 1}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_note(content):
    suspects = suspects_after(content)
    assert all(len(name) == 32 and ends > 0 for name, ends in suspects.items())


@given(st.dictionaries(st.binary(min_size=32, max_size=32).filter(any), st.integers(1, 200), max_size=64))
def test_a_note_is_read_as_it_was_written(suspects):
    assert len(note_of(suspects)) == NOTE_BYTES
    assert suspects_after(note_of(suspects)) == suspects


def test_the_latest_suspects_are_kept_and_the_oldest_forgotten():
    many = {bytes([number]) * 32: 1 for number in range(1, 101)}
    assert list(suspects_after(note_of(many))) == list(many)[-MOST_SUSPECTS:]
    full = dict(list(many.items())[:MOST_SUSPECTS])
    assert list(suspects_after(b"z" * 32 + note_of(full)[32:])) == [*list(full)[1:], b"z" * 32]


def test_honest_messages_have_names_of_their_own_however_alike():
    messages = {bytes(size) for size in range(100)} | {bytes(50) + bytes([1]), bytes(3000), bytes(3001)}
    assert len({name_of(message) for message in messages}) == len(messages)


# The watch on a real disk.


def test_the_next_run_knows_what_the_last_one_was_reading(tmp_path):
    PoisonWatch(tmp_path).begins(A)
    second = PoisonWatch(tmp_path)
    assert not second.is_poison(A)
    second.begins(A)
    third = PoisonWatch(tmp_path)
    assert third.is_poison(A)
    assert not third.is_poison(B)
    assert PoisonWatch(tmp_path).is_poison(A)  # for good


def test_what_is_read_between_two_ends_is_innocent(tmp_path):
    PoisonWatch(tmp_path).begins(A)
    second = PoisonWatch(tmp_path)
    second.begins(A)
    second.ends()
    second.begins(A)
    assert not PoisonWatch(tmp_path).is_poison(A)


def test_the_note_keeps_its_size_and_its_suspects_whatever_is_read(tmp_path):
    PoisonWatch(tmp_path).begins(B)
    watch = PoisonWatch(tmp_path)
    for number in range(1000):
        watch.begins(number.to_bytes(32, "big"))
        watch.ends()
    assert (tmp_path / "reading").stat().st_size == NOTE_BYTES
    watch.begins(B)
    assert PoisonWatch(tmp_path).is_poison(B)


def test_what_is_set_aside_is_bounded_and_so_is_what_is_told_of_it(tmp_path, caplog):
    watch = PoisonWatch(tmp_path)
    for number in range(MOST_FILES + 20):
        watch.set_aside("pump-7", number.to_bytes(32, "little"), b"poison %d" % number, Broken("what now"))
    kept = sorted(path.read_bytes() for path in (tmp_path / "set-aside").iterdir())
    assert len(kept) == len(caplog.records) == MOST_FILES
    assert b"poison 0" in kept


def test_the_log_has_the_traceback_and_says_where_the_bytes_are(tmp_path, caplog):
    watch = PoisonWatch(tmp_path)
    error = Broken("what now")
    for _ in range(3):
        watch.set_aside("pump-7", A, b"poison", error)
    (record,) = caplog.records
    assert "Broken: what now" in record.message
    assert str(tmp_path / "set-aside" / "pump-7-0101010101010101") in record.message
    assert record.exc_info[1].args == ("what now",)


# An exception while an arrival is read.


@pytest.fixture
def watched(tmp_path):
    bench = Bench(tmp_path / "fleet")
    watch = PoisonWatch(tmp_path / "state")
    keys = {device: device_key(device).public for device in DEVICES}
    bench.intake = Intake(SCHEMA, keys.get, 1 << 20, watch)
    bench.writer._watch = watch
    yield bench, watch, tmp_path / "state" / "set-aside"
    bench.close()


def chunk_of(envelope, counter=1):
    (chunk,) = update_chunks(envelope, counter, MAX_CHUNK_BYTES)
    return chunk


def break_reading(monkeypatch, name, error, when):
    """Make a function that intake calls raise at some of its arguments."""
    module = sys.modules["coordinator.intake"]
    real = getattr(module, name)

    def breaking(first, *rest):
        if when(first):
            raise error
        return real(first, *rest)

    monkeypatch.setattr(module, name, breaking)


def test_an_exception_while_a_message_is_opened_sets_it_aside_and_the_next_one_is_read(watched, monkeypatch):
    bench, _, aside = watched
    poison = make_update(counter=1, metrics={"poison": 1.0})
    break_reading(monkeypatch, "open_update", Broken("in the parser"), lambda raw: b"poison" in raw)
    bad, good = bench.receive(ONE, chunk_of(poison)), bench.receive(TWO, chunk_of(make_update(device=TWO)))
    assert isinstance(bad, Refused)
    assert isinstance(good, Arrived)

    refusal, receipt = bench.judge(bad, good)
    assert (refusal.verdict, refusal.reason) == (Verdict.REJECTED, Reason.UNREADABLE)
    assert receipt.verdict is Verdict.APPLIED
    assert [file.read_bytes() for file in aside.iterdir()] == [chunk_of(poison)]
    assert bench.accounting.balanced()
    assert bench.journal.totals() == {"applied": 1, REJECTED + "unreadable": 1}


def test_the_answer_names_the_message_and_not_what_it_claims_to_be_part_of(watched, monkeypatch):
    """Its signature was not checked: another's update must not be ended by it."""
    bench, _, _ = watched
    envelope = make_update()
    break_reading(monkeypatch, "open_update", Broken("in the parser"), lambda _: True)
    refused = bench.receive(ONE, chunk_of(envelope))
    assert refused.digest == update_digest(chunk_of(envelope)) != update_digest(envelope)


def test_an_exception_leaves_no_chunks_of_that_sender_behind(watched, monkeypatch):
    bench, _, _ = watched
    first, second, *_ = update_chunks(make_update(metrics={"m" * 4000: 0.0}), 1, 1024)
    bench.receive(ONE, first)
    break_reading(monkeypatch, "_check_bounds", Broken("in the parser"), lambda chunk: chunk.index == 1)
    assert bench.receive(ONE, second).rejection.reason is Reason.UNREADABLE
    assert bench.intake.assembler.held_bytes == 0


class BreakingCodec:
    """Decodes as the real one, but for one payload, of which it has written half when it breaks."""

    def __init__(self, poison):
        self.poison = poison

    def encode(self, delta, schema):
        return get_codec("float32").encode(delta, schema)

    def decode(self, payload, schema, out):
        if payload == self.poison:
            out[: schema.size // 2] = 1e30
            raise Broken("in the decoder")
        return get_codec("float32").decode(payload, schema, out=out)


def test_an_exception_while_a_delta_is_decoded_folds_nothing_and_is_receipted(watched, monkeypatch):
    bench, _, aside = watched
    other = Bench(aside.parent / "other")
    poison = make_update(constant(9.0), counter=1)
    payload = get_codec("float32").encode(constant(9.0), SCHEMA)
    breaking = BreakingCodec(payload)
    monkeypatch.setattr(writer.codecs, "get", lambda _name: breaking)
    bad = bench.receive(ONE, chunk_of(poison))
    refusal, applied = bench.judge(bad, bench.receive(TWO, chunk_of(make_update(device=TWO))))

    assert (refusal.reason, refusal.digest) == (Reason.UNREADABLE, update_digest(poison))
    assert applied.verdict is Verdict.APPLIED
    assert [file.read_bytes() for file in aside.iterdir()] == [poison]
    monkeypatch.undo()
    other.send(make_update(device=TWO))
    assert_same_state(bench.state, other.state)
    assert_same_state(bench.replay_from_start(), bench.state)
    other.close()

    # Sent again, it is known and not decoded again.
    (again,) = bench.judge(bench.receive(ONE, chunk_of(poison)))
    assert again.reason is Reason.UNREADABLE
    assert bench.journal.totals()["duplicate"] == 1
    assert bench.accounting.balanced()


def test_what_breaks_after_the_decoding_is_our_own_failure_and_stays_on_the_note(watched, monkeypatch):
    bench, _, aside = watched
    envelope = make_update()
    arrival = bench.receive(ONE, chunk_of(envelope))

    def broken(*_arguments):
        raise Broken("in the fold")

    monkeypatch.setattr(writer, "fold_update", broken)
    with pytest.raises(Broken):
        bench.writer.judge([arrival])
    again = PoisonWatch(aside.parent)
    assert not again.is_poison(update_digest(envelope))
    again.begins(update_digest(envelope))
    assert PoisonWatch(aside.parent).is_poison(update_digest(envelope))


def test_an_update_that_ended_the_coordinator_twice_is_rejected_without_being_decoded(watched, monkeypatch):
    bench, watch, aside = watched
    envelope = make_update()
    watch._suspects[update_digest(envelope)] = 2
    monkeypatch.setattr(writer.codecs, "get", lambda _name: pytest.fail("it was decoded"))
    (receipt,) = bench.judge(bench.receive(ONE, chunk_of(envelope)))
    assert (receipt.verdict, receipt.reason) == (Verdict.REJECTED, Reason.UNREADABLE)
    assert [file.read_bytes() for file in aside.iterdir()] == [envelope]
    assert bench.accounting.balanced()


def test_a_message_that_ended_the_coordinator_twice_is_not_parsed(watched, monkeypatch):
    bench, watch, aside = watched
    message = frame.to_frame(UpdateChunk(counter=1, digest=bytes(32), size_bytes=4, content=b"junk"))
    watch._suspects[name_of(message)] = 2
    monkeypatch.setattr(sys.modules["coordinator.intake"], "device_id", lambda _: pytest.fail("it was read"))
    refused = bench.receive(ONE, message)
    assert (refused.rejection.reason, refused.digest) == (Reason.UNREADABLE, update_digest(message))
    assert [file.read_bytes() for file in aside.iterdir()] == [message]


def test_a_running_coordinator_goes_on_after_an_update_that_it_cannot_read(tmp_path, monkeypatch):
    async def scenario(fleet, running):
        break_reading(monkeypatch, "open_update", Broken("in the parser"), lambda raw: b"poison" in raw)
        fleet.send(update(1, metrics={"poison": 1.0}), update(1, TWO))
        await fleet.connection.until(lambda: fleet.received(ONE) and fleet.received(TWO))
        assert not running.done()
        return fleet.service.status("running").updates

    fleet = run(tmp_path, make(goal=10), scenario)
    assert fleet.outcome.rejected == {"unreadable": 1}
    assert fleet.outcome.applied == 1
    assert fleet.received(ONE)[0].reason is Reason.UNREADABLE
    assert len(list((tmp_path / "state" / "set-aside").iterdir())) == 1
    assert len(fleet.connection.acknowledged) == 2


def test_a_running_coordinator_goes_on_after_an_event_that_it_cannot_read(tmp_path, monkeypatch):
    async def scenario(fleet, running):
        view = fleet.service._reception.view
        monkeypatch.setattr(view, "note_presence", _breaking)
        fleet.connection.deliver(f"fl/1/pumps/st/{ONE}", b"poison")
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))
        assert not running.done()
        return fleet.service.status("running")

    fleet = run(tmp_path, make(goal=10), scenario)
    assert (fleet.outcome.ignored_messages, fleet.outcome.updates.applied) == (1, 1)


def _breaking(*_arguments):
    raise Broken("in the reader")


# A process that ends while it reads.

_READER = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
import coordinator.intake as intake
from small_fleet import DEVICES, SCHEMA, device_key
from coordinator.set_aside import PoisonWatch

real = intake.open_update
def open_update(raw, limit):
    if b"poison" in raw:
        os._exit(139)
    return real(raw, limit)
intake.open_update = open_update

keys = {{device: device_key(device).public for device in DEVICES}}
reader = intake.Intake(SCHEMA, keys.get, 1 << 20, PoisonWatch(Path({state!r})))
for name in sys.argv[1:]:
    arrival = reader.receive(DEVICES[0], Path(name).read_bytes(), 0.0)
    print(type(arrival).__name__, getattr(getattr(arrival, "rejection", None), "reason", ""))
"""


def test_a_process_that_dies_of_a_message_reads_everything_else_at_its_third_start(tmp_path):
    messages = [
        chunk_of(make_update(counter=1)),
        chunk_of(make_update(counter=2, metrics={"poison": 1.0}), 2),
        chunk_of(make_update(counter=3), 3),
    ]
    for number, message in enumerate(messages):
        (tmp_path / str(number)).write_bytes(message)
    program = _READER.format(path=[str(Path(__file__).parent)], state=str(tmp_path / "state"))

    def run():
        return subprocess.run(
            [sys.executable, "-c", program, *(str(tmp_path / str(number)) for number in range(3))],
            check=False, capture_output=True, text=True, timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    first, second, third = run(), run(), run()
    assert (first.returncode, first.stdout) == (139, "Arrived \n"), first.stderr
    assert second.returncode == 139
    assert third.returncode == 0, third.stderr
    assert third.stdout.splitlines() == ["Arrived ", "Refused unreadable", "Arrived "]
    (aside,) = (tmp_path / "state" / "set-aside").iterdir()
    assert aside.read_bytes() == messages[1]
    assert PLAN.plan.id  # the messages were of this plan
