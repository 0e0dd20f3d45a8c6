"""The writer judges in order, counts once, and gives a re-sent update the verdict it had."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleet import DEVICES, PLAN, Bench, constant, make_settings, make_update

from coordinator.accounting import APPLIED, DUPLICATE, REJECTED
from coordinator.admission import Rejection
from coordinator.aggregation import FedAsync, FedBuff
from coordinator.entries import FlushEntry
from coordinator.intake import Refused
from coordinator.model_state import ModelState
from coordinator.settings import Update
from coordinator.staleness import Cutoff, Polynomial
from fedtide.wire.envelope import update_digest
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.parameters import fingerprint

ONE, TWO = DEVICES[0], DEVICES[1]


def verdicts(receipts):
    return [receipt.verdict for receipt in receipts]


def test_an_honest_update_is_applied_and_its_receipt_names_it(bench):
    envelope = make_update(counter=7)
    (receipt,) = bench.send(envelope)
    assert (receipt.device, receipt.counter, receipt.digest) == (ONE, 7, update_digest(envelope))
    assert (receipt.verdict, receipt.reason, receipt.version) == (Verdict.APPLIED, None, 0)
    assert bench.journal.totals() == {APPLIED: 1}
    assert bench.state.buffer.total.tolist() == [1.0] * 8


def test_two_copies_in_one_batch_count_once(bench):
    envelope = make_update()
    assert verdicts(bench.send(envelope, envelope)) == [Verdict.APPLIED, Verdict.DUPLICATE]
    assert bench.state.buffer.count == 1
    assert bench.journal.totals() == {APPLIED: 1, DUPLICATE: 1}


def test_a_copy_in_a_later_batch_counts_once(bench):
    envelope = make_update()
    bench.send(envelope)
    assert verdicts(bench.send(envelope)) == [Verdict.DUPLICATE]
    assert bench.state.buffer.count == 1


def test_a_copy_after_a_restart_counts_once(open_bench):
    first = open_bench()
    first.send(make_update())
    first.close()
    second = open_bench()
    assert verdicts(second.send(make_update())) == [Verdict.DUPLICATE]
    assert second.state.buffer.count == 1
    assert second.accounting.balanced()


def test_a_copy_of_an_older_applied_update_is_a_duplicate(bench):
    bench.send(make_update(counter=1), make_update(counter=2))
    assert verdicts(bench.send(make_update(counter=1))) == [Verdict.DUPLICATE]
    assert bench.state.buffer.count == 2


def test_other_bytes_under_a_used_counter_are_a_duplicate(bench):
    bench.send(make_update(counter=1))
    assert verdicts(bench.send(make_update(constant(9.0), counter=1))) == [Verdict.DUPLICATE]
    assert bench.state.buffer.total.tolist() == [1.0] * 8


def test_a_batch_is_folded_in_the_order_of_arrival(open_bench):
    """K = 2: the third update of the batch meets version 1, so its staleness is 1 and its weight 1/2."""
    bench = open_bench(make_settings(aggregator=FedBuff(goal=2), staleness=Polynomial(exponent=1.0)))
    receipts = bench.send(
        make_update(constant(2.0), device=ONE),
        make_update(constant(4.0), device=TWO),
        make_update(constant(8.0), device=ONE, counter=2),
    )
    assert verdicts(receipts) == [Verdict.APPLIED] * 3
    assert bench.state.version == 1
    # (2 + 4) / 2 = 3 on top of 0 … 7; then 1/2 · 8 = 4 waits in the buffer
    assert bench.state.parameters.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert bench.state.buffer.total.tolist() == [4.0] * 8
    entries = [entry for _, entry in bench.journal.entries_after(2)]  # after the rules and the parameters
    assert [(entry.device, entry.counter) for entry in entries] == [(ONE, 1), (TWO, 1), (ONE, 2)]
    assert [entry.staleness_weight for entry in entries] == [1.0, 1.0, 0.5]


def test_the_order_of_the_batch_decides_which_version_an_update_meets(open_bench):
    """The same three updates, but device one's second comes first: then its first was overtaken."""
    bench = open_bench(make_settings(aggregator=FedBuff(goal=2)))
    receipts = bench.send(
        make_update(device=ONE, counter=2), make_update(device=TWO), make_update(device=ONE, counter=1)
    )
    assert verdicts(receipts) == [Verdict.APPLIED, Verdict.APPLIED, Verdict.REJECTED]
    assert receipts[2].reason is Reason.REPLAYED_COUNTER


def test_a_rejected_update_that_is_sent_again_gets_the_same_verdict(open_bench):
    bench = open_bench(make_settings(aggregator=FedBuff(goal=1), staleness=Cutoff(at=0)))
    bench.send(make_update(device=TWO))
    stale = make_update(device=ONE, counter=5)
    (first,) = bench.send(stale)
    bench.send(make_update(device=TWO, counter=2))
    (again,) = bench.send(stale)
    assert first.reason is Reason.TOO_STALE
    assert (again.verdict, again.reason, again.detail) == (first.verdict, first.reason, first.detail)
    assert bench.journal.totals()[DUPLICATE] == 1
    assert bench.accounting.balanced()


def test_a_rejection_is_remembered_over_a_restart(open_bench):
    rejected = make_update(counter=3, plan="0" * 32)
    first = open_bench()
    (told,) = first.send(rejected)
    first.close()
    (again,) = open_bench().send(rejected)
    assert (again.verdict, again.reason, again.detail) == (told.verdict, told.reason, told.detail)


