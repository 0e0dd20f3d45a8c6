"""Received = applied + duplicate + rejected(by reason) + waiting, always."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.accounting import APPLIED, DUPLICATE, REJECTED, Accounting
from fedtide.wire.messages import Reason

fates = st.sampled_from([APPLIED, DUPLICATE, *(REJECTED + reason for reason in Reason)])


@given(st.lists(st.lists(fates)), st.integers(0, 5))
def test_the_identity_holds_after_every_batch(batches, still_waiting):
    accounting = Accounting()
    for batch in batches:
        for _ in batch:
            accounting.arrived()
            assert accounting.balanced()
        accounting.judged({name: batch.count(name) for name in batch})
        assert accounting.balanced()
        assert accounting.waiting == 0
    for _ in range(still_waiting):
        accounting.arrived()
    assert accounting.balanced()
    assert accounting.waiting == still_waiting
    assert accounting.received == sum(map(len, batches)) + still_waiting


def test_an_update_counted_twice_breaks_the_identity():
    accounting = Accounting()
    accounting.arrived()
    accounting.judged({APPLIED: 1})
    accounting.applied += 1  # as a defect that counts an update twice would
    assert not accounting.balanced()


def test_an_update_that_vanishes_breaks_the_identity():
    accounting = Accounting()
    accounting.arrived()
    accounting.waiting -= 1  # as a defect that drops an update without a word would
    assert not accounting.balanced()


@given(st.dictionaries(fates, st.integers(1, 1000)))
def test_totals_of_the_journal_start_a_balanced_account(totals):
    accounting = Accounting.from_totals(totals)
    assert accounting.balanced()
    assert accounting.received == sum(totals.values())
    assert accounting.applied == totals.get(APPLIED, 0)
    assert {REJECTED + reason: count for reason, count in accounting.rejected.items()} == {
        name: count for name, count in totals.items() if name.startswith(REJECTED)
    }
