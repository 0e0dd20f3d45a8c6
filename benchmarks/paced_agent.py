"""One device process of the straggler benchmark: the real agent, with the compute time of a slower machine.

Everything but the training's duration is real: connection, fetching, files with their syncs, signatures.
Prints the moment (seconds since 1970) at which its first training began.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from edge_agent.agent import Agent, Workbench
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import AgentSettings
from fedtide.assembly import CachedExamples, CachedTrainer, in_a_thread
from fedtide.running import configure_logs, run_until_signalled
from fedtide.wire.link import Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.settings import load
from fedtide.wire.signatures import SigningKey


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="agent.toml")
    parser.add_argument(
        "--seconds", type=float, required=True, help="what one local training takes, at least"
    )
    parser.add_argument("--seed", type=int, required=True, help="of the order of examples")
    options = parser.parse_args()
    configure_logs(verbose=False, as_json=True)
    settings = load(options.config, AgentSettings)
    bench = Workbench(
        dial=MqttDialler(settings.broker, Traffic()),
        examples=CachedExamples(settings.data),
        trainer=CachedTrainer(settings.training.threads),
        compute=_paced(options.seconds),
        rng=np.random.default_rng(options.seed),
    )
    settings.state.mkdir(parents=True, exist_ok=True)
    run_until_signalled(_run(Agent(settings, SigningKey.load(settings.key), bench)))


async def _run(agent: Agent) -> None:
    await agent.run()


def _paced(seconds: float) -> Callable[[Callable[[], LocalResult]], Awaitable[LocalResult]]:
    first = True

    async def compute(work: Callable[[], LocalResult]) -> LocalResult:
        nonlocal first
        if first:
            print(f"{time.time():.6f}", flush=True)
            first = False
        began = time.monotonic()
        result = await in_a_thread(work)
        await asyncio.sleep(seconds - (time.monotonic() - began))
        return result

    return compute


if __name__ == "__main__":
    main()