def test_after_a_rejection_the_next_counter_is_judged_anew(bench):
    bench.send(make_update(counter=1, plan="0" * 32))
    assert verdicts(bench.send(make_update(counter=2))) == [Verdict.APPLIED]
    mark = bench.journal.marks()[ONE]
    assert (mark.applied, mark.rejected, mark.verdict) == (1, 1, Verdict.APPLIED)


def test_a_sender_that_was_not_verified_never_moves_a_mark(bench):
    bench.send(make_update(counter=1))
    before = bench.journal.marks()
    rejection = Rejection(Reason.BAD_SIGNATURE, "the signature is not by the device's key")
    bench.judge(Refused(ONE, 10**9, bytes(32), rejection))
    assert bench.journal.marks() == before == bench.writer.marks
    assert verdicts(bench.send(make_update(counter=2))) == [Verdict.APPLIED]


def test_refusals_of_one_batch_are_all_counted(bench):
    refused = Refused(ONE, 1, None, Rejection(Reason.MALFORMED, "damaged on the way"))
    receipts = bench.judge(refused, refused, refused)
    assert receipts == [None] * 3
    assert bench.journal.totals() == {REJECTED + Reason.MALFORMED: 3}


def test_nothing_in_a_batch_of_nothing(bench):
    assert bench.judge() == []
    assert bench.journal.totals() == {}


def test_receipts_ask_for_the_pause_of_the_settings(open_bench):
    bench = open_bench(make_settings(update=Update(retry_after_s=2.5)))
    applied, rejected = bench.send(make_update(), make_update(device=TWO, plan="0" * 32))
    assert (applied.retry_after_s, rejected.retry_after_s) == (2.5, 2.5)


def test_a_flush_makes_a_version_of_a_partly_full_buffer(bench):
    bench.send(make_update(constant(6.0)), make_update(constant(2.0), device=TWO))
    batch = bench.writer.flush()
    assert batch.entries == [FlushEntry()]
    assert bench.state.version == 1
    # (6 + 2) / 2 = 4, whatever the aggregation goal of 10
    assert bench.state.parameters.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert bench.state.buffer.count == 0


def test_examples_weigh_where_the_settings_say_so(open_bench):
    bench = open_bench(make_settings(aggregator=FedBuff(goal=2), update=Update(weight_by_examples=True)))
    bench.send(
        make_update(constant(1.0), num_examples=1), make_update(constant(5.0), device=TWO, num_examples=3)
    )
    # (1·1 + 3·5) / (1 + 3) = 4
    assert bench.state.parameters.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert bench.journal.marks()[TWO].weight == 3.0


def test_an_update_for_fedasync_starts_from_its_published_base(open_bench):
    bench = open_bench(make_settings(aggregator=FedAsync(mixing=0.5), staleness=Polynomial(exponent=1.0)))
    bench.send(make_update(constant(2.0)))
    # x1 = x0 + 1/2 · 2
    assert bench.state.parameters.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    bench.send(make_update(constant(4.0), device=TWO))
    # staleness 1, so alpha = 1/4: x1 + 1/4 (x0 + 4 - x1) = x1 + 1/4 · 3
    assert bench.state.parameters.tolist() == [1.75, 2.75, 3.75, 4.75, 5.75, 6.75, 7.75, 8.75]


def test_a_version_that_was_not_published_is_no_base(open_bench):
    bench = open_bench(make_settings(aggregator=FedBuff(goal=1)))
    bench.send(make_update())
    unpublished = make_update(device=TWO, base_version=1, base_sha256=fingerprint(bench.state.parameters))
    (receipt,) = bench.send(unpublished)
    assert receipt.reason is Reason.UNKNOWN_BASE
    bench.publish()
    again = make_update(
        device=TWO, counter=2, base_version=1, base_sha256=fingerprint(bench.state.parameters)
    )
    assert verdicts(bench.send(again)) == [Verdict.APPLIED]


def test_parameters_that_devices_may_hold_are_never_changed_in_place(open_bench):
    bench = open_bench(make_settings(aggregator=FedBuff(goal=1)))
    first: ModelState = bench.state
    bench.send(make_update())
    assert first.parameters.tolist() == PLAN.initial.tolist()
    assert not np.shares_memory(first.parameters, bench.state.parameters)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(DEVICES), st.integers(1, 6), st.booleans()), max_size=8),
        max_size=6,
    )
)
def test_whatever_arrives_however_often_each_update_counts_once_and_all_are_accounted(
    tmp_path_factory, batches
):
    bench = Bench(tmp_path_factory.mktemp("fleet"), make_settings(aggregator=FedBuff(goal=3)))
    try:
        sent = 0
        for batch in batches:
            sent += len(batch)
            bench.send(
                *(
                    make_update(device=device, counter=counter, plan=PLAN.plan.id if good else "0" * 32)
                    for device, counter, good in batch
                )
            )
        entries = [entry for _, entry in bench.journal.entries_after(2)]
        pairs = [(entry.device, entry.counter) for entry in entries]
        assert len(pairs) == len(set(pairs)) == bench.accounting.applied
        assert bench.accounting.received == sum(bench.journal.totals().values()) == sent
        assert bench.accounting.balanced()
        assert 3 * bench.state.version + bench.state.buffer.count == len(pairs)
        assert sum(mark.applied for mark in bench.journal.marks().values()) == len(pairs)
    finally:
        bench.close()
