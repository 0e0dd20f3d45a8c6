"""An event loop on which no time passes but its own, and processes on it that can be killed.

    with VirtualLoop(seed) as loop:
        loop.run_until_complete(main())

When nothing is ready, the clock leaps to the next timer. What is given to a thread runs on the loop, a drawn
time later, one after the other where the executor has one thread. When nothing is ready and no timer is set,
:class:`leap.Deadlock` names the tasks that wait. Given equal seeds, two runs are equal, in every process:
nothing depends on addresses, on the hash of a string or on the machine's clock.

    process = Process(loop, "pump-7")
    task = process.start(agent.run())
    process.die(...)

Of a process that is dead not one line runs any more, as after kill -9; its coroutines are closed, and while
they unwind, everything that asks :func:`stay_alive` refuses with :class:`Killed`, which no program catches.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from enum import Enum, auto
from itertools import count
from typing import Any, Final, Self, TypeVar, TypeVarTuple, cast
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
from leap import Leap

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH_S: Final = 1_790_000_000.0
"""The wall time at which every simulation begins, in seconds since 1970."""
_MOST_CLOSINGS: Final = 50


class Killed(BaseException):
    """This process is dead."""


class End(Enum):
    """How a process ends without a word."""

    KILLED = auto()
    """Its machine lives: the sockets are closed, and the disk has all that was written."""
    POWER_CUT = auto()
    """Its machine is off: nobody is told, and what was not synced may be lost."""


_running: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


def current_process() -> "Process | None":
    """The process whose code this is; None: the rig's own."""
    return _running.get()


def stay_alive() -> None:
    """Called by whatever lets a process have an effect.

    Raises:
        Killed: the process is dead.
    """
    process = _running.get()
    if process is not None and process.end is not None:
        raise Killed(process.name)


