"""``fedtide agent predict``: the released model on a device's own examples, offline."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import numpy as np

from edge_agent.data_sources import Csv, DataError, DataSource, Npz
from edge_agent.dataset import Array
from edge_agent.inference import LocalModel
from edge_agent.settings import AgentSettings
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import load

_KINDS: Final = (".npz", ".csv")
_SHOWN_OUTPUTS: Final = 8
_NO_LIMIT: Final = 1 << 60  # of memory: a row left out would be a prediction of another


@dataclass(frozen=True)
class Prediction:
    """What a model gives for some examples.

    Attributes:
        outputs: shape ``(examples, ...)``.
        probabilities: of the classes, shape ``(examples, classes)``; None where the plan's targets are not
            classes.
    """

    outputs: Array
    probabilities: Array | None

    @property
    def classes(self) -> Array | None:
        """The most probable class of each example."""
        return None if self.probabilities is None else self.probabilities.argmax(axis=1)


@click.command()
@click.option("--config", type=click.Path(path_type=Path), default=Path("agent.toml"), show_default=True)
@click.option("--input", "source", required=True, metavar="FILE",
              type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Examples, .npz or .csv, as in the agent's [data]; labels are not needed.")  # fmt: skip
@click.option("--output", default="-", show_default=True, metavar="FILE",
              help="Write an .npz with outputs, probabilities and classes; - prints them.")  # fmt: skip
@click.option("--newest", is_flag=True, help="Use the newest version installed, released or not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(config: Path, source: Path, *, output: str, newest: bool, as_json: bool) -> None:
    """Run the released model on examples, while or while not the agent runs. Needs no network.

    \b
    Exit codes: 0 predicted, 1 no model or unfit examples (explained), 2 wrong usage.
    Which version was used is said on standard error, and in the JSON.

    \b
    Examples:
      fedtide agent predict --config pump-7/agent.toml --input today.csv
      fedtide agent predict --config pump-7/agent.toml --input today.npz --output classes.npz
    """
    if source.suffix not in _KINDS:
        raise click.BadParameter(f"{source} ends in {source.suffix!r}; .npz and .csv are read",
                                 param_hint="--input")  # fmt: skip
    if output != "-" and not output.endswith(".npz"):
        raise click.BadParameter(f"{output} does not end in .npz", param_hint="--output")
    settings = load(config, AgentSettings)
    model = LocalModel.open(config, newest=newest)
    inputs = read_inputs(source, settings.data, model.manifest)
    try:
        outputs = model.predict(*inputs)
    except ValueError as error:
        raise click.ClickException(f"{source}: {error}") from error
    prediction = Prediction(outputs, probabilities(outputs, model.manifest))
    click.echo(f"Model: {model.description}", err=True)
    if output != "-":
        write(Path(output), prediction, model.version)
        click.echo(f"Wrote {output}: {len(outputs)} examples", err=True)
    if as_json:
        click.echo(msgspec.json.encode(report(prediction, model)).decode())
    elif output == "-":
        show(prediction)


def read_inputs(source: Path, data: DataSource, manifest: PlanManifest) -> tuple[Array, ...]:
    """The model's inputs from a file, read as the agent reads its own examples; labels are left alone.

    Raises:
        DataError: they cannot be read, or do not fit the plan.
    """
    if source.suffix == ".npz":
        return _npz_inputs(source, data, len(manifest.inputs))
    table = data if isinstance(data, Csv) else Csv(path=source)
    table = msgspec.structs.replace(table, path=source, max_bytes=_NO_LIMIT)
    dataset = table.load(msgspec.structs.replace(manifest, targets=None))
    if dataset.skipped:  # the outputs could not be told which row they belong to
        raise DataError(f"{source}: bad rows: {'; '.join(map(str, dataset.skipped))}")
    return dataset.inputs


def _npz_inputs(source: Path, data: DataSource, count: int) -> tuple[Array, ...]:
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            usual = [data.inputs] if isinstance(data, Npz) else []
            usual += [("x",)] if count == 1 else []
            usual += [tuple(f"x{index}" for index in range(count))]
            for names in usual:
                if all(name in archive for name in names):
                    return tuple(archive[name] for name in names)
            raise DataError(f"{source}: no array {usual[0][0]!r}; the archive has {', '.join(archive.files)}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{source} is not a numpy archive: {error}") from error


def probabilities(outputs: Array, manifest: PlanManifest) -> Array | None:
    """Probabilities of the classes, where targets are one class per example; None where they are not.

    Outputs that are none yet go through softmax, computed without overflow.
    """
    targets = manifest.targets
    one_class = targets is not None and targets.dtype == "int64" and len(targets.shape) == 1
    if not one_class or outputs.ndim != 2 or outputs.dtype.kind != "f":
        return None
    if outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=1e-4):
        return outputs
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    normalised: Array = powers / powers.sum(axis=1, keepdims=True)
    return normalised


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints.

    Attributes:
        version: of the model used.
        released: whether it is the released one.
        gate: what it had to pass; None where there is no gate.
        classes: the most probable class of each example; None where targets are not classes.
        probabilities: of the classes.
        outputs: as the model gives them.
    """

    version: int
    released: bool
    gate: str | None
    classes: list[int] | None
    probabilities: list[list[float]] | None
    outputs: list[Any]


def report(prediction: Prediction, model: LocalModel) -> Report:
    """The prediction for machines."""
    classes, shares = prediction.classes, prediction.probabilities
    return Report(
        version=model.version,
        released=model.gate is not None,
        gate=model.gate or None,
        classes=None if classes is None else classes.tolist(),
        probabilities=None if shares is None else shares.tolist(),
        outputs=prediction.outputs.tolist(),
    )


def write(path: Path, prediction: Prediction, version: int) -> None:
    """Write an archive: ``outputs``, ``version``, and for classes ``probabilities`` and ``classes``."""
    arrays = {"outputs": prediction.outputs, "version": np.array(version)}
    if prediction.probabilities is not None and prediction.classes is not None:
        arrays |= {"probabilities": prediction.probabilities, "classes": prediction.classes}
    np.savez(path, allow_pickle=False, **arrays)


def show(prediction: Prediction) -> None:
    """Print one line per example."""
    classes, shares = prediction.classes, prediction.probabilities
    if classes is not None and shares is not None:
        click.echo("example  class  probability")
        for number, (label, row) in enumerate(zip(classes, shares, strict=True), start=1):
            click.echo(f"{number:>7}  {label:>5}  {row[label]:>11.4f}")
        return
    for number, row in enumerate(prediction.outputs.reshape(len(prediction.outputs), -1), start=1):
        values = " ".join(f"{value:.6g}" for value in row[:_SHOWN_OUTPUTS])
        more = f" … {len(row) - _SHOWN_OUTPUTS} more" if len(row) > _SHOWN_OUTPUTS else ""
        click.echo(f"{number:>7}  {values}{more}")
