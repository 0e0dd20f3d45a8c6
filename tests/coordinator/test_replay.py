"""Replay gives what was live, to the bit: every aggregator with every server optimizer."""

import hashlib
import sqlite3
import struct

import msgspec
import numpy as np
import pytest
from small_fleet import DEVICES, assert_same_state, constant, make_settings, make_update

from coordinator.aggregation import FedAsync, FedAvg, FedBuff
from coordinator.entries import RulesEntry, UpdateEntry
from coordinator.journal import JournalDamaged, Published
from coordinator.replay import ReplayMismatch
from coordinator.server_optimizers import SGD, Adam, Momentum, Yogi
from coordinator.settings import Journal, Publish, Update
from fedtide.wire.messages import Verdict
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
    for number, entry in whole.journal.entries_after(1):
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


def test_unchanged_settings_are_journaled_once(open_bench):
    for _ in range(3):
        open_bench().close()
    assert open_bench().journal.last_sequence() == 1


def test_settings_that_change_no_rules_are_not_journaled(open_bench):
    open_bench().close()
    assert open_bench(make_settings(flush_after_s=1.0)).journal.last_sequence() == 1


@pytest.mark.parametrize("snapshot_every", [5, 1000])
def test_recovery_needs_no_base_that_was_removed_meanwhile(open_bench, snapshot_every):
    """FedAsync needs bases; of 40 versions only the last two stay on disk, as a busy fleet's would."""
    settings = make_settings(
        aggregator=FedAsync(),
        publish=Publish(keep_versions=2),
        journal=Journal(snapshot_every_updates=snapshot_every),
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


def tamper(tmp_path, statement, *values):
    with sqlite3.connect(tmp_path / "state" / "journal.sqlite") as database:
        assert database.execute(statement, values).rowcount == 1
    database.close()


def envelope_of(tmp_path, sequence):
    with sqlite3.connect(tmp_path / "state" / "journal.sqlite") as database:
        (body,) = database.execute("SELECT body FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    database.close()
    return body


@pytest.mark.parametrize("weight", [0.5, 1.0 - 2.0**-20])
def test_a_tampered_staleness_weight_is_noticed(open_bench, tmp_path, weight):
    settings = a_short_run(open_bench)
    tamper(tmp_path, "UPDATE entries SET staleness_weight = ? WHERE sequence = 2", weight)
    with pytest.raises(ReplayMismatch, match=r"other parameters for version \d+ than were published"):
        open_bench(settings)


def test_a_tampered_importance_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper(tmp_path, "UPDATE entries SET importance = 2.0 WHERE sequence = 2")
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def test_a_missing_entry_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper(tmp_path, "DELETE FROM entries WHERE sequence = 3")
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def test_an_entry_too_many_is_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    tamper(tmp_path, "UPDATE entries SET kind = 'flush' WHERE sequence = 2")
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


def test_tampered_rules_are_noticed(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    body = open_bench(settings, "elsewhere").recovered.state.rules
    other = msgspec.structs.replace(body, server_optimizer=SGD(learning_rate=0.5))
    tamper(tmp_path, "UPDATE entries SET body = ? WHERE sequence = 1", other.to_bytes())
    with pytest.raises(ReplayMismatch):
        open_bench(settings)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = x'01' WHERE sequence = 2",
        "UPDATE entries SET body = NULL WHERE sequence = 2",
        "UPDATE entries SET staleness_weight = 1e999 WHERE sequence = 2",
        "UPDATE entries SET staleness_weight = NULL WHERE sequence = 2",
        "UPDATE entries SET importance = 0 WHERE sequence = 2",
        "UPDATE entries SET body = x'7b7d' WHERE sequence = 1",
        "UPDATE entries SET body = NULL WHERE sequence = 1",
        "UPDATE entries SET kind = 'teleport' WHERE sequence = 2",
    ],
)
def test_an_entry_that_cannot_be_replayed_is_damage_and_named(open_bench, tmp_path, statement):
    settings = a_short_run(open_bench)
    tamper(tmp_path, statement)
    with pytest.raises(JournalDamaged, match=rf"entry {statement[-1]}\b"):
        open_bench(settings)


def test_every_flipped_byte_of_an_envelope_that_decides_on_the_model_is_noticed(open_bench, tmp_path):
    """The payload is all that replay takes from an envelope, but for the codec's name."""
    settings = a_short_run(open_bench)
    envelope = envelope_of(tmp_path, 2)
    for place in range(len(envelope) - 8, len(envelope)):
        flipped = envelope[:place] + struct.pack("B", envelope[place] ^ 0x10) + envelope[place + 1 :]
        assert hashlib.sha256(flipped).digest() != hashlib.sha256(envelope).digest()
        tamper(tmp_path, "UPDATE entries SET body = ? WHERE sequence = 2", flipped)
        with pytest.raises(JournalDamaged, match="entry 2"):
            open_bench(settings)
    tamper(tmp_path, "UPDATE entries SET body = ? WHERE sequence = 2", envelope)
    assert open_bench(settings).state.version > 0


def test_overwritten_pages_are_damage(open_bench, tmp_path):
    settings = a_short_run(open_bench)
    path = tmp_path / "state" / "journal.sqlite"
    content = bytearray(path.read_bytes())
    content[32_768:] = b"\x55" * (len(content) - 32_768)  # all but the first page
    path.write_bytes(bytes(content))
    with pytest.raises(JournalDamaged):
        open_bench(settings)


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