class Process:
    """A program on a machine of its own.

    Args:
        loop: where it runs.
        name: for people.

    Attributes:
        end: how it ended; None while it lives.
        at_end: called once when it is killed, in this order.
    """

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.name = name
        self.end: End | None = None
        self.at_end: list[Callable[[End], None]] = []
        self._loop = loop
        self._context = contextvars.copy_context()
        self._context.run(_running.set, self)
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def call(self, work: Callable[[], T]) -> T:
        """Run this as the process."""
        return self._context.run(work)

    def start(self, main: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run this as the process's main program."""
        return self._context.run(lambda: self._loop.create_task(main, name=self.name))

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Called by the loop for each of the process's tasks."""
        self._tasks.add(task)

    def die(self, end: End) -> None:
        """End without a word. Called from its own code, that has to raise :class:`Killed` next."""
        if self.end is not None:
            return
        self.end = end
        self._loop.forget(self)
        for tell in self.at_end:
            tell(end)
        self._loop.in_rig(self._bury)

    def _bury(self) -> None:
        """Close what is left of it, so that nothing of it runs when it is collected, or at an odd moment."""
        for task in sorted(self._tasks, key=hash):
            self._context.run(_close, task)


def _close(task: asyncio.Task[Any]) -> None:
    """Unwind a task that will never run again."""
    if task.done():
        return
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    for _ in range(_MOST_CLOSINGS):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001 - it waits for something in a finally, or is Killed
            continue
        break


class NumberedTask(asyncio.Task[Any]):
    """A task that sets hold in the order in which tasks were made, not by their addresses."""

    _numbers: "count[int]" = count()

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        task = super().__new__(cls)
        task._number = next(cls._numbers)
        return task

    _number: int

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module.

    Args:
        seed: of how long work given to threads takes.
        work_s: the longest that takes.

    Attributes:
        failures: what failed and nobody was told; a test should find none.
    """

    def __init__(self, seed: int = 0, *, work_s: float = 0.01) -> None:
        self._leap = Leap()
        super().__init__(self._leap)
        self._clock_resolution = 1e-6  # after a year, a nanosecond is less than a float can add
        self._leap.waiting = self._waiting
        self._rng = np.random.default_rng([seed, 0x7EAD])
        self._work_s = work_s
        self._free_at: WeakKeyDictionary[Executor, float] = WeakKeyDictionary()
        self._rig = contextvars.Context()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self.failures: list[str] = []
        self.set_exception_handler(self._note_failure)
        NumberedTask._numbers = count()

    def __enter__(self) -> Self:
        asyncio.set_event_loop(self)
        return self

    def __exit__(self, *_: object) -> None:
        for task in sorted(self._tasks, key=hash):  # left by a test that failed, or that ended early
            _close(task)
        asyncio.set_event_loop(None)
        self.close()

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._leap.now

    def in_rig(self, callback: Callable[..., object], *args: object) -> asyncio.Handle:
        """Call this soon, as the rig: whoever dies meanwhile."""
        return self.call_soon(callback, *args, context=self._rig)

    def in_rig_at(self, when: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        """Call this at a time, as the rig: whoever dies meanwhile."""
        return self.call_at(when, callback, *args, context=self._rig)

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """As in asyncio; for the dead nothing is called."""
        process = _running.get() if context is None else context.get(_running)
        if process is not None and process.end is not None:
            handle = asyncio.Handle(callback, args, self, context)
            handle.cancel()
            return handle
        return super().call_soon(callback, *args, context=context)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        """As in asyncio; the task belongs to the process that makes it."""
        task = NumberedTask(coro, loop=self, name=cast("str | None", name), context=context)
        process = _running.get() if context is None else context.get(_running)
        if process is not None:
            process.adopt(task)
        self._tasks.add(task)
        return task

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        """Run it here, later: it takes effect, and a while after that its result is known."""
        future: asyncio.Future[T] = self.create_future()
        begin = self.time() if executor is None else max(self.time(), self._free_at.get(executor, 0.0))
        effect = begin + float(self._rng.uniform(0.0, self._work_s))
        done = effect + float(self._rng.uniform(0.0, self._work_s))
        if executor is not None:
            self._free_at[executor] = done
        self.call_at(effect, self._work, future, done, lambda: func(*args))
        return future

    def forget(self, process: Process) -> None:
        """Drop everything that is to be called for this process."""
        for handle in [*self._ready, *self._scheduled]:  # type: ignore[attr-defined]
            if handle._context.get(_running) is process:
                handle.cancel()

    def _work(self, future: "asyncio.Future[T]", done: float, work: Callable[[], T]) -> None:
        if future.cancelled():
            return
        try:
            result = work()
        except Killed:
            return
        except BaseException as error:  # noqa: BLE001 - as a thread would hand it over
            self.call_at(done, _settle, future, None, error)
        else:
            self.call_at(done, _settle, future, result, None)

    def _waiting(self) -> list[str]:
        return sorted(task.get_name() for task in self._tasks if not task.done())

    def _note_failure(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Killed):
            self.failures.append(f"{context.get('message')}: {error!r}")

    def _asyncgen_finalizer_hook(self, _generator: object) -> None:
        """Nothing: a task made whenever the collector comes by would number all later ones anew."""


def _settle(future: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class PartyClock:
    """What one machine takes for the time: a ``fedtide.wire.clock.Clock``.

    Args:
        loop: has the true time.
        booted_s: what ``now`` was when the loop's time was 0.
        skew_s: how far ``wall`` is off.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, booted_s: float = 0.0, skew_s: float = 0.0
    ) -> None:
        self._loop = loop
        self._booted_s = booted_s
        self.skew_s = skew_s

    def now(self) -> float:
        """See ``Clock.now``."""
        return self._loop.time() + self._booted_s

    def wall(self) -> float:
        """See ``Clock.wall``."""
        return EPOCH_S + self._loop.time() + self.skew_s


def run_virtually(main: Callable[[], Coroutine[Any, Any, T]], seed: int = 0) -> T:
    """Run a coroutine on a loop of its own.

    Raises:
        AssertionError: something failed and nobody was told.
    """
    with VirtualLoop(seed) as loop:
        result = loop.run_until_complete(main())
        assert not loop.failures, loop.failures
        return result
