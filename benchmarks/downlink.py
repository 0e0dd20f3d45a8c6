"""Claim: devices in step take 1/60 of float32 a version, and from any of 128 versions 1.2 keyframes at most.

A real asynchronous run (``federated_deltas``) whose devices train on what the coordinator publishes: the
closed loop on grids, the publisher and the device's own way finding are the real ones, between them a
dictionary instead of a broker. Counted are contents: what a device in step takes of a version is the sealed
head and one delta; a device that missed some also takes indexes and further deltas, or the keyframe where
that is cheaper. MQTT's own bytes are not counted.

Every way is really gone: the parameters at its end have the fingerprint of the head. Gaps are measured to
each of the last 8 versions, so that every place in a segment of deltas occurs. The accuracy of what devices
hold is compared with that of the model behind it, and with a run whose downlink is float32.

    python benchmarks/downlink.py --task digits-cnn --plot downlink.png
"""

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from federated_deltas import GOAL, RULES, Run, Update
from federated_tasks import TASKS
from report import Target, own_cpu_seconds, print_report

from coordinator.closed_loop import ClosedLoop, Version
from coordinator.model_blobs import BlobMaker
from coordinator.model_deltas import REACH, SEGMENT
from coordinator.publisher import Identity, Publisher
from coordinator.settings import CoordinatorSettings, Publish
from coordinator.shelf import Shelf
from edge_agent.fetch import Fetcher
from edge_agent.model_source import HeldModel, ModelSource
from fedtide.wire.chunks import join_blob
from fedtide.wire.ids import Epoch, FleetId, ModelVersion, PlanId
from fedtide.wire.messages import BlobRef, Head
from fedtide.wire.model_blob import max_keyframe_bytes
from fedtide.wire.parameters import FLOAT32, Schema, Vector
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN, SigningKey
from fedtide.wire.topics import BLOB_CHUNK, HEAD

FLEET: Final = FleetId("benchmark")
KEY: Final = SigningKey.from_seed(bytes(32))
IDENTITY: Final = Identity(epoch=Epoch(1), run="", plan=PlanId("0" * 32), plan_blob=b"a plan", key=KEY)
DEFAULT_TASKS: Final = ("digits-mlp", "digits-cnn")
VERSIONS: Final = REACH + SEGMENT + 16
"""So that the oldest gap of the last versions does not reach into the very first ones."""
EVALUATED_EVERY: Final = 10
LAST: Final = 10
"""Versions over which the final accuracies are averaged."""
IN_STEP: Final = 1 / 60
CATCH_UP: Final = 1.2
LARGE: Final = 100_000
"""Parameters from which the head's bytes are held to the bound with the delta's."""
ACCURACY_LOSS: Final = 0.003


class Shop:
    """Where the publisher puts things and devices find them: retained messages by topic."""

    mqtt_version = "5"
    max_packet_bytes = None

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:  # noqa: ARG002
        """Keep it, or clear it if it is empty."""
        self.retained[topic] = payload
        if not payload:
            del self.retained[topic]

    @property
    def sealed_head(self) -> bytes:
        """The head that is retained."""
        return self.retained[HEAD.name(FLEET)]


@dataclass
class CountingFetcher(Fetcher):
    """Takes blobs from the shop and counts their bytes."""

    shop: Shop = field(default_factory=Shop)
    fetched: list[int] = field(default_factory=list)

    async def fetch(self, connection: Any, ref: BlobRef) -> bytes:  # noqa: ARG002
        """The blob's content, checked."""
        names = [BLOB_CHUNK.name(FLEET, blob=ref.id, index=index) for index in range(ref.chunks)]
        self.fetched.append(ref.size_bytes)
        return join_blob(ref, dict(enumerate(self.shop.retained[name] for name in names)))


