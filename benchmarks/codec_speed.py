"""Claim: at 1 M parameters the default codec encodes 200 MB/s of float32, and decodes and folds 1 GB/s.

Each codec at about 10 k, 100 k and 1 M parameters, at its own step: encoding, decoding, and decoding into the
coordinator's vector with the FedBuff fold of a stale update after it, as its writer does. The deltas are
those of real asynchronous runs (``federated_deltas``), of different devices in turn; the one of 1 M
parameters needs ``--data`` with ``mnist.npz``. Without it, and with ``--synthetic``, they are of rank 4 with
noise and outliers, in the same shapes; the output says which.

Times are CPU times of the one thread, medians; every turn times all steps once, and the floor with them:
copying the float32 bytes, and multiplying and adding a float32 vector, once each. Memory is what
``tracemalloc`` sees beyond the arguments at its peak, results included, over the size of the float32 vector.
The share of local training is of the CPU that this run's devices took to train.

    python benchmarks/codec_speed.py --data DIRECTORY
    python benchmarks/codec_speed.py --deltas DIRECTORY   # archives by federated_deltas: TASK.npz
"""

import argparse
import itertools
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from federated_deltas import Run, Update
from federated_tasks import TASKS, available
from report import Target, print_report

from coordinator.aggregation import TILE, FedBuff, empty_buffer
from coordinator.settings import DEFAULT_CODEC
from fedtide.wire import codecs
from fedtide.wire.codecs import Codec
from fedtide.wire.parameters import Schema, TensorSpec, Vector

BY_SIZE: Final[Mapping[str, str]] = {"10k": "digits-mlp", "100k": "digits-cnn", "1M": "mnist-mlp"}
"""The task that has about so many parameters."""
TRAINING_TASK: Final = "digits-cnn"
LEAST_REPEATS: Final = 15
KEPT: Final = 8
"""Deltas of each task, in turn."""
UPDATES: Final[Mapping[str, int]] = {"digits-mlp": 320, "digits-cnn": 240, "mnist-mlp": 64}
"""Of a run, the last of which give the deltas."""
STALE: Final = 0.5
RANK: Final = 4
OUTLIERS: Final = 1e-3
NOISE: Final = 0.05
ENCODE_MB_S: Final = 200.0
FOLD_MB_S: Final = 1000.0
TRAINING_SHARE: Final = 0.02
MOST_MEMORY: Final = 2.0
LARGE_ENOUGH: Final = ("100k", "1M")
"""Sizes at which memory is held to its bound: below, it is that of fixed work space."""


@dataclass(frozen=True)
class Material:
    """What one size is measured on.

    Attributes:
        schema: of the model.
        deltas: float32 of shape ``(schema.size,)`` each.
        origin: where they are from, for the output.
        training_cpu_ms: median of the local trainings; None where nothing was trained.
    """

    schema: Schema
    deltas: Sequence[Vector]
    origin: str
    training_cpu_ms: float | None = None


@dataclass(frozen=True)
class Speed:
    """One codec at one size. CPU milliseconds are medians; MB are 10⁶ bytes of float32.

    Attributes:
        payload_bytes: median.
        encode_ms: of one delta.
        decode_ms: into a vector that is there already.
        decode_fold_ms: the same, and folded as a stale update.
        encode_mb_s: float32 bytes encoded in a second.
        decode_fold_mb_s: float32 bytes decoded and folded in a second.
        encode_times_floor: against copying plus multiplying and adding, turn by turn.
        decode_fold_times_floor: the same.
        encode_memory: peak, in float32 vectors.
        decode_memory: peak, result included, in float32 vectors.
    """

    payload_bytes: float
    encode_ms: float
    decode_ms: float
    decode_fold_ms: float
    encode_mb_s: float
    decode_fold_mb_s: float
    encode_times_floor: float
    decode_fold_times_floor: float
    encode_memory: float
    decode_memory: float


def trained(task: str, data: Path) -> Material:
    """Run the task with float32 deltas and keep the last ones, of different devices."""
    run = Run(TASKS[task], data)
    kept: dict[int, Vector] = {}
    updates = UPDATES[task]

    def keep(update: Update) -> Vector:
        if update.number > updates - 3 * KEPT and len(kept) < KEPT:
            kept.setdefault(update.device, update.delta)
        return update.delta

    course = run.conduct(0, updates, keep)
    origin = f"{task}, the last of {updates} updates of a real asynchronous run"
    training_ms = 1000 * statistics.median(course.training_cpu_s)
    return Material(run.schema, list(kept.values()), origin, training_ms)


