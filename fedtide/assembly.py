"""Putting the parts together: the one place that knows both sides."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edge_agent.agent import Agent, Workbench
from edge_agent.data_sources import DataSource
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.settings import AgentSettings
from fedtide.wire.link import Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.plan import Plan, PlanManifest
from fedtide.wire.signatures import SigningKey


def make_agent(settings: AgentSettings) -> Agent:
    """An agent for this machine.

    Raises:
        FileNotFoundError, ValueError: its key is missing or not a key.
    """
    bench = Workbench(
        dial=MqttDialler(settings.broker, Traffic()),
        examples=CachedExamples(settings.data),
        trainer=CachedTrainer(settings.training.threads),
        compute=in_a_thread,
        rng=np.random.default_rng(),
    )
    settings.state.mkdir(parents=True, exist_ok=True)
    return Agent(settings, SigningKey.load(settings.key), bench)


async def in_a_thread(work: Callable[[], LocalResult]) -> LocalResult:
    """Train beside the event loop, so that the connection stays alive."""
    return await asyncio.to_thread(work)


@dataclass
class CachedExamples:
    """Reads a data source anew only when its file has changed."""

    source: DataSource
    _stamp: tuple[int, int] | None = None
    _dataset: Dataset | None = field(default=None, repr=False)

    def __call__(self, manifest: PlanManifest) -> Dataset:
        """The examples, fitted to the plan.

        Raises:
            DataError: they cannot be read or do not fit.
        """
        stamp = self.source.changed_since(self._stamp)
        if self._dataset is None or stamp is not None:
            self._dataset = self.source.load(manifest)
            self._stamp = stamp or self._stamp
        return self._dataset


@dataclass
class CachedTrainer:
    """Makes a trainer anew only when the plan has changed."""

    threads: int
    _trainer: Trainer | None = field(default=None, repr=False)

    def __call__(self, plan: Plan) -> Trainer:
        """The plan's trainer.

        Raises:
            PlanRefused: the device will not run the plan.
        """
        if self._trainer is None or self._trainer.plan.id != plan.id:
            self._trainer = Trainer(plan, self.threads)
        return self._trainer