@dataclass(frozen=True)
class Step:
    """What one published version takes. Bytes of contents.

    Attributes:
        head: sealed.
        keyframe: all of it.
        delta: from the version before; None where there is none.
        index: of the deltas from other versions; None where there is none.
        cpu_s: rounding, encoding and publishing, the deltas from earlier versions included.
    """

    head: int
    keyframe: int
    delta: int | None
    index: int | None
    cpu_s: float


@dataclass(frozen=True)
class Catch:
    """One device that catches up.

    Attributes:
        gap: published versions that it is behind.
        size_bytes: of all blobs that it fetched.
        blobs: how many.
        whole: whether it took the keyframe in the end.
        keyframes: its bytes over those of the keyframe.
    """

    gap: int
    size_bytes: int
    blobs: int
    whole: bool
    keyframes: float


@dataclass(frozen=True)
class Accuracy:
    """Of one version on the held-out examples: the model behind it, and what devices hold."""

    version: int
    model: float
    held: float


class Downlink:
    """Publishes the versions of a run and lets devices catch up with the last ones."""

    def __init__(self, run: Run, step: float, versions: int) -> None:
        self._run = run
        self._schema: Schema = run.schema
        self._versions = versions
        publish = Publish(step=step, keep_versions=REACH + SEGMENT + 1)
        settings = CoordinatorSettings(
            fleet=FLEET, plan=Path("unused"), aggregator=RULES.aggregator, publish=publish
        )
        self._shop = Shop()
        self._kept: dict[int, Version] = {}
        self._loop = ClosedLoop(publish, self._schema, None)
        self._publisher = Publisher(
            settings,
            IDENTITY,
            self._remember,
            lambda: 1.7e9,
            maker=BlobMaker(publish, self._schema, self._earlier),
            shelf=Shelf(FLEET),
        )
        self._events = asyncio.Runner()
        self.steps: list[Step] = []
        self.catches: list[Catch] = []
        self.accuracies: list[Accuracy] = []

    def held(self, number: ModelVersion, target: Vector) -> Vector:
        """What devices hold as version ``number``; published when it is asked for the first time."""
        if number in self._kept:
            return self._kept[number].parameters
        before = own_cpu_seconds()
        version = self._loop.version(number, target)
        self._events.run(self._publisher.publish(self._shop, version))  # type: ignore[arg-type]
        self._note(own_cpu_seconds() - before)
        if number % EVALUATED_EVERY == 0 or number > self._versions - LAST:
            measured = self._run.accuracy(target), self._run.accuracy(version.parameters)
            self.accuracies.append(Accuracy(number, *measured))
        if number > self._versions - SEGMENT:
            self.catches += [self._catch_up(number, gap) for gap in range(1, min(REACH, number) + 1)]
        return version.parameters

    def _note(self, cpu_s: float) -> None:
        head = self._head()
        self.steps.append(
            Step(
                head=len(self._shop.sealed_head),
                keyframe=head.full_blob.size_bytes,
                delta=next((delta.blob.size_bytes for delta in head.deltas), None),
                index=head.delta_index.size_bytes if head.delta_index else None,
                cpu_s=cpu_s,
            )
        )

    def _catch_up(self, newest: ModelVersion, gap: int) -> Catch:
        head, older = self._head(), self._kept[newest - gap]
        fetcher = CountingFetcher(FLEET, max_keyframe_bytes(self._schema), shop=self._shop)

        async def connected() -> Any:
            return self._shop

        source = ModelSource(connected, fetcher)
        held = HeldModel(older.number, older.parameters)
        parameters = self._events.run(source.parameters(head, self._schema, held))
        assert parameters.tobytes() == self._kept[newest].parameters.tobytes()
        size_bytes, keyframe = sum(fetcher.fetched), head.full_blob.size_bytes
        whole = fetcher.fetched[-1] == keyframe
        return Catch(gap, size_bytes, len(fetcher.fetched), whole, size_bytes / keyframe)

    def _head(self) -> Head:
        return unseal(self._shop.sealed_head, Head, KEY.public, HEAD_DOMAIN)

    async def _remember(self, version: Version) -> None:
        self._kept[version.number] = version
        self._kept.pop(version.number - REACH - SEGMENT - 1, None)

    def _earlier(self, sequence: int) -> tuple[ModelVersion, Vector] | None:
        # Every version of the run is published, so that its number is its place as well.
        kept = self._kept.get(sequence)
        return (kept.number, kept.parameters) if kept else None


