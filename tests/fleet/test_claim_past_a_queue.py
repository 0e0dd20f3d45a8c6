"""A coordinator takes no update before its own state has come back, which comes past all that are queued."""

import asyncio

from whole_fleet import assert_balanced, coordinator_here, make_fleet, until

from fedtide.wire import topics
from fedtide.wire.link import Session, Traffic
from fedtide.wire.mqtt import MqttDialler

QUEUED = 200
"""Six times as many as the broker may have under way to the coordinator at once."""


def test_a_queue_of_updates_does_not_keep_the_coordinator_from_its_claim(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=0)

    async def connected(service):
        await until(
            lambda: service.status("running").connected, 20, lambda: "no claim past the queue was heard"
        )

    async def scenario():
        async with coordinator_here(fleet) as (service, _):
            await connected(service)  # from here on the broker queues for its session
        dial = MqttDialler(fleet.broker, Traffic())
        device = await dial(Session("device", True, 0, 32, None), 0)
        topic = topics.UPDATE.name(fleet.name, shard=0, device="device-9")
        await asyncio.gather(*(device.publish(topic, b"no update %d" % number) for number in range(QUEUED)))
        await device.close()
        async with coordinator_here(fleet) as (service, _):
            await connected(service)
            accounting = service.committer.accounting
            await until(
                lambda: accounting.received >= QUEUED and not accounting.waiting, 20, lambda: accounting
            )
            return service.status("running").updates

    updates = asyncio.run(scenario())
    assert_balanced(updates)
    assert updates.received == QUEUED
