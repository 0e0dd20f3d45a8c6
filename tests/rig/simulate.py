"""Simulate fleets from the command line.

python tests/rig/simulate.py --seed 7                       one fleet, anything fails
python tests/rig/simulate.py --seed 0 --seeds 100           many
python tests/rig/simulate.py --hours 24 --devices 1000      a long partition, and everybody back at once
"""

import argparse
import logging
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from chaos import FAULTS  # noqa: E402 - found by way of the line above
from fleet_witness import PromiseBroken  # noqa: E402
from long_partition import long_partition  # noqa: E402
from scenario import Report, Scenario  # noqa: E402
from simulated_fleet import simulate  # noqa: E402

from fedtide.wire.steps import Step  # noqa: E402


def told(report: Report) -> str:
    """A report in one line."""
    fates = ", ".join(f"{name} {count}" for name, count in sorted(report.audit.totals.items()))
    return (
        f"{report.virtual_s:,.0f} virtual s in {report.real_s:.1f} s; {len(report.audit.updates)} updates, "
        f"version {report.audit.version}; {fates}; {report.messages} messages; "
        f"{report.dropped} dropped by the broker; {sum(report.starts.values())} starts; "
        f"faults {report.faults}; journal {report.digest[:16]}"
    )


def main() -> None:
    """Run what was asked for, and say what came of it; exit 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Simulate a fleet in virtual time and check every promise.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --seed on")
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument("--hours", type=float, help="a long partition in so many hours instead of chaos")
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual seconds of faults")
    parser.add_argument("--calm", type=float, default=Scenario.calm_s, help="virtual seconds after them")
    parser.add_argument("--every", type=float, default=Scenario.every_s, help="seconds from fault to fault")
    parser.add_argument("--step-odds", type=float, default=Scenario.step_odds, help="of an end at any step")
    parser.add_argument("--step", type=Step, default=None, help="and only there")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, separated by commas")
    parser.add_argument("--log", action="store_true", help="what the programs say")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = Scenario(
        seed=chosen.seed,
        devices=chosen.devices,
        faulty_s=chosen.seconds,
        calm_s=chosen.calm,
        every_s=chosen.every,
        step_odds=chosen.step_odds,
        only_step=chosen.step,
        faults=tuple(name for name in chosen.faults.split(",") if name),
    )
    if chosen.hours is not None:
        base = long_partition(chosen.seed, chosen.devices, chosen.hours)
    broken = 0
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        with tempfile.TemporaryDirectory() as directory:
            try:
                report = simulate(replace(base, seed=seed), Path(directory), silent=not chosen.log)
            except PromiseBroken as error:
                broken += 1
                print(f"seed {seed}: {error}\n{' '.join(error.__notes__)}", flush=True)
                continue
        print(f"seed {seed}: {told(report)}", flush=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