def conduct(run: Run, step: float, versions: int, seed: int) -> Downlink:
    """The run with a downlink on grids."""
    downlink = Downlink(run, step, versions)
    run.conduct(seed, versions * GOAL, _sent, downlink=downlink.held)
    return downlink


def float32_accuracies(run: Run, versions: int, seed: int) -> list[float]:
    """Of the last versions of the same run with a float32 downlink."""
    found: dict[int, float] = {}

    def held(number: ModelVersion, parameters: Vector) -> Vector:
        if number > versions - LAST and number not in found:
            found[number] = run.accuracy(parameters)
        return parameters

    run.conduct(seed, versions * GOAL, _sent, downlink=held)
    return list(found.values())


def _sent(update: Update) -> Vector:
    return update.delta


def figures(downlink: Downlink, schema: Schema, reference: Sequence[float]) -> dict[str, Any]:
    """Everything measured of one task."""
    float32 = FLOAT32.itemsize * schema.size
    in_step = [step for step in downlink.steps if step.delta is not None]
    delta = statistics.fmean(step.delta for step in in_step if step.delta is not None)
    head = statistics.fmean(step.head for step in in_step)
    last = downlink.accuracies[-LAST:]
    model, held = (float(np.mean([getattr(each, name) for each in last])) for name in ("model", "held"))
    return {
        "parameters": schema.size,
        "versions": len(downlink.steps),
        "versions_without_a_delta": len(downlink.steps) - len(in_step),
        "float32_bytes": float32,
        "keyframe_bytes": downlink.steps[-1].keyframe,
        "delta_bytes": delta,
        "head_bytes": head,
        "index_bytes": max(step.index or 0 for step in downlink.steps),
        "float32_over_delta": float32 / delta,
        "float32_over_delta_and_head": float32 / (delta + head),
        "catch_up_keyframes": {str(gap): row for gap, row in by_gap(downlink).items()},
        "catch_up_most_keyframes": max(each.keyframes for each in downlink.catches),
        "catch_up_with_the_keyframe": float(np.mean([each.whole for each in downlink.catches])),
        "catch_up_most_blobs": max(each.blobs for each in downlink.catches),
        "publish_cpu_ms": 1000 * statistics.median(step.cpu_s for step in downlink.steps),
        "accuracy": {"model": model, "held": held, "float32_downlink": float(np.mean(reference))},
        "accuracy_largest_loss": max(each.model - each.held for each in downlink.accuracies[1:]),
    }


def by_gap(downlink: Downlink) -> dict[int, tuple[float, float]]:
    """Median and most keyframes, for gaps that are powers of two."""
    return {
        gap: (statistics.median(found), max(found))
        for gap in (2**exponent for exponent in range(8))
        if (found := [each.keyframes for each in downlink.catches if each.gap == gap])
    }


def print_task(task: str, found: Mapping[str, Any]) -> None:
    """A few lines a task."""
    print(
        f"\n{task}: {found['parameters']:,} parameters, {found['versions']} versions; float32 takes "
        f"{found['float32_bytes']:,} B, a keyframe {found['keyframe_bytes']:,} B"
    )
    print(
        f"  in step: delta {found['delta_bytes']:,.0f} B (1/{found['float32_over_delta']:.0f}); "
        f"with the head of {found['head_bytes']:,.0f} B 1/{found['float32_over_delta_and_head']:.0f}"
    )
    rows = found["catch_up_keyframes"].items()
    print("  keyframes by gap, median (most):", end=" ")
    print(", ".join(f"{gap}: {median:.2f} ({most:.2f})" for gap, (median, most) in rows))
    print(
        f"  catching up: at most {found['catch_up_most_keyframes']:.2f} keyframes, "
        f"{found['catch_up_most_blobs']} blobs; by the keyframe {found['catch_up_with_the_keyframe']:.0%}"
    )
    print(f"  accuracy of the last {LAST} versions: {found['accuracy']}", flush=True)


