"""Claim: for nine tenths of its energy, a delta takes 0.09 bit a parameter at 100 k, 0.07 at 1 M.

Rate and distortion of the update codecs on deltas of real asynchronous runs: the last ones of different
devices, from ``federated_deltas``. Distortion is the NMSE, ‖x − x̂‖² / ‖x‖². Bytes are whole payloads that
were decoded again; for peers see ``codec_peers``. Each delta is coded at a row of settings; its bytes at an
NMSE are interpolated between them, both logarithmic, and the median over the deltas is counted.

Beside it: the scalar path of ``ecsq`` on normally distributed numbers against the limit of entropy-coded
uniform quantisation; what Adam on the devices costs against SGD; and what encoding takes of the CPU that the
local training took.

No table or constant of a codec was made from these deltas. Those of ``ecsq`` were chosen on the same tasks'
runs with seed 0; these are of another seed: other paces, turns and orders of examples, on the same data.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from codec_peers import Coder, Eden, Received, Scalar, TopK
from federated_deltas import Deltas, adam, deltas_of
from federated_tasks import TASKS, available
from report import Target, own_cpu_seconds, print_report

from fedtide.wire import codecs
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.parameters import Schema, TensorSpec, Vector

SEED: Final = 11
"""Of the runs; fixed before anything was measured with it."""
NMSES: Final = (0.05, 0.10, 0.20)
STEPS: Final = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)
PEER_STEPS: Final = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SHARES: Final = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
CODERS: Final[tuple[Coder, ...]] = ("arithmetic", "zlib", "rice")
EDEN_BITS: Final = (1, 2, 3, 4)
EDEN_DELTAS: Final = 3
"""Of a few only: the rotation makes its error nearly the same for every delta, and it is slow."""
OURS: Final = tuple(name for name in ("lowrank", "ecsq") if name in codecs.CODECS)
BOUNDS: Final[Mapping[str, float]] = {"digits-cnn": 0.09, "activity-cnn": 0.09, "mnist-mlp": 0.07}
"""Bits a parameter at an NMSE of 0.10."""
LIMITS_DB: Final[Mapping[float, float]] = {1.0: 4.58, 2.0: 10.51, 4.0: 22.55}
"""Signal to noise by bits, for N(0, 1): entropy-coded uniform threshold quantisation at its best."""
NEAR_DB: Final = 0.15
ENCODE_SHARE: Final = 0.02
NORMAL_VALUES: Final = 512
ADAM_UPDATES: Final = 240
ADAM_DELTAS: Final = 8

Send = Callable[[Vector], Received]


@dataclass(frozen=True)
class Curve:
    """One codec on one task's deltas.

    Attributes:
        payload_bytes: shape ``(settings, deltas)``.
        nmse: of the same shape.
    """

    payload_bytes: npt.NDArray[np.float64]
    nmse: npt.NDArray[np.float64]

    def bytes_at(self, nmse: float) -> float | None:
        """Median over the deltas, interpolated; None where a delta's curve does not reach so far."""
        found = []
        for sizes, errors in zip(self.payload_bytes.T, self.nmse.T, strict=True):
            order = np.argsort(errors)
            if not errors[order[0]] <= nmse <= errors[order[-1]]:
                return None
            log_size = np.interp(np.log(nmse), np.log(errors[order]), np.log(sizes[order]))
            found.append(float(np.exp(log_size)))
        return statistics.median(found)


@dataclass(frozen=True)
class Measured:
    """A task's deltas and its curves.

    Attributes:
        schema: of the task's model.
        curves: by codec.
        middle: the same of deltas from two fifths of the run, our codecs only.
        encode_cpu_ms: at the codec's own step, median over the deltas, by codec.
        training_cpu_ms: of a local training in the same run, median.
    """

    schema: Schema
    curves: dict[str, Curve]
    middle: dict[str, Curve]
    encode_cpu_ms: dict[str, float]
    training_cpu_ms: float


def ours(codec_id: str, schema: Schema, step: float) -> Send:
    """One of our codecs at a step: encoded, and decoded again."""
    codec, request = codecs.get(codec_id), Request(Rate(step=step))

    def send(delta: Vector) -> Received:
        payload = codec.encode(delta, schema, request)
        return Received(len(payload), codec.decode(payload, schema))

    return send


def curve(settings: Sequence[Send], deltas: Sequence[Vector]) -> Curve:
    """Code every delta at every setting."""
    sizes, errors = [], []
    for send in settings:
        received = [send(delta) for delta in deltas]
        sizes.append([one.payload_bytes for one in received])
        errors.append([_nmse(delta, one.values) for delta, one in zip(deltas, received, strict=True)])
    return Curve(np.array(sizes), np.array(errors))


