"""Replay gives what was live, to the bit: every aggregator with every server optimizer."""

import hashlib
import shutil
import struct

import msgspec
import numpy as np
import pytest
from small_fleet import DEVICES, Bench, assert_same_state, constant, make_settings, make_update

from coordinator.aggregation import FedAsync, FedAvg, FedBuff
from coordinator.entries import FlushEntry, RulesEntry, UpdateEntry
from coordinator.journal import History, Journal, JournalDamaged, Published
from coordinator.replay import ReplayMismatch
from coordinator.server_optimizers import SGD, Adam, Momentum, Yogi
from coordinator.settings import Journal as JournalSettings
from coordinator.settings import Publish, Update
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.parameters import fingerprint

AGGREGATORS = [
    FedBuff(goal=3),
    FedBuff(goal=3, normalise_staleness=True),
    FedAsync(mixing=0.4),
    FedAvg(cohort=3),
]
OPTIMIZERS = [SGD(learning_rate=0.7), Momentum(), Adam(), Yogi()]
KEPT = Publish(keep_versions=1000)


def kind(value):
    tag = type(value).__struct_config__.tag
    return f"{tag}-normalised" if getattr(value, "normalise_staleness", False) else tag


def a_run(bench, rng, updates, *, first=1):
    """Random updates in random batches on random published bases; flushes and publications in between."""
    sent = first
    while sent < first + updates:
        batch = []
        for _ in range(int(rng.integers(1, 5))):
            base_version = int(rng.choice(sorted(bench.writer.published)[-4:]))
            delta = rng.standard_normal(bench.schema.size).astype(np.float32)
            batch.append(
                make_update(
                    delta,
                    codec=str(rng.choice(["float32", "float16", "q8"])),
                    device=DEVICES[int(rng.integers(len(DEVICES)))],
                    counter=sent,
                    base_version=base_version,
                    base_sha256=bench.writer.published[base_version],
                    num_examples=int(rng.integers(1, 500)),
                )
            )
            sent += 1
        bench.send(*batch)
        if rng.random() < 0.2:
            bench.journal.commit(bench.writer.flush())
        if rng.random() < 0.7:
            bench.publish()
    bench.publish()
    return sent


def published(bench):
    return {row.version: row.fingerprint for row in bench.journal.published()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=kind)
@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=kind)
def test_replay_gives_the_live_state_and_every_published_version(open_bench, aggregator, optimizer):
    settings = make_settings(
        aggregator=aggregator,
        server_optimizer=optimizer,
        publish=KEPT,
        update=Update(weight_by_examples=True),
    )
    bench = open_bench(settings)
    sent = a_run(bench, np.random.default_rng(1), 30)
    bench.snapshot()
    a_run(bench, np.random.default_rng(2), 30, first=sent)
    live, offered = bench.state, published(bench)
    assert live.version > 6

    replayed = {0: fingerprint(bench.plan.initial)}
    assert_same_state(
        bench.replay_from_start(
            lambda state: replayed.update({state.version: fingerprint(state.parameters)})
        ),
        live,
    )
    assert {version: replayed[version] for version in offered} == offered

    bench.close()
    from_snapshot = open_bench(settings)
    assert 0 < from_snapshot.recovered.replayed < from_snapshot.journal.last_sequence()
    assert_same_state(from_snapshot.state, live)


def test_a_run_interrupted_again_and_again_equals_one_that_was_not(open_bench):
    settings = make_settings(aggregator=FedBuff(goal=3), server_optimizer=Yogi(), publish=KEPT)
    whole = open_bench(settings, "whole")
    a_run(whole, np.random.default_rng(3), 30)
    bench = open_bench(settings, "pieces")
    for number, entry in whole.journal.entries_after(2):
        if isinstance(entry, UpdateEntry):
            (receipt,) = bench.send(entry.envelope)
            assert receipt.verdict is Verdict.APPLIED
        else:
            bench.journal.commit(bench.writer.flush())
        bench.publish()
        if number % 5 == 0:
            bench.close()
            bench = open_bench(settings, "pieces")
    assert_same_state(bench.state, whole.state)


CHANGES = [  # aggregator and server optimizer of the first run, then of the second
    (FedBuff(goal=4), SGD(), FedBuff(goal=2), SGD()),
    (FedBuff(goal=4), Adam(adaptivity=0.5), FedBuff(goal=4), Adam(adaptivity=0.01)),
    (FedBuff(goal=4), Adam(), FedAvg(cohort=3), Yogi(learning_rate=0.1)),
    (FedAvg(cohort=3), Momentum(), FedAsync(), SGD()),
    (FedAsync(), SGD(), FedBuff(goal=2), Momentum(momentum=0.5)),
    (FedBuff(goal=2), SGD(), FedAsync(), Yogi()),
]