def plot(downlinks: Mapping[str, tuple[Downlink, Schema]], path: Path) -> None:
    """Bytes by gap, a panel for each task."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second that only --plot needs)

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, len(downlinks), figsize=(5.0 * len(downlinks), 4.2), squeeze=False)
    for panel, (task, (downlink, schema)) in zip(panels[0], downlinks.items(), strict=True):
        gaps = sorted({each.gap for each in downlink.catches})
        found = [[each.size_bytes for each in downlink.catches if each.gap == gap] for gap in gaps]
        keyframe = downlink.steps[-1].keyframe
        panel.fill_between(gaps, [min(each) for each in found], [max(each) for each in found], alpha=0.25)
        panel.plot(gaps, [statistics.median(each) for each in found], label="what a device fetches")
        panel.axhline(4 * schema.size, color="black", linewidth=0.8, label="float32")
        panel.axhline(keyframe, color="tab:green", linewidth=0.8, label="keyframe")
        panel.axhline(
            CATCH_UP * keyframe, color="tab:red", linewidth=0.8, linestyle=":", label="1.2 keyframes"
        )
        panel.set(
            xscale="log", yscale="log", xlabel="versions behind", title=f"{task}, {schema.size:,} parameters"
        )
        panel.grid(visible=True, which="both", linewidth=0.3)
    panels[0][0].set_ylabel("bytes")
    panels[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class Options(argparse.Namespace):
    """The command line."""

    task: list[str] | None
    data: Path
    step: float
    versions: int
    seed: int
    plot: Path | None


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="may be given repeatedly")
    parser.add_argument("--data", type=Path, default=Path(), help="directory with har.npz and mnist.npz")
    parser.add_argument("--step", type=float, default=Publish().step, help="of the rounding")
    parser.add_argument("--versions", type=int, default=VERSIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write bytes by gap here (.png)")
    return parser.parse_args(namespace=Options())


def targets_of(task: str, found: Mapping[str, Any]) -> list[Target]:
    """What a task is held to."""
    in_step = found["delta_bytes"] + (found["head_bytes"] if found["parameters"] >= LARGE else 0)
    counted = "delta and head" if found["parameters"] >= LARGE else "delta"
    accuracy = found["accuracy"]
    return [
        Target(f"{task}: {counted} in step / float32", in_step / found["float32_bytes"], IN_STEP),
        Target(f"{task}: keyframes from any gap up to {REACH}", found["catch_up_most_keyframes"], CATCH_UP),
        Target(f"{task}: accuracy lost to rounding", accuracy["model"] - accuracy["held"], ACCURACY_LOSS),
    ]


def main() -> None:
    """Measure and print the report."""
    options = _options()
    results: dict[str, dict[str, Any]] = {}
    downlinks: dict[str, tuple[Downlink, Schema]] = {}
    for task in options.task or DEFAULT_TASKS:
        run = Run(TASKS[task], options.data)
        downlink = conduct(run, options.step, options.versions, options.seed)
        reference = float32_accuracies(run, options.versions, options.seed)
        downlinks[task] = downlink, run.schema
        results[task] = figures(downlink, run.schema, reference)
        print_task(task, results[task])
    if options.plot:
        plot(downlinks, options.plot)
    print_report(
        "devices in step take 1/60 of float32 a version, and from any of 128 versions 1.2 keyframes at most",
        [target for task, found in results.items() for target in targets_of(task, found)],
        step=options.step,
        counted="contents of sealed heads and blobs, without MQTT's own bytes",
        tasks=results,
    )


if __name__ == "__main__":
    main()