def measure(found: Deltas, count: int) -> Measured:
    """All codecs and peers on one task's deltas, so many of them."""
    deltas, schema = list(found.late[:count]), found.schema
    curves = _ours_on(deltas, schema)
    for coder in CODERS:
        curves[f"scalar, {coder}"] = curve([Scalar(coder, schema, step).send for step in PEER_STEPS], deltas)
    curves["top-k"] = curve([TopK(share).send for share in SHARES], deltas)
    curves["EDEN"] = curve([Eden(bits).send for bits in EDEN_BITS], deltas[:EDEN_DELTAS])
    curves["q8"] = curve([_plain("q8", schema)], deltas)
    return Measured(
        schema,
        curves,
        middle=_ours_on(list(found.middle[:count]), schema),
        encode_cpu_ms={name: _encode_cpu_ms(name, schema, deltas) for name in (*OURS, "q8")},
        training_cpu_ms=found.training_cpu_ms,
    )


def _ours_on(deltas: Sequence[Vector], schema: Schema) -> dict[str, Curve]:
    return {name: curve([ours(name, schema, step) for step in STEPS], deltas) for name in OURS}


def _plain(codec_id: str, schema: Schema) -> Send:
    codec = codecs.get(codec_id)

    def send(delta: Vector) -> Received:
        payload = codec.encode(delta, schema)
        return Received(len(payload), codec.decode(payload, schema))

    return send


def _nmse(delta: Vector, received: Vector) -> float:
    error = np.subtract(delta, received, dtype=np.float64)
    return float(error @ error) / float(np.sum(np.square(delta, dtype=np.float64)))


def _encode_cpu_ms(codec_id: str, schema: Schema, deltas: Sequence[Vector]) -> float:
    codec = codecs.get(codec_id)
    codec.encode(deltas[0], schema)
    times = []
    for delta in deltas:
        before = own_cpu_seconds()
        codec.encode(delta, schema)
        times.append(1000 * (own_cpu_seconds() - before))
    return statistics.median(times)


def normal_gap_db() -> dict[str, float]:
    """Signal to noise of ``ecsq`` on N(0, 1) below the limit, in dB by bits a parameter."""
    shape = (NORMAL_VALUES, NORMAL_VALUES)
    schema = Schema(tensors=(TensorSpec(name="normal", dtype="float32", shape=shape),))
    values = np.random.default_rng(0).standard_normal(schema.size).astype(np.float32)
    found = curve([ours("ecsq", schema, step) for step in np.geomspace(0.2, 2.5, 24)], [values])
    bits, noise_db = 8 * found.payload_bytes[:, 0] / schema.size, -10 * np.log10(found.nmse[:, 0])
    order = np.argsort(bits)
    return {
        f"{rate:g}": limit - float(np.interp(rate, bits[order], noise_db[order]))
        for rate, limit in LIMITS_DB.items()
    }


def adam_against_sgd(data: Path, keep: Path | None) -> dict[str, dict[str, dict[str, float | None]]]:
    """Bits a parameter by local optimizer, codec and NMSE, on digits-cnn early in a run."""
    task = TASKS["digits-cnn"]
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for optimizer, one in (("sgd", task), ("adam", adam(task))):
        deltas = deltas_of(one, data, keep, ADAM_UPDATES, SEED)
        late = list(deltas.late[:ADAM_DELTAS])
        found[optimizer] = bits_per_parameter(_ours_on(late, deltas.schema), deltas.schema)
    return found


def bits_per_parameter(curves: Mapping[str, Curve], schema: Schema) -> dict[str, dict[str, float | None]]:
    """By codec and NMSE; None where its curve does not reach so far."""
    table: dict[str, dict[str, float | None]] = {}
    for name, one in curves.items():
        at = {f"{nmse:.2f}": one.bytes_at(nmse) for nmse in NMSES}
        table[name] = {nmse: None if size is None else 8 * size / schema.size for nmse, size in at.items()}
    return table


