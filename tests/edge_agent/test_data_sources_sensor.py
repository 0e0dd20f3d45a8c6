"""What a sensor's ring holds becomes examples; settings that cannot work are refused."""

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan

from edge_agent.data_sources import DataError, DataSource, Sensor
from edge_agent.readings import Channel
from edge_agent.window_ring import WindowRing
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.link import Broker
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import SettingsError, parse

CHANNELS: Final = (
    Channel(topic="a", field="t", mean=20, deviation=5),
    Channel(topic="a", field="p", deviation=10),
)


def taking(*shape: int) -> PlanManifest:
    wanted = TensorSpec(name="x0", dtype="float32", shape=(None, *shape))
    return msgspec.structs.replace(tiny_plan().manifest, inputs=(wanted,), targets=None)


def filled(source: Sensor, *windows: Any) -> Sensor:
    ring = WindowRing(source.path, source.layout, source.max_bytes, UNSYNCED_DISK)
    ring.append(np.array(windows, np.float32).reshape(len(windows), -1))
    return source


def test_windows_are_scaled_when_they_are_read(tmp_path: Path) -> None:
    source = filled(Sensor(path=tmp_path, channels=CHANNELS, window=2), [[20, 0], [25, 10]])
    # (20 − 20) / 5 = 0, (25 − 20) / 5 = 1; 0 / 10 = 0, 10 / 10 = 1
    assert source.load(taking(4)).inputs[0].tolist() == [[0, 0, 1, 1]]
    rescaled = msgspec.structs.replace(source, channels=tuple(Channel(topic="a", field=f) for f in "tp"))
    assert rescaled.load(taking(4)).inputs[0].tolist() == [[20, 0, 25, 10]]


def test_windows_are_turned_as_the_plan_takes_them(tmp_path: Path) -> None:
    source = Sensor(path=tmp_path, channels=(Channel(topic="a", field="t"), Channel(topic="a")), window=3)
    filled(source, [[1, 4], [2, 5], [3, 6]])
    assert source.load(taking(2, 3)).inputs[0].tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert source.load(taking(3, 2)).inputs[0].tolist() == [[[1, 4], [2, 5], [3, 6]]]
    with pytest.raises(DataError, match=r"the plan takes \(7,\)"):
        source.load(taking(7))


def test_before_the_first_window_there_are_no_examples_yet(tmp_path: Path) -> None:
    source = Sensor(path=tmp_path / "not made yet", channels=CHANNELS, window=2)
    dataset = source.load(taking(4))
    assert len(dataset) == 0
    assert dataset.newest == 0
    assert source.changed_since(source.changed_since(None)) is None


def test_new_windows_are_counted_over_those_that_are_gone(tmp_path: Path) -> None:
    source = Sensor(path=tmp_path, channels=CHANNELS, window=2, max_bytes=1024)
    ring = WindowRing(tmp_path, source.layout, source.max_bytes, UNSYNCED_DISK)
    ring.append(np.ones((100, 4), np.float32))
    first = source.load(taking(4))
    assert len(first) < 100
    assert first.newest == 100
    ring.append(np.ones((7, 4), np.float32))
    assert source.load(taking(4)).new_since(first.newest) == 7


def test_damaged_windows_are_counted(tmp_path: Path) -> None:
    source = filled(Sensor(path=tmp_path, channels=CHANNELS, window=1), [1, 2], [3, 4], [5, 6])
    [segment] = tmp_path.iterdir()
    content = bytearray(segment.read_bytes())
    content[-1 - 12] ^= 1  # in the second of three records of 4 + 2 · 4 bytes
    segment.write_bytes(content)
    dataset = source.load(taking(2))
    assert len(dataset) == 2
    assert [(skip.reason, skip.count) for skip in dataset.skipped] == [("damaged on disk", 1)]


def test_a_plan_with_labels_is_refused(tmp_path: Path) -> None:
    labelled = msgspec.structs.replace(taking(4), targets=tiny_plan().manifest.targets)
    with pytest.raises(DataError, match="windows of a sensor have no labels, and the plan takes 'y'"):
        Sensor(path=tmp_path, channels=CHANNELS, window=2).load(labelled)


def test_other_channels_have_another_ring_and_another_scale_has_not(tmp_path: Path) -> None:
    source = Sensor(path=tmp_path, channels=CHANNELS, window=2)
    rescaled = tuple(Channel(topic="a", field=field, mean=1) for field in ("t", "p"))
    turned = CHANNELS[::-1]

    def layout(**changes: Any) -> bytes:
        return msgspec.structs.replace(source, **changes).layout.id

    same = layout(channels=rescaled, stride=1, stale_s=5.0, max_bytes=2**20)
    assert same == source.layout.id
    others = {layout(channels=turned), layout(window=3), layout(every_s=5.0)}
    assert len(others | {same}) == 4


def read(text: str) -> DataSource:
    class Settings(msgspec.Struct):
        data: DataSource

    text = f'[data]\nkind = "sensor"\npath = "windows"\nwindow = 8\n{text}'
    return parse(text, Settings, "agent.toml", Path("/var/lib/pump")).data


def test_sensors_are_described_in_toml() -> None:
    text = """
        stride = 4
        every_s = 10
        stale_s = 600
        min_new_examples = 20
        [[data.channels]]
        topic = "zigbee2mqtt/kitchen"
        field = "temperature"
        mean = 20
        deviation = 5
        [[data.channels]]
        topic = "tele/plug/SENSOR"
        field = "ENERGY.Power"
        [data.broker]
        hosts = ["192.0.2.7:1883"]
    """
    assert read(text) == Sensor(
        path=Path("/var/lib/pump/windows"),
        window=8,
        stride=4,
        every_s=10.0,
        stale_s=600.0,
        min_new_examples=20,
        channels=(
            Channel(topic="zigbee2mqtt/kitchen", field="temperature", mean=20.0, deviation=5.0),
            Channel(topic="tele/plug/SENSOR", field="ENERGY.Power"),
        ),
        broker=Broker(hosts=("192.0.2.7:1883",)),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("channels = []", "at `$.data.channels`"),
        ('channels = [{topic = "a", fields = "b"}]', "unknown field `fields` - at `$.data.channels[0]`"),
        ('channels = [{topic = "a/#/b"}]', "'a/#/b' is no topic filter"),
        ('channels = [{topic = "a", field = "b..c"}]', "'b..c' has an empty name"),
        ('channels = [{topic = "a", deviation = -1}]', "> 0.0 - at `$.data.channels[0].deviation`"),
        ('channels = [{topic = "a"}, {topic = "b"}]', "channels on 2 topics need every_s"),
        ('channels = [{topic = "a"}]\nevery_s = 0', ">= 0.01 - at `$.data.every_s`"),
        (
            'channels = [{topic = "a"}]\nmax_bytes = 1024\nmin_new_examples = 15',
            "keeps 14 windows of this size; 15",
        ),
        ('channels = [{topic = "a"}]\nbroker = {host = "x"}', "unknown field `host` - at `$.data.broker`"),
    ],
)
def test_a_mistake_in_a_sensors_settings_is_named(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(text)
    assert complaint in str(refused.value)