@pytest.mark.parametrize("snapshot", [False, True], ids=["from-start", "from-snapshot"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(map(kind, change)))
def test_settings_changed_between_runs_are_journaled_and_replay_the_same(open_bench, change, snapshot):
    first, optimizer, second, next_optimizer = change
    before = make_settings(aggregator=first, server_optimizer=optimizer, publish=KEPT)
    after = make_settings(aggregator=second, server_optimizer=next_optimizer, publish=KEPT)
    bench = open_bench(before)
    sent = a_run(bench, np.random.default_rng(4), 14)
    if snapshot:
        bench.snapshot()
    bench.close()

    changed = open_bench(after)
    changed.publish()
    sent = a_run(changed, np.random.default_rng(5), 14, first=sent)
    rules = [entry.rules for _, entry in changed.journal.entries_after(0) if isinstance(entry, RulesEntry)]
    assert [(rule.aggregator, rule.server_optimizer) for rule in rules] == [
        (first, optimizer),
        (second, next_optimizer),
    ]
    changed.close()

    again = open_bench(after)
    assert_same_state(again.state, changed.state)
    assert_same_state(again.replay_from_start(), changed.state)


def rules_in(journal):
    return sum(isinstance(entry, RulesEntry) for _, entry in journal.entries_after(0))


def test_unchanged_settings_are_journaled_once(open_bench):
    for _ in range(3):
        open_bench().close()
    assert rules_in(open_bench().journal) == 1


def test_settings_that_change_no_rules_are_not_journaled(open_bench):
    open_bench().close()
    assert rules_in(open_bench(make_settings(flush_after_s=1.0)).journal) == 1


@pytest.mark.parametrize("snapshot_every", [5, 1000])
def test_recovery_needs_no_base_that_was_removed_meanwhile(open_bench, snapshot_every):
    """FedAsync needs bases; of 40 versions only the last two stay on disk, as a busy fleet's would."""
    settings = make_settings(
        aggregator=FedAsync(),
        publish=Publish(keep_versions=2),
        journal=JournalSettings(snapshot_every_updates=snapshot_every),
    )
    bench = open_bench(settings)
    for counter in range(1, 41):
        base_version = min(bench.writer.published)
        bench.send(
            make_update(
                constant(counter / 8),
                counter=counter,
                base_version=base_version,
                base_sha256=bench.writer.published[base_version],
            )
        )
        bench.publish()
        if counter % snapshot_every == 0:
            bench.snapshot()
        if counter == 38:
            bench.snapshot()
    live = bench.state
    bench.close()
    again = open_bench(settings)
    assert live.version == 40
    assert_same_state(again.state, live)
    assert_same_state(again.replay_from_start(), live)


def a_short_run(open_bench):
    settings = make_settings(aggregator=FedBuff(goal=2), publish=KEPT)
    bench = open_bench(settings)
    a_run(bench, np.random.default_rng(6), 12)
    bench.close()
    return settings


FIRST_UPDATE = 4  # after the rules, the plan's parameters and the publication of version 0


def tamper(tmp_path, change):
    """Rewrite the journal with other records, whole in every checksum."""
    directory = tmp_path / "state" / "journal"
    records = dict(History(directory).records_after(0))
    shutil.rmtree(directory)
    journal = Journal(directory)
    journal.add(*change(records).values())
    journal.close()


def tamper_update(tmp_path, **changes):
    def change(records):
        update = msgspec.structs.replace(records[FIRST_UPDATE], **changes)
        return {**records, FIRST_UPDATE: update}

    tamper(tmp_path, change)


@pytest.mark.parametrize("weight", [0.5, 1.0 - 2.0**-20])
def test_a_tampered_staleness_weight_is_noticed(open_bench, tmp_path, weight):
    settings = a_short_run(open_bench)
    tamper_update(tmp_path, staleness_weight=weight)
    with pytest.raises(ReplayMismatch, match=r"other parameters for version \d+ than were published"):
        open_bench(settings)


def test_a_tampered_importance_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper_update(tmp_path, importance=2.0)
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def without(records, number):
    return {each: record for each, record in records.items() if each != number}


def test_a_missing_entry_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper(tmp_path, lambda records: without(records, FIRST_UPDATE + 1))
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def test_an_entry_too_many_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper(tmp_path, lambda records: {**records, FIRST_UPDATE: FlushEntry()})
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def test_tampered_rules_are_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    rules = open_bench(settings, "elsewhere").recovered.state.rules
    other = msgspec.structs.replace(rules, server_optimizer=SGD(learning_rate=0.5))
    tamper(tmp_path, lambda records: {**records, 1: RulesEntry(other)})
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (FIRST_UPDATE, {"envelope": b"\x01"}),
        (FIRST_UPDATE, {"envelope": b""}),
        (FIRST_UPDATE, {"staleness_weight": float("inf")}),
        (FIRST_UPDATE, {"importance": 0.0}),
        (2, {"parameters": b"\0" * 12}),
        (2, {"parameters": b"\0" * 31}),
    ],
)
def test_an_entry_that_cannot_be_replayed_is_damage_and_named(open_bench, tmp_path, number, changes):
    settings = a_short_run(open_bench)
    tamper(
        tmp_path,
        lambda records: {**records, number: msgspec.structs.replace(records[number], **changes)},
    )
    with pytest.raises(JournalDamaged, match=rf"record {number} cannot be replayed"):
        open_bench(settings)


