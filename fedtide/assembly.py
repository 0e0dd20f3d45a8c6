"""Putting the parts together: the one place that knows both sides."""

import asyncio
import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from edge_agent.agent import Agent, Workbench
from edge_agent.data_sources import DataSource, Reader, Sensor
from edge_agent.dataset import Dataset
from edge_agent.evaluation import InAThread
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.plan_trial import PlanTrial
from edge_agent.sensor_listener import Listening, SensorListener
from edge_agent.settings import TRIAL_FILE, AgentSettings
from fedtide.wire.ids import PlanId
from fedtide.wire.link import Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.plan import Plan, PlanManifest
from fedtide.wire.signatures import SigningKey

T = TypeVar("T")

log = logging.getLogger(__name__)

EXIT_PLAN_DOES_NOT_STOP: Final = 70
"""EX_SOFTWARE of sysexits.h."""


def make_agent(settings: AgentSettings) -> Agent:
    """An agent for this machine.

    Raises:
        FileNotFoundError, ValueError: its key is missing or not a key.
    """
    rng = np.random.default_rng()
    leave_plan = partial(end_process, settings.state / TRIAL_FILE)
    bench = Workbench(
        dial=MqttDialler(settings.broker, Traffic()),
        examples=CachedExamples(settings.data),
        trainer=CachedTrainer(settings.training.threads, settings.training.memory_bytes, leave_plan),
        compute=in_a_thread,
        rng=rng,
        evaluate=InAThread(settings.training.memory_bytes, leave_plan),
        read=InOneThread(),
        beside=sensor_listener(settings, rng).run if isinstance(settings.data, Sensor) else None,
    )
    settings.state.mkdir(parents=True, exist_ok=True)
    return Agent(settings, SigningKey.load(settings.key), bench)


def end_process(note: Path, plan: PlanId, reason: str) -> None:
    """Note that a plan is not to be run again, and end this process: nothing else stops what it runs.

    The service starts it again, and the agent then reports the plan as refused.
    """
    try:
        PlanTrial(note).refuse(plan, reason)
    except OSError:
        log.exception("That this plan does not stop could not be noted", extra={"event": "disk.failed"})
    log.critical("%s; the agent ends itself", reason, extra={"event": "plan.endless"})
    os._exit(EXIT_PLAN_DOES_NOT_STOP)


async def in_a_thread(work: Callable[[], LocalResult]) -> LocalResult:
    """Train beside the event loop, so that the connection stays alive."""
    return await asyncio.to_thread(work)


class InOneThread:
    """Reads examples beside the event loop, so that the connection stays alive while a large table is read.

    Always the same thread: what an owner's class holds, such as a database, may be for one thread only.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "examples")

    async def __call__(self, work: Callable[[], T]) -> T:
        """See :class:`edge_agent.data_sources.base.Read`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def sensor_listener(settings: AgentSettings, rng: np.random.Generator) -> SensorListener:
    """What listens to the sensors of an agent whose data source is ``sensor``."""
    data = settings.data
    assert isinstance(data, Sensor)
    broker = data.broker or settings.broker
    listening = Listening(
        sampling=data.sampling,
        broker=broker,
        client_id=f"{settings.fleet}-{settings.device}-sensors",
        ring=data.path,
        layout=data.layout,
        max_bytes=data.max_bytes,
        flush_s=data.flush_s,
    )
    return SensorListener(listening, MqttDialler(broker, Traffic()), rng)


@dataclass
class CachedExamples:
    """Reads a data source anew only when it has changed, or for a plan that takes other shapes."""

    source: DataSource
    _reader: Reader | None = field(default=None, repr=False)
    _stamp: Hashable = None
    _shapes: Hashable = field(default=None, repr=False)
    _dataset: Dataset | None = field(default=None, repr=False)

    def __call__(self, manifest: PlanManifest) -> Dataset:
        """The examples, fitted to the plan.

        Raises:
            DataError: they cannot be read or do not fit.
        """
        if self._reader is None:
            self._reader = self.source.opened()
        stamp, shapes = self._reader.changed_since(self._stamp), (manifest.inputs, manifest.targets)
        if self._dataset is None or stamp is not None or shapes != self._shapes:
            before = self._dataset.skipped if self._dataset else ()
            self._dataset = self._reader.load(manifest)
            self._stamp, self._shapes = self._stamp if stamp is None else stamp, shapes
            if self._dataset.skipped not in {(), before}:
                log.warning(
                    "Skipped in the data source: %s", "; ".join(map(str, self._dataset.skipped)),
                    extra={"event": "examples.skipped"},
                )  # fmt: skip
        return self._dataset


@dataclass
class CachedTrainer:
    """Makes a trainer anew only when the plan has changed."""

    threads: int
    memory_bytes: int | None = None
    leave_plan: Callable[[PlanId, str], None] | None = None
    _trainer: Trainer | None = field(default=None, repr=False)

    def __call__(self, plan: Plan) -> Trainer:
        """The plan's trainer.

        Raises:
            PlanRefused: the device will not run the plan.
        """
        if self._trainer is None or self._trainer.plan.id != plan.id:
            give_up = None if self.leave_plan is None else partial(self.leave_plan, plan.id)
            self._trainer = None  # its memory, before the new one takes as much
            self._trainer = Trainer(plan, self.threads, memory_bytes=self.memory_bytes, give_up=give_up)
        return self._trainer
