"""Real processes that die where a test says: at the n-th occurrence of a named step, or when they are killed.

Each is a process of its own, forked from one that has done the imports: a start takes a fraction of a second,
so a test can afford many. Death is SIGKILL, sent by the process to itself at the step or by the test.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Final

from fedtide.cli import main
from fedtide.wire import steps
from fedtide.wire.steps import Step

_PRELOADED: Final = (
    *("fedtide.cli.coordinator", "fedtide.cli.errors", "edge_agent.simulation", "onnxruntime"),
    "pytest",  # each process imports the main module of the one that starts it
)


@dataclass(frozen=True)
class KillAt:
    """Where a process ends itself.

    Attributes:
        step: the step.
        occurrence: when it is reached for this time, from 1.
    """

    step: Step
    occurrence: int = 1


@dataclass(frozen=True)
class Started:
    """A running process.

    Attributes:
        process: it.
        log: the file it writes its log to.
    """

    process: ForkServerProcess
    log: Path

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.terminate()

    async def ended(self) -> int:
        """Wait until it has ended: its exit code, or the negative number of the signal that ended it."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.process.sentinel, done.set)
        try:
            await done.wait()
        finally:
            loop.remove_reader(self.process.sentinel)
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    async def killed(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.kill()
        await self.ended()

    def log_tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


def start_coordinator(directory: Path, kill_at: KillAt | None = None) -> Started:
    """The coordinator of a fleet's directory, by the ordinary command line."""
    return start(_coordinator, (directory,), directory / "coordinator.log", kill_at)


def start(
    work: Callable[..., None], arguments: tuple[object, ...], log: Path, kill_at: KillAt | None = None
) -> Started:
    """A process that does ``work``, a function of a module that can be imported."""
    process = _context().Process(target=_run, args=(work, arguments, log, kill_at), daemon=True)
    process.start()
    return Started(process, log)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _run(work: Callable[..., None], arguments: tuple[object, ...], log: Path, kill_at: KillAt | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, sys.stderr.fileno())
    if kill_at is not None:
        steps.listen(_ends_at(kill_at))
    work(*arguments)


def _coordinator(directory: Path) -> None:
    sys.argv = ["fedtide", "coordinator", "run", "--dir", str(directory)]
    main()


def _ends_at(kill_at: KillAt) -> steps.Listener:
    seen: Counter[Step] = Counter()

    def listener(step: Step) -> None:
        seen[step] += 1
        if step is kill_at.step and seen[step] >= kill_at.occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return listener
