import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from leap import Deadlock, Standstill
from virtual_time import (
    EPOCH_S,
    End,
    Killed,
    PartyClock,
    Process,
    VirtualLoop,
    run_virtually,
    stay_alive,
)


def test_a_year_of_waiting_takes_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(365 * 86_400.0)
        return asyncio.get_running_loop().time()

    began = time.perf_counter()
    assert run_virtually(main) == pytest.approx(365 * 86_400.0)
    assert time.perf_counter() - began < 5.0


def test_timers_come_in_the_order_of_their_times_whoever_set_them_first() -> None:
    async def main() -> list[int]:
        seen: list[int] = []

        async def note(number: int, wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            seen.append(number)

        await asyncio.gather(note(3, 30.0), note(1, 10.0), note(2, 20.0))
        return seen

    assert run_virtually(main) == [1, 2, 3]


def test_work_for_a_thread_runs_on_the_loop_and_takes_virtual_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: list[tuple[int, float]] = []

        def work(number: int) -> int:
            assert threading.current_thread() is threading.main_thread()
            done.append((number, loop.time()))
            return number

        with ThreadPoolExecutor(1) as alone:
            results = await asyncio.gather(
                *(loop.run_in_executor(alone, work, number) for number in range(5))
            )
        assert results == list(range(5))
        assert [number for number, _ in done] == list(range(5))
        moments = [moment for _, moment in done]
        assert moments == sorted(moments)
        assert 0.0 < moments[-1] < 0.1
        assert await asyncio.to_thread(work, 7) == 7

    run_virtually(main)


def test_what_work_for_a_thread_raises_reaches_who_waits_for_it() -> None:
    def work() -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        with pytest.raises(OSError, match="No space left"):
            await asyncio.to_thread(work)

    run_virtually(main)


def test_a_deadlock_names_who_waits() -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(asyncio.Event().wait(), name=name) for name in ("pump-1", "pump-2")]
        await asyncio.wait(tasks)

    with pytest.raises(Deadlock, match=r"at 0\.000 s nothing .*'pump-1', 'pump-2'"):
        run_virtually(main)


def test_an_endless_loop_without_a_wait_is_found() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 - that is the mistake
            await asyncio.sleep(0)

    with pytest.raises(Standstill, match="no time passes"):
        run_virtually(main)


def test_an_error_that_nobody_is_told_of_fails_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1.0)

    with pytest.raises(AssertionError, match="division by zero"):
        run_virtually(main)


def test_sets_of_tasks_are_in_the_order_in_which_the_tasks_were_made() -> None:
    async def main() -> list[str]:
        tasks = {asyncio.create_task(asyncio.sleep(1.0), name=str(number)) for number in range(50)}
        return [task.get_name() for task in tasks]

    first = run_virtually(main)
    kept = [object() for _ in range(1000)]  # other addresses than the first time
    assert run_virtually(main) == first
    assert len(kept) == 1000


def test_of_a_killed_process_not_one_line_runs_any_more() -> None:
    lines: list[str] = []

    async def child() -> None:
        try:
            await asyncio.sleep(10.0)
            lines.append("child went on")
        finally:
            stay_alive()
            lines.append("child cleaned up")

    async def program() -> None:
        asyncio.get_running_loop().call_later(5.0, lines.append, "timer")
        work = asyncio.create_task(asyncio.to_thread(lines.append, "thread"))
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            lines.append("began")
        await work
        lines.append("ended")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        process = Process(loop, "pump-1")
        ends: list[End] = []
        process.at_end.append(ends.append)
        process.start(program())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        process.die(End.POWER_CUT)
        process.die(End.KILLED)
        await asyncio.sleep(100.0)
        assert ends == [End.POWER_CUT]

    run_virtually(main)
    assert lines == ["began"]


def test_a_process_may_die_in_the_middle_of_its_own_code() -> None:
    lines: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        process = Process(loop, "pump-1")

        def step() -> None:
            process.die(End.KILLED)
            raise Killed(process.name)

        async def program() -> None:
            try:
                step()
            except Exception:  # noqa: BLE001 - programs catch a lot, but not their own death
                lines.append("caught")
            lines.append("went on")

        task = process.start(program())
        await asyncio.wait([task])
        assert isinstance(task.exception(), Killed)

    run_virtually(main)
    assert lines == []


def test_another_process_lives_on() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        one, other = Process(loop, "pump-1"), Process(loop, "pump-2")
        queue: asyncio.Queue[str] = asyncio.Queue()

        async def program(name: str) -> None:
            await asyncio.sleep(2.0)
            stay_alive()
            await queue.put(name)

        one.start(program("pump-1"))
        other.start(program("pump-2"))
        await asyncio.sleep(1.0)
        one.die(End.KILLED)
        assert await queue.get() == "pump-2"
        await asyncio.sleep(5.0)
        assert queue.empty()

    run_virtually(main)


def test_a_machine_may_be_ten_years_off_and_its_monotonic_clock_does_not_care() -> None:
    async def main() -> None:
        clock = PartyClock(asyncio.get_running_loop(), booted_s=1000.0, skew_s=-5.0)
        assert (clock.now(), clock.wall()) == (1000.0, EPOCH_S - 5.0)
        await asyncio.sleep(3.0)
        clock.skew_s -= 10 * 365 * 86_400.0
        assert clock.now() == 1003.0
        assert clock.wall() == EPOCH_S + 3.0 - 5.0 - 315_360_000.0

    run_virtually(main)
