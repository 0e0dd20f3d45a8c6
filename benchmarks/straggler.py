"""Claim: one slow device does not hold the fleet up, and the system adds little to what scheduling costs.

Eight devices train an MLP on digits, labels divided by Dirichlet(0.3). Seven take 0.5 s per update, the eighth
5 s. Counted: seconds from the first device's first training to the first held-out accuracy of 0.93.

- asynchronous and synchronous: the real coordinator, eight real agents, each its own process with real fsyncs,
  over a real broker. Only the duration of training is imitated, by waiting.
- the floor: the same training and the same coordinator arithmetic on a virtual clock, where fetching, sending,
  deciding and publishing take no time. Nothing with these settings and these devices can be sooner, but for
  the luck of the order of arrivals: so medians over several seeds on both sides.

Both modes were tuned on the floor with other seeds (10 to 12): aggregation goal, server learning rate,
momentum, staleness policy, weighing by examples. The best of each is in ``ASYNCHRONOUS`` and ``SYNCHRONOUS``.
"""

import argparse
import contextlib
import heapq
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import digits
import msgspec
import numpy as np
from report import Target, cpu_seconds, peak_rss_mb, print_report

from broker_config.local import LocalBroker, start_local_broker
from coordinator.aggregation import Aggregator, FedAvg, FedBuff
from coordinator.model_state import fold_update, initial_state
from coordinator.plan.file import BuiltPlan
from coordinator.server_optimizers import SGD
from coordinator.settings import CoordinatorSettings, Evaluation, Publish, Rules, Stop, Update
from coordinator.staleness import Constant
from coordinator.status import Status
from coordinator.status import read as read_status
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Evaluator, Trainer
from fedtide import fleet_directory
from fedtide.wire import codecs
from fedtide.wire.ids import FleetId, ModelVersion
from fedtide.wire.link import Broker
from fedtide.wire.signatures import SigningKey

HERE: Final = Path(__file__).resolve().parent
DEVICES: Final = 8
PACES_S: Final = (0.5,) * (DEVICES - 1) + (5.0,)
ACCURACY: Final = 0.93
CODEC: Final = "q8"
PEERS: Final = {"APPFL FedAsync, s": 95.0, "NVFlare, s": 172.0}
"""Measured by us on the same task with the peers' own defaults, on a machine of the same kind."""
START_DEADLINE_S: Final = 60.0
POLL_S: Final = 0.01


@dataclass(frozen=True)
class Mode:
    """Coordinator settings that decide how the fleet learns."""

    name: str
    aggregator: Aggregator
    learning_rate: float
    weight_by_examples: bool


ASYNCHRONOUS: Final = Mode("asynchronous", FedBuff(goal=7), learning_rate=3.0, weight_by_examples=False)
SYNCHRONOUS: Final = Mode("synchronous", FedAvg(cohort=DEVICES), learning_rate=2.0, weight_by_examples=True)


@dataclass(frozen=True)
class Cost:
    """CPU of one run between two moments, by process."""

    updates: int
    cpu_s: dict[str, float]

    @property
    def ms_per_update(self) -> dict[str, float]:
        """CPU milliseconds per applied update, by kind of process."""
        kinds = {"broker": "broker", "coordinator": "coordinator"}
        sums: dict[str, float] = {}
        for name, seconds in self.cpu_s.items():
            kind = kinds.get(name, "agents")
            sums[kind] = sums.get(kind, 0.0) + seconds * 1000 / max(1, self.updates)
        return sums


@dataclass(frozen=True)
class Run:
    """One run of the real system; ``seconds`` is None if it did not get there in time."""

    seconds: float | None
    updates: int
    versions: int
    best_accuracy: float
    limit_s: float
    cost: Cost
    rss_mb: dict[str, float]
    staleness: dict[int, int]


@dataclass(frozen=True)
class Floor:
    """One run on the virtual clock."""

    seconds: float | None
    updates: int


@dataclass
class Fleet:
    """The processes of one run."""

    broker: LocalBroker
    directory: fleet_directory.FleetDirectory
    devices: list[subprocess.Popen[str]] = field(default_factory=list)
    coordinator: subprocess.Popen[str] | None = None

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by process."""
        return {name: cpu_seconds(pid) for name, pid in self._pids().items()}

    def rss_mb(self) -> dict[str, float]:
        """Peak resident memory, by process."""
        return {name: peak_rss_mb(pid) for name, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        assert self.coordinator is not None
        agents = {f"agent {index}": process.pid for index, process in enumerate(self.devices)}
        return {"broker": self.broker.pid, "coordinator": self.coordinator.pid, **agents}


def simulate(plan: BuiltPlan, data: digits.Digits, mode: Mode, seed: int, limit_s: float) -> Floor:
    """The scheduling floor: the same devices and rules, nothing else takes any time."""
    schema, training = plan.plan.manifest.schema, plan.plan.manifest.training
    trainer, evaluator, codec = Trainer(plan.plan), Evaluator(plan.plan), codecs.get(CODEC)
    rngs = [np.random.default_rng(_device_seed(seed, index)) for index in range(DEVICES)]
    server_optimizer = SGD(learning_rate=mode.learning_rate)
    state = initial_state(plan.initial, Rules(aggregator=mode.aggregator, server_optimizer=server_optimizer))
    published = {state.version: state.parameters}
    training_until = [(pace, index, state.version) for index, pace in enumerate(PACES_S)]
    heapq.heapify(training_until)
    waiting: list[int] = []
    updates = 0
    while training_until:
        now, index, base_version = heapq.heappop(training_until)
        if now > limit_s:
            break
        base = published[base_version]
        result = trainer.run_epochs(base, data.devices[index], training, rngs[index])
        delta = codec.decode(codec.encode(result.parameters - base, schema), schema)
        version = state.version
        if mode.aggregator.max_staleness is None or base_version == version:
            importance = float(result.num_examples) if mode.weight_by_examples else 1.0
            state = fold_update(state, delta, 1.0, importance, base)
            updates += 1
        waiting.append(index)
        if state.version != version:
            published[state.version] = state.parameters
            metric = evaluator.evaluate(state.parameters, data.held_out).metric
            if metric is not None and metric >= ACCURACY:
                return Floor(now, updates)
        held = [device for device in waiting if device == index and base_version == state.version]
        for device in waiting:
            if state.version != version or device not in held:
                heapq.heappush(training_until, (now + PACES_S[device], device, state.version))
        waiting = [] if state.version != version else [d for d in waiting if d in held or d != index]
    return Floor(None, updates)
