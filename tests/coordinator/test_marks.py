"""Marks make an update count once, in whatever order and however often its counter comes."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.marks import Standing, after_applied, after_rejected, standing
from fedtide.wire.ids import DeviceId
from fedtide.wire.messages import Reason, Verdict

PUMP = DeviceId("pump-1")
LARGEST = 2**63 - 1


def applied(mark, counter, staleness=0, weight=1.0):
    return after_applied(mark, PUMP, counter, staleness, weight)


def rejected(mark, counter):
    return after_rejected(mark, PUMP, counter, Reason.TOO_STALE, "too old")


def test_an_unknown_device_is_new_with_any_counter():
    assert standing(None, 0) is Standing.NEW
    assert standing(None, LARGEST) is Standing.NEW


def test_the_highest_counter_is_the_latest_whatever_its_verdict():
    assert standing(applied(None, 7), 7) is Standing.LATEST
    assert standing(rejected(None, 7), 7) is Standing.LATEST


def test_a_counter_below_the_highest_was_applied_or_overtaken():
    mark = applied(rejected(applied(None, 5), 6), 8)
    assert standing(mark, 5) is Standing.APPLIED_BEFORE
    assert standing(mark, 6) is Standing.OVERTAKEN
    assert standing(mark, 7) is Standing.OVERTAKEN
    assert standing(mark, 9) is Standing.NEW


def test_the_window_holds_sixty_three_counters():
    first = applied(None, 100)
    assert standing(applied(first, 162), 100) is Standing.APPLIED_BEFORE
    assert standing(applied(first, 163), 100) is Standing.OVERTAKEN


def test_a_leap_to_the_largest_counter_forgets_the_window_and_nothing_else():
    mark = applied(applied(None, 0), LARGEST)
    assert standing(mark, LARGEST) is Standing.LATEST
    assert standing(mark, 0) is Standing.OVERTAKEN
    assert mark.applied == 2


def test_a_mark_adds_up_what_its_device_contributed():
    mark = applied(rejected(applied(None, 1, staleness=3, weight=0.5), 2), 3, staleness=4, weight=0.25)
    assert (mark.applied, mark.rejected, mark.staleness, mark.weight) == (2, 1, 7, 0.75)
    assert (mark.verdict, mark.reason, mark.detail) == (Verdict.APPLIED, None, "")


def test_a_rejected_mark_remembers_why():
    mark = rejected(applied(None, 1), 2)
    assert (mark.verdict, mark.reason, mark.detail) == (Verdict.REJECTED, Reason.TOO_STALE, "too old")


arrivals = st.lists(st.tuples(st.one_of(st.integers(0, 90), st.integers(0, LARGEST)), st.booleans()))


@given(arrivals)
def test_each_counter_is_judged_at_most_once(sequence):
    mark, judged = None, []
    for counter, counts in sequence:
        if standing(mark, counter) is Standing.NEW:
            judged.append(counter)
            mark = applied(mark, counter) if counts else rejected(mark, counter)
    assert len(judged) == len(set(judged))
    assert judged == sorted(judged)


@given(arrivals)
def test_within_the_window_what_was_applied_is_told_from_what_was_not(sequence):
    mark, was_applied = None, set()
    for counter, counts in sequence:
        known = standing(mark, counter)
        if known is Standing.NEW:
            mark = applied(mark, counter) if counts else rejected(mark, counter)
            if counts:
                was_applied.add(counter)
        elif known is not Standing.LATEST and mark.counter - counter < 63:
            assert (known is Standing.APPLIED_BEFORE) == (counter in was_applied)