def test_every_flipped_byte_of_an_envelope_that_decides_on_the_model_is_noticed(open_bench, tmp_path):
    """The payload is all that replay takes from an envelope, but for the codec's name."""
    settings = a_short_run(open_bench)
    envelope = dict(History(tmp_path / "state" / "journal").entries_after(0))[FIRST_UPDATE].envelope
    for place in range(len(envelope) - 8, len(envelope)):
        flipped = envelope[:place] + struct.pack("B", envelope[place] ^ 0x10) + envelope[place + 1 :]
        assert hashlib.sha256(flipped).digest() != hashlib.sha256(envelope).digest()
        tamper_update(tmp_path, envelope=flipped)
        with pytest.raises(JournalDamaged, match=f"record {FIRST_UPDATE}"):
            open_bench(settings)
    tamper_update(tmp_path, envelope=envelope)
    assert open_bench(settings).state.version > 0


def test_a_base_that_is_kept_only_as_devices_hold_it_is_made_anew(open_bench):
    """FedAsync needs it as it was aggregated; that file was lost, and the snapshot is of a later version."""
    settings = make_settings(aggregator=FedAsync(mixing=0.5), publish=KEPT)
    bench = open_bench(settings)
    bench.send(make_update(constant(0.3)))
    aggregated, held = bench.state.parameters, bench.state.parameters + np.float32(0.25)
    bench.recovered.models.save(1, held, exact=aggregated)
    bench.journal.add_published(Published(1, fingerprint(held), 0.0, fingerprint(aggregated)), keep=1000)
    bench.writer.published[1] = fingerprint(held)
    bench.send(make_update(constant(0.2), counter=2))
    bench.snapshot()
    bench.send(make_update(constant(0.1), counter=3, base_version=1, base_sha256=fingerprint(held)))
    live = bench.state
    assert live.version == 3
    bench.close()
    (exact,) = (bench.recovered.models._directory.parent / "exact").iterdir()
    exact.unlink()
    assert_same_state(open_bench(settings).state, live)


def test_an_update_whose_base_is_no_longer_on_disk_is_refused_and_the_next_one_counts(tmp_path):
    """FedAsync needs the base; a file that somebody removed must not end the coordinator at each update."""
    bench = Bench(tmp_path, make_settings(aggregator=FedAsync(mixing=0.5)))
    bench.send(make_update(counter=1))
    bench.publish()
    bench.close()
    (tmp_path / "models" / "000000000001.safetensors").unlink()
    again = Bench(tmp_path, make_settings(aggregator=FedAsync(mixing=0.5)))
    fingerprint_1 = again.writer.published[1]
    (receipt,) = again.send(make_update(counter=2, base_version=1, base_sha256=fingerprint_1))
    assert (receipt.verdict, receipt.reason) == (Verdict.REJECTED, Reason.UNKNOWN_BASE)
    assert "version 1, whose parameters are no longer kept" in receipt.detail
    again.publish()  # as the service does at its start
    (receipt,) = again.send(make_update(counter=3, base_version=1, base_sha256=fingerprint_1))
    assert receipt.verdict is Verdict.APPLIED
    again.close()


@pytest.mark.parametrize("later", [FedAsync(mixing=0.5), FedBuff(goal=1)], ids=["the same", "other rules"])
def test_a_base_is_kept_as_long_as_a_replay_from_the_newest_snapshot_needs_it(tmp_path, later):
    """Of a busy fleet on a small disk: an update's base is older than the oldest snapshot that is kept."""
    settings = make_settings(
        aggregator=FedAsync(mixing=0.5),
        publish=Publish(keep_versions=2, format="float32"),
        journal=JournalSettings(keep_bytes=1),
    )
    bench = Bench(tmp_path, settings)
    bench.send(make_update(counter=1))
    bench.publish()
    first = bench.writer.published[1]
    for counter in range(2, 8):
        bench.send(make_update(counter=counter, base_version=1, base_sha256=first))
        if counter % 2 == 0:
            bench.snapshot()
    bench.close()
    settings = msgspec.structs.replace(settings, aggregator=later)
    bench = Bench(tmp_path, settings)
    for counter in range(8, 12):
        bench.publish()
        newest = max(bench.writer.published)
        fresh = {"base_version": newest, "base_sha256": bench.writer.published[newest]}
        bench.send(make_update(counter=counter, **fresh))
    live = bench.state
    bench.close()
    again = Bench(tmp_path, settings)
    assert_same_state(again.state, live)
    for _ in range(2):
        again.snapshot()
        again.journal.next_epoch()
        again.publish()
    assert len(list((tmp_path / "models").iterdir())) <= 4  # and then they go
    again.close()
