"""From a sensor's topic over a real broker and the ring on disk to a trained autoencoder, without a label."""

import asyncio
import math

import msgspec
import numpy as np

from edge_agent.data_sources import Sensor
from edge_agent.plan_runtime import Trainer
from edge_agent.readings import Channel
from edge_agent.sensor_listener import Listening, SensorListener
from edge_agent.window_ring import read_ring
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.link import Broker, Session, Traffic
from fedtide.wire.mqtt import MqttDialler

READINGS = 801
FAILED = 400
# Windows of 4 rows, one every 2 rows; the failed reading leaves 400 rows on either side: 2 · (1 + 396 / 2).
WINDOWS = 398


def reading(index):
    """A room that warms and cools, the heating that follows it, and once a sensor that fails."""
    warmth = math.sin(index / 7)
    watts = b'"unavailable"' if index == FAILED else b"%g" % (1000 - 800 * warmth)
    return b'{"temperature":%g,"heating":{"watts":%s}}' % (20 + 5 * warmth, watts)


async def publish_and_listen(source, broker):
    """Publish the readings while the listener listens, until all windows are on disk."""
    dial = MqttDialler(broker, Traffic())
    listening = Listening(
        source.sampling, broker, "listener", source.path, source.layout, source.max_bytes, source.flush_s
    )
    listener = SensorListener(listening, dial, np.random.default_rng(1), UNSYNCED_DISK)
    task = asyncio.create_task(listener.run())
    sensor = await dial(Session("sensor", clean_start=True, expiry_s=0, receive_maximum=8, will=None), 0)
    try:
        async with asyncio.timeout(30):
            await asyncio.wait_for(listener.connected.wait(), 10)
            for index in range(READINGS):
                await sensor.publish("room/living", reading(index))
            while len(read_ring(source.path, source.layout).windows) < WINDOWS:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sensor.close()


def test_an_autoencoder_learns_what_a_sensor_publishes(autoencoder, broker, tmp_path):
    source = Sensor(
        path=tmp_path / "ring",
        channels=(
            Channel(topic="room/living", field="temperature", mean=20, deviation=5),
            Channel(topic="room/living", field="heating.watts", mean=1000, deviation=800),
        ),
        window=4,
        stride=2,
        flush_s=0.05,
    )
    asyncio.run(publish_and_listen(source, Broker(hosts=(f"{broker.host}:{broker.port}",))))
    manifest = autoencoder.plan.manifest
    dataset = source.load(manifest)
    assert dataset.inputs[0].shape == (WINDOWS, 8)
    assert np.abs(dataset.inputs[0]).max() < 1.001  # the scale takes the sine back to itself
    np.testing.assert_allclose(dataset.inputs[0][:, ::2], -dataset.inputs[0][:, 1::2], atol=1e-4)

    trainer, rng = Trainer(autoencoder.plan), np.random.default_rng(2)
    first, later = (
        trainer.run_epochs(
            autoencoder.initial, dataset, msgspec.structs.replace(manifest.training, local_epochs=epochs), rng
        )
        for epochs in (1, 20)
    )
    assert later.num_examples == WINDOWS
    assert later.loss < 0.2 * first.loss
