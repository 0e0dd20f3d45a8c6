"""The operator puts another plan in place while devices hold updates of the old one: nothing is mixed."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from whole_fleet import assert_balanced, coordinator_here, make_fleet, simulated, until

from coordinator.entries import ResetEntry, UpdateEntry
from coordinator.journal import History
from coordinator.model_state import initial_state
from coordinator.plan.file import BuiltPlan, load, save
from coordinator.replay import apply_entry
from coordinator.settings import Rules
from fedtide.wire import topics
from fedtide.wire.envelope import open_update
from fedtide.wire.link import Session, Traffic
from fedtide.wire.messages import Head
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import Schema
from fedtide.wire.plan import Plan
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN

GATE = "[release]\nmetric_at_least = 0.05\n"


def another_plan(path, name):
    """Of the same shape, so that nothing but its id tells its updates apart, and from another start."""
    built = load(path)
    manifest = msgspec.structs.replace(built.plan.manifest, name=name)
    plan = Plan(manifest, built.plan.train, built.plan.evaluation)
    save(BuiltPlan(plan, (built.initial * 0.5).astype(np.float32)), path)
    return plan.id


@dataclass
class Heads:
    """Every head that the coordinator publishes, in order."""

    fleet: object
    seen: list[Head] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def listening(self):
        connection = await MqttDialler(self.fleet.broker, Traffic())(Session("heads", True, 0, 32, None), 0)
        await connection.subscribe([topics.HEAD.name(self.fleet.name)])
        task = asyncio.create_task(self._listen(connection))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await connection.close()

    async def _listen(self, connection):
        async for delivery in connection.deliveries():
            connection.acknowledge(delivery)
            self.seen.append(unseal(delivery.payload, Head, self.fleet.key, HEAD_DOMAIN))


def walk(fleet):
    """Hold each entry of the journal against the plan in force there; each plan's updates, and its start."""
    settings = fleet.settings()
    rules = Rules(aggregator=settings.aggregator, server_optimizer=settings.server_optimizer)
    state, schema, plan = initial_state(np.zeros(0, np.float32), rules), Schema(tensors=()), None
    applied, since = {}, {}
    for _, entry in History(fleet.directory.state / "journal").entries_after(0):
        if isinstance(entry, ResetEntry):
            assert state.buffer.count == 0, "a sum that was not finished is thrown away"
            assert plan is None or entry.version > state.version
            plan, schema = entry.plan, entry.schema
            since[plan] = entry.version
        elif isinstance(entry, UpdateEntry):
            header = open_update(entry.envelope, len(entry.envelope)).header
            assert header.plan == plan
            assert since[plan] <= header.base_version <= state.version
            applied[plan] = applied.get(plan, 0) + 1
        state = apply_entry(state, entry, schema, lambda _: None)
    return applied, since


def change_plans_in_mid_flight(fleet, *names):
    """Plan after plan, each for a few updates; their ids, the last status, and all heads."""
    heads, file = Heads(fleet), fleet.directory.path / "model.plan"
    plans = [load(file).plan.id]

    async def some_updates():
        async with coordinator_here(fleet) as (service, _):
            accounting = service.committer.accounting
            target = accounting.applied + 20
            await until(lambda: accounting.applied >= target, 30, lambda: service.status("running"))
            return service.status("running")

    async def scenario():
        async with heads.listening(), simulated(fleet):
            seen = await some_updates()
            for name in names:
                # The coordinator is away; the devices train on, and hold updates of the old plan.
                plans.append(another_plan(file, name))
                seen = await some_updates()
        return seen

    return plans, asyncio.run(scenario()), heads.seen


def assert_nothing_is_mixed(fleet, plans, seen, heads):
    applied, since = walk(fleet)
    assert list(since) == plans
    assert set(applied) == set(plans)
    assert seen.updates.applied <= sum(applied.values())
    assert seen.updates.rejected["unknown-plan"] >= len(plans) - 1
    assert_balanced(seen.updates)
    assert_heads_are_of_one_plan_each(heads, since)
    assert seen.rollbacks == 0


def assert_heads_are_of_one_plan_each(heads, since):
    versions = [head.version for head in heads]
    assert versions == sorted(versions)
    assert list(dict.fromkeys(head.plan for head in heads)) == list(since)
    for head in heads:
        first = since[head.plan]
        assert head.version >= first
        assert all(delta.from_version >= first for delta in head.deltas)
        assert head.release is None or head.release.version >= first
    assert all(any(head.release for head in heads if head.plan == plan) for plan in since)


def test_updates_of_the_old_plan_are_rejected_and_the_devices_go_on_with_the_new_one(
    digits, broker, tmp_path
):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=4, more=GATE)
    assert_nothing_is_mixed(fleet, *change_plans_in_mid_flight(fleet, "digits-2"))


@pytest.mark.long
def test_plan_after_plan_nothing_is_mixed(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=8, goal=5, more=GATE)
    names = [f"digits-{number}" for number in range(2, 8)]
    assert_nothing_is_mixed(fleet, *change_plans_in_mid_flight(fleet, *names))
