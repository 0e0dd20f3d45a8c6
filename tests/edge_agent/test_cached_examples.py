"""What a real agent is assembled with: examples read only when they change, and a sensor's listener."""

import asyncio
import logging
import os
import threading
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, DEVICE_KEY, agent_settings, tiny_plan

from edge_agent.data_sources import Csv, Custom, DataError, Npz
from edge_agent.settings import AgentSettings
from fedtide.assembly import CachedExamples, InOneThread, make_agent, sensor_listener
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.settings import parse

AUTOENCODER: Final = msgspec.structs.replace(tiny_plan().manifest, targets=None)
FLAT: Final = msgspec.structs.replace(
    AUTOENCODER, inputs=(TensorSpec(name="x0", dtype="float32", shape=(None, 1, 2)),)
)
LABELLED: Final = msgspec.structs.replace(
    AUTOENCODER, targets=TensorSpec(name="y", dtype="int64", shape=(None,))
)


def put(path: Path, text: str, at: int) -> None:
    path.write_text(text)
    os.utime(path, (at, at))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    put(tmp_path / "a.csv", "a,b,label\n1,2,0\n3,4,1\n", 1)
    return tmp_path / "a.csv"


def test_a_source_is_read_anew_only_when_it_has_changed(table: Path) -> None:
    examples = CachedExamples(Csv(path=table))
    first = examples(AUTOENCODER)
    assert examples(AUTOENCODER) is first
    put(table, "a,b,label\n1,2,0\n3,4,1\n5,6,1\n", 2)
    assert len(examples(AUTOENCODER)) == 3


def test_a_plan_that_takes_other_shapes_reads_anew(table: Path) -> None:
    examples = CachedExamples(Csv(path=table))
    assert examples(AUTOENCODER).inputs[0].shape == (2, 2)
    assert examples(FLAT).inputs[0].shape == (2, 1, 2)
    targets = examples(LABELLED).targets
    assert targets is not None
    assert targets.tolist() == [0, 1]
    assert examples(AUTOENCODER).targets is None


def test_a_source_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    examples = CachedExamples(Npz(path=tmp_path / "a.npz"))
    with pytest.raises(DataError, match="No such file"):
        examples(AUTOENCODER)
    (tmp_path / "a.npz").write_bytes(b"PK")
    for _ in range(2):
        with pytest.raises(DataError):
            examples(AUTOENCODER)
    np.savez(tmp_path / "a.npz", x=np.ones((2, 2)))
    assert len(examples(AUTOENCODER)) == 2


def test_what_is_skipped_is_told_once_and_again_when_it_changes(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    examples = CachedExamples(Csv(path=table))
    examples(AUTOENCODER)
    assert caplog.messages == []
    put(table, "a,b,label\n1,2,0\nx,4,1\n", 2)
    examples(AUTOENCODER)
    put(table, "a,b,label\n1,2,0\nx,4,1\n5,6,1\n", 3)
    examples(AUTOENCODER)
    told = "Skipped in the data source: 1 not a number (first: line 3, column 'a': 'x' is not a number)"
    assert caplog.messages == [told]
    put(table, "a,b,label\n1,2,0\nx,4,1\n5,6,1\n7,y,1\n", 4)
    examples(AUTOENCODER)
    assert caplog.messages == [told, told.replace("1 not", "2 not")]


def test_a_class_of_the_owners_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "made_once.py").write_text(
        "from edge_agent.data_sources import Examples\n"
        "class Source:\n"
        "    made = 0\n"
        "    def __init__(self): Source.made += 1\n"
        "    def stamp(self): return object()\n"
        "    def examples(self): return Examples(inputs=[[Source.made, 2]])\n"
    )
    examples = CachedExamples(Custom(class_=tmp_path / "made_once:Source"))
    assert [examples(AUTOENCODER).inputs[0].tolist() for _ in range(3)] == [[[1, 2]]] * 3


SENSOR: Final = f"""
fleet = "pumps"
device = "pump-7"
coordinator_key = "{COORDINATOR_KEY.public}"
key = "device.key"
state = "state"
[broker]
hosts = ["192.0.2.1:1883"]
[data]
kind = "sensor"
path = "windows"
window = 8
channels = [{{topic = "a"}}]
"""


def test_a_sensors_listener_has_the_fleets_broker_unless_it_has_its_own(tmp_path: Path) -> None:
    DEVICE_KEY.save(tmp_path / "device.key")
    rng = np.random.default_rng(1)
    shared = parse(SENSOR, AgentSettings, "agent.toml", tmp_path)
    own = parse(f'{SENSOR}[data.broker]\nhosts = ["192.0.2.2:1883"]', AgentSettings, "agent.toml", tmp_path)
    hosts = [sensor_listener(settings, rng).listening.broker.hosts for settings in (shared, own)]
    assert hosts == [("192.0.2.1:1883",), ("192.0.2.2:1883",)]
    assert sensor_listener(shared, rng).listening.client_id == "pumps-pump-7-sensors"
    make_agent(shared)
    assert not (tmp_path / "windows").exists()


def test_examples_are_read_beside_the_event_loop_always_in_one_thread() -> None:
    read, goes_on = InOneThread(), threading.Event()

    async def main() -> None:
        waiting = asyncio.create_task(read(lambda: (goes_on.wait(5.0), threading.get_ident())))
        await asyncio.sleep(0)
        goes_on.set()  # nobody would, were the loop waiting
        went_on, thread = await waiting
        assert went_on
        assert thread != threading.get_ident()
        assert await read(threading.get_ident) == thread

    asyncio.run(main())


def test_an_agent_of_this_machine_reads_its_examples_that_way(tmp_path: Path) -> None:
    DEVICE_KEY.save(tmp_path / "device.key")
    agent = make_agent(agent_settings(tmp_path))
    assert isinstance(agent._bench.read, InOneThread)
