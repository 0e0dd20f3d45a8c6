"""The deadline of a plan: every run of a graph, and the opening of it, is watched from a thread beside it.

What the deadline can stop: onnxruntime looks between two operators whether it is to stop, so a graph of many
operators ends at most one operator later. What it cannot: one operator that runs for very long, such as a
huge matrix product. Nothing but the end of the process ends that one; ``give_up`` is for it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import msgspec
import onnxruntime

from fedtide.wire.plan import Limits

GiveUp = Callable[[str], None]
"""Called, with a sentence, from the watching thread when a plan does not stop. An agent ends its process."""

_CHECKS_PER_DEADLINE: Final = 4
_DEADLINES_TO_GIVE_UP: Final = 4
"""How many more deadlines a run that was asked to stop has for it."""
_NO_GRAPH_CAPTURE: Final = ("gpu_graph_id", "-1")
"""Not for a GPU: without this entry onnxruntime 1.31 asks for it at every step and catches its own exception,
which takes longer than a step of a small model."""


def run_options() -> onnxruntime.RunOptions:
    """Options of a run."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(*_NO_GRAPH_CAPTURE)
    return options


@dataclass(frozen=True)
class Bounds:
    """What a plan may take on this device, and what happens to one that cannot be stopped.

    Attributes:
        limits: the plan's own, lowered to what the device allows.
        give_up: None: go on waiting.
    """

    limits: Limits
    give_up: GiveUp | None = None


def bounds(limits: Limits, memory_bytes: int | None, give_up: GiveUp | None) -> Bounds:
    """A plan's limits, with at most ``memory_bytes`` of working memory where the device says so."""
    if memory_bytes is not None:
        limits = msgspec.structs.replace(limits, memory_bytes=min(limits.memory_bytes, memory_bytes))
    return Bounds(limits, give_up)


class Watchdog:
    """Asks a run to stop after 1 to 1.5 deadlines, and gives up four deadlines later.

    One thread for a whole update, which looks four times per deadline whether the count of runs has moved;
    a run itself pays one addition.

    Args:
        bounds: the deadline, and what to do about a run that does not stop.
        stop: asks what is running to stop; None: by way of ``options``.

    Attributes:
        options: of every run that is watched.
        runs: count one up before each.
        expired: whether a run was asked to stop.
    """

    def __init__(self, bounds: Bounds, stop: Callable[[], None] | None = None) -> None:
        self.options = run_options()
        self.runs = 0
        self.expired = False
        self._deadline_s = bounds.limits.step_deadline_s
        self._give_up = bounds.give_up
        self._stop = stop or self._terminate
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edge_agent.plan_watchdog", daemon=True)

    def _terminate(self) -> None:
        self.options.terminate = True

    def _watch(self) -> None:
        if not self._overrun():
            return
        self.expired = True
        self._stop()
        if not self._done.wait(_DEADLINES_TO_GIVE_UP * self._deadline_s) and self._give_up is not None:
            self._give_up(
                f"the plan did not stop {_DEADLINES_TO_GIVE_UP} deadlines after the one of "
                f"{self._deadline_s:g} s: one operator of it takes too long for this device"
            )

    def _overrun(self) -> bool:
        """Wait until one run takes longer than the deadline; False: all ended before."""
        seen, looks = self.runs, 0
        while not self._done.wait(self._deadline_s / _CHECKS_PER_DEADLINE):
            seen, looks = self.runs, looks + 1 if self.runs == seen else 0
            if looks > _CHECKS_PER_DEADLINE:
                return True
        return False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