def print_table(task: str, measured: Measured) -> None:
    """For people: bytes and bits a parameter at each NMSE."""
    size = measured.schema.size
    print(f"\n{task}: {size:,} parameters, {4 * size:,} bytes as float32")
    for name, one in measured.curves.items():
        if name == "q8":
            continue  # has one rate only
        cells = []
        for nmse in NMSES:
            found = one.bytes_at(nmse)
            cells.append("-" if found is None else f"{found:,.0f} B ({8 * found / size:.3f})")
        print(f"  {name:20}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    for name, found_at in bits_per_parameter(measured.middle, measured.schema).items():
        bits = found_at["0.10"]
        print(f"  {name}, two fifths of the way, at 0.10: {'-' if bits is None else f'{bits:.3f}'}")
    fixed = measured.curves["q8"]
    print(f"  q8 always: {fixed.payload_bytes[0, 0]:,.0f} B at an NMSE of {np.median(fixed.nmse):.1e}")
    print(f"  CPU ms: training {measured.training_cpu_ms:.1f}, encoding {measured.encode_cpu_ms}")


def plot(tasks: Mapping[str, Measured], path: Path) -> None:
    """Rate against distortion, a panel for each task."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second that only --plot needs)

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), squeeze=False)
    for panel, (task, measured) in zip(panels[0], tasks.items(), strict=True):
        for name, one in measured.curves.items():
            if len(one.nmse) == 1:
                continue  # q8 is far below, to the right
            bits = 8 * np.median(one.payload_bytes, axis=1) / measured.schema.size
            panel.plot(
                bits,
                np.median(one.nmse, axis=1),
                marker="o",
                markersize=3,
                linewidth=2.2 if name in OURS else 1.0,
                label=name,
            )
        panel.axhline(0.10, color="grey", linewidth=0.6, linestyle=":")
        panel.set(xscale="log", yscale="log", ylim=(3e-3, 1.1), xlim=(5e-3, 12))
        panel.set_title(f"{task}, {measured.schema.size:,} parameters", fontsize=10)
        panel.set_xlabel("payload, bits a parameter")
        panel.grid(visible=True, which="both", linewidth=0.3)
    panels[0][0].set_ylabel("NMSE")
    panels[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class Options(argparse.Namespace):
    """The command line."""

    data: Path | None
    tasks: list[str] | None
    deltas: int
    keep: Path | None
    plot: Path | None
    quick: bool


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory with har.npz and mnist.npz; else digits only")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--deltas", type=int, default=8, help="of each run, at most 16")
    parser.add_argument("--keep", type=Path, help="keep the runs' deltas in this directory for the next time")
    parser.add_argument("--plot", type=Path, help="write rate against distortion here (.png)")
    parser.add_argument("--quick", action="store_true", help="digits-mlp only, half the updates; not Adam")
    return parser.parse_args(namespace=Options())


def main() -> None:
    """Measure and print the report."""
    options = _options()
    began = time.monotonic()
    data = options.data or Path()
    names = options.tasks or (["digits-mlp"] if options.quick else available(options.data))
    tasks: dict[str, Measured] = {}
    for name in names:
        task = TASKS[name]
        deltas = deltas_of(task, data, options.keep, task.updates // 2 if options.quick else None, SEED)
        tasks[name] = measure(deltas, options.deltas)
        print_table(name, tasks[name])
    tables = {name: bits_per_parameter(one.curves, one.schema) for name, one in tasks.items()}
    targets = [
        Target(f"bit a parameter, {name}", tables[name]["lowrank"]["0.10"], bound)
        for name, bound in BOUNDS.items()
        if name in tables and "lowrank" in OURS
    ]
    gaps = normal_gap_db() if "ecsq" in OURS else {}
    targets += [Target(f"dB below the limit at {bits} bits", gap, NEAR_DB) for bits, gap in gaps.items()]
    if OURS:
        targets += [
            Target(
                f"encoding to training CPU, {name}",
                one.encode_cpu_ms[OURS[0]] / one.training_cpu_ms,
                ENCODE_SHARE,
            )
            for name, one in tasks.items()
        ]
    optimizers = {} if options.quick else adam_against_sgd(data, options.keep)
    if options.plot:
        plot(tasks, options.plot)
    print_report(
        "a delta takes 0.09 bit a parameter at 100 k parameters, 0.07 at a million, at an NMSE of 0.10",
        targets,
        deltas=options.deltas,
        bits_per_parameter=tables,
        middle_bits_per_parameter={
            name: bits_per_parameter(one.middle, one.schema) for name, one in tasks.items()
        },
        bytes={
            name: {codec: one.curves[codec].bytes_at(0.10) for codec in one.curves}
            for name, one in tasks.items()
        },
        local_optimizers=optimizers,
        encode_cpu_ms={name: one.encode_cpu_ms for name, one in tasks.items()},
        training_cpu_ms={name: one.training_cpu_ms for name, one in tasks.items()},
        wall_s=time.monotonic() - began,
    )


if __name__ == "__main__":
    main()