def archived(archive: Path) -> Material:
    """Deltas that ``federated_deltas`` wrote."""
    with np.load(archive) as content:
        tensors = json.loads(str(content["tensors"]))
        deltas = list(content["deltas"][:KEPT])
    schema = Schema(
        tensors=tuple(TensorSpec(name=name, dtype="float32", shape=tuple(shape)) for name, shape in tensors)
    )
    return Material(schema, deltas, f"{archive.name}, of a real asynchronous run")


def synthetic(task: str, seed: int = 0) -> Material:
    """Deltas of rank 4 a matrix, with noise and outliers, in the shapes of the task's model."""
    shapes = [(name, tuple(value.shape)) for name, value in TASKS[task].model().named_parameters()]
    schema = Schema(
        tensors=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes)
    )
    rng = np.random.default_rng(seed)
    deltas = [_low_rank(schema, rng) for _ in range(KEPT)]
    return Material(schema, deltas, "synthetic: rank 4 with noise and outliers")


def _low_rank(schema: Schema, rng: np.random.Generator) -> Vector:
    values = np.empty(schema.size, np.float32)
    for tensor, place in schema.slices():
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        assert rows is not None
        strengths = 2.0 ** -np.arange(RANK)
        left = rng.standard_normal((rows, RANK)) * strengths
        product = left @ rng.standard_normal((RANK, tensor.size // rows))
        values[place] = product.ravel() + NOISE * rng.standard_normal(tensor.size)
    outliers = rng.integers(0, schema.size, max(1, int(OUTLIERS * schema.size)))
    values[outliers] *= 20
    return values * np.float32(1e-3)


def cpu_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of this thread for one call."""
    before = time.thread_time()
    work()
    return 1000 * (time.thread_time() - before)


def floor_work(delta: Vector) -> Callable[[], object]:
    """Copy the float32 bytes, then multiply and add them: what any codec and any fold touch."""
    copy, total, scratch = np.empty_like(delta), np.zeros_like(delta), np.empty(TILE, np.float32)

    def work() -> None:
        np.copyto(copy, delta)
        for start in range(0, delta.size, TILE):
            part = np.multiply(
                delta[start : start + TILE], np.float32(STALE), out=scratch[: min(TILE, delta.size - start)]
            )
            target = total[start : start + TILE]
            np.add(target, part, out=target)

    return work


def measure(codec: Codec, material: Material, repeats: int) -> Speed:
    """All figures of one codec at one size."""
    schema, size_bytes = material.schema, 4 * material.schema.size
    aggregator, buffer = FedBuff(), empty_buffer(schema.size)
    out = np.empty(schema.size, np.float32)
    payloads = [codec.encode(delta, schema) for delta in material.deltas]

    def decode_and_fold(payload: bytes) -> None:
        delta = codec.decode(payload, schema, out)
        aggregator.fold(buffer, delta, staleness_weight=STALE, importance=1.0)

    turns = []
    pairs = itertools.cycle(zip(material.deltas, payloads, strict=True))
    for delta, payload in itertools.islice(pairs, repeats + 2):
        steps: tuple[Callable[[], object], ...] = (
            floor_work(delta),
            lambda delta=delta: codec.encode(delta, schema),  # type: ignore[misc]
            lambda payload=payload: codec.decode(payload, schema, out),  # type: ignore[misc]
            lambda payload=payload: decode_and_fold(payload),  # type: ignore[misc]
        )
        steps[0]()  # touches its vectors for the first time
        turns.append([cpu_ms(step) for step in steps])
    turns = turns[2:]
    encode_ms, decode_ms, fold_ms = (statistics.median(turn[step] for turn in turns) for step in (1, 2, 3))
    return Speed(
        payload_bytes=statistics.median(map(len, payloads)),
        encode_ms=encode_ms,
        decode_ms=decode_ms,
        decode_fold_ms=fold_ms,
        encode_mb_s=size_bytes / encode_ms / 1000,
        decode_fold_mb_s=size_bytes / fold_ms / 1000,
        encode_times_floor=statistics.median(turn[1] / turn[0] for turn in turns),
        decode_fold_times_floor=statistics.median(turn[3] / turn[0] for turn in turns),
        encode_memory=max(
            peak_bytes(lambda delta=delta: codec.encode(delta, schema))  # type: ignore[misc]
            for delta in material.deltas
        )
        / size_bytes,
        decode_memory=max(
            peak_bytes(lambda payload=payload: codec.decode(payload, schema))  # type: ignore[misc]
            for payload in payloads
        )
        / size_bytes,
    )


def peak_bytes(work: Callable[[], object]) -> int:
    """What a call allocates at its peak, its result included."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def print_table(size: str, material: Material, speeds: Mapping[str, Speed]) -> None:
    """One row a codec."""
    print(f"\n{size}: {material.schema.size:,} parameters, {material.origin}")
    print("codec      payload B   encode ms   MB/s  × floor   decode ms  + fold ms   MB/s  × floor   memory")
    for name, speed in speeds.items():
        print(
            f"{name:9} {speed.payload_bytes:10,.0f} {speed.encode_ms:11.3f} {speed.encode_mb_s:6.0f} "
            f"{speed.encode_times_floor:8.2f} {speed.decode_ms:11.3f} {speed.decode_fold_ms:10.3f} "
            f"{speed.decode_fold_mb_s:6.0f} {speed.decode_fold_times_floor:8.2f}   "
            f"{speed.encode_memory:.2f} / {speed.decode_memory:.2f}"
        )


class Options(argparse.Namespace):
    """The command line."""

    data: Path
    deltas: Path | None
    synthetic: bool
    size: list[str] | None
    repeats: int


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(), help="directory with mnist.npz")
    parser.add_argument("--deltas", type=Path, help="directory with archives made before, TASK.npz")
    parser.add_argument(
        "--synthetic", action="store_true", help="train nothing but for the share of training"
    )
    parser.add_argument("--size", action="append", choices=BY_SIZE, help="this one; may be given repeatedly")
    parser.add_argument("--repeats", type=int, default=25, help=f"turns, at least {LEAST_REPEATS}")
    options = parser.parse_args(namespace=Options())
    options.repeats = max(LEAST_REPEATS, options.repeats)
    return options


def material_of(size: str, options: Options) -> Material:
    """Real deltas where they can be had."""
    task = BY_SIZE[size]
    archive = options.deltas / f"{task}.npz" if options.deltas else None
    if archive and archive.is_file():
        return archived(archive)
    if options.synthetic or task not in available(options.data):
        return synthetic(task)
    return trained(task, options.data)


def main() -> None:
    """Measure and print the report."""
    options = _options()
    materials = {size: material_of(size, options) for size in options.size or BY_SIZE}
    found: dict[str, dict[str, Speed]] = {}
    for size, material in materials.items():
        found[size] = {
            name: measure(codec, material, options.repeats) for name, codec in codecs.CODECS.items()
        }
        print_table(size, material, found[size])
    training_ms = next(
        (each.training_cpu_ms for size, each in materials.items() if BY_SIZE[size] == TRAINING_TASK), None
    )
    if training_ms is None:
        training_ms = trained(TRAINING_TASK, options.data).training_cpu_ms
    report(found, materials, training_ms)


def report(
    found: Mapping[str, Mapping[str, Speed]], materials: Mapping[str, Material], training_ms: float | None
) -> None:
    """The last line."""
    largest, trained_size = found.get("1M", {}), found.get("100k", {})
    default, trained_one = largest.get(DEFAULT_CODEC), trained_size.get(DEFAULT_CODEC)
    held = [
        speed
        for size in LARGE_ENOUGH
        for name, speed in found.get(size, {}).items()
        if codecs.get(name).adjustable
    ]
    share = trained_one.encode_ms / training_ms if trained_one and training_ms else None
    print_report(
        "at 1 M parameters the default codec encodes 200 MB/s of float32, and decodes and folds 1 GB/s",
        [
            Target(
                "encode at 1 M, MB/s", default.encode_mb_s if default else None, ENCODE_MB_S, at_most=False
            ),
            Target(
                "decode and fold at 1 M, MB/s",
                default.decode_fold_mb_s if default else None,
                FOLD_MB_S,
                at_most=False,
            ),
            Target("encode / local training, digits CNN", share, TRAINING_SHARE),
            Target(
                "encode's peak memory / float32, from 100 k",
                max((speed.encode_memory for speed in held), default=None),
                MOST_MEMORY,
            ),
            Target(
                "decode's peak memory / float32, from 100 k",
                max((speed.decode_memory for speed in held), default=None),
                MOST_MEMORY,
            ),
        ],
        default_codec=DEFAULT_CODEC,
        floor="copying the float32 bytes once, and one multiplication and addition of the vector; same turns",
        local_training_cpu_ms=training_ms,
        deltas={size: material.origin for size, material in materials.items()},
        parameters={size: material.schema.size for size, material in materials.items()},
        codecs={size: {name: asdict(speed) for name, speed in rows.items()} for size, rows in found.items()},
    )


if __name__ == "__main__":
    main()
