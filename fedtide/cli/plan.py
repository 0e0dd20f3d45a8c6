"""``fedtide plan``: from a torch module to a training plan that devices run without torch."""

import time
import zlib
from pathlib import Path

import click
import msgspec

from coordinator.plan.file import BuiltPlan, load, save
from fedtide.wire.plan import PlanManifest, Verified


@click.group()
def plan() -> None:
    """Build and show training plans."""


@plan.command()
@click.argument("task", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("model.plan"), show_default=True)
@click.option(
    "--max-model-bytes",
    type=click.IntRange(min=1),
    default=64 << 20,
    show_default=True,
    help="What the fleet's agents accept.",
)
@click.option("--json", "as_json", is_flag=True, help="The summary for machines.")
def build(task: Path, out: Path, *, max_model_bytes: int, as_json: bool) -> None:
    """Build the training plan of TASK, a Python file with a variable or function named ``task``.

    \b
    Example: fedtide plan build digits.py --out pumps/model.plan
    """
    begun = time.monotonic()

    def progress(stage: str) -> None:
        click.echo(f"{time.monotonic() - begun:5.1f} s  {stage} …", err=True)

    progress("starting torch")
    import coordinator.plan.build as building  # noqa: PLC0415 - torch takes two seconds to import
    from coordinator.plan.task import load_task  # noqa: PLC0415

    built = building.build(load_task(task), progress, max_model_bytes)
    save(built, out)
    summary = _summary(built, out)
    if as_json:
        click.echo(msgspec.json.encode(summary).decode())
        return
    verified = summary.verified
    share = summary.compressed_bytes / summary.graph_bytes
    click.echo(
        f"Wrote {out}: plan {summary.plan}, {summary.parameters:,} parameters, "
        f"{summary.model_bytes:,} bytes.\n"
        f"Checked {verified.steps} steps: gradients within {verified.max_gradient_error:.1e} of float64 "
        f"torch, median {verified.median_gradient_error:.1e},\n"
        f"  float32 torch itself {verified.torch_float32_max_error:.1e}; optimizer, loss and evaluation.\n"
        f"Graphs: {summary.graph_bytes:,} bytes, {summary.compressed_bytes:,} compressed ({share:.0%}), "
        "sent once to each device."
    )


class _Summary(msgspec.Struct, frozen=True):
    """What was built. ``graph_bytes`` and ``compressed_bytes`` count both graphs."""

    file: str
    plan: str
    name: str
    parameters: int
    model_bytes: int
    graph_bytes: int
    compressed_bytes: int
    verified: Verified


def _summary(built: BuiltPlan, out: Path) -> _Summary:
    manifest, graphs = built.plan.manifest, (built.plan.train, built.plan.evaluation)
    return _Summary(
        file=str(out),
        plan=built.plan.id,
        name=manifest.name,
        parameters=manifest.schema.size,
        model_bytes=4 * manifest.schema.size,
        graph_bytes=sum(map(len, graphs)),
        compressed_bytes=sum(len(zlib.compress(graph, 9)) for graph in graphs),
        verified=manifest.verified,
    )


@plan.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def show(file: Path, *, as_json: bool) -> None:
    """Show what is in a plan FILE.

    \b
    Example: fedtide plan show pumps/model.plan
    """
    built = load(file)
    manifest = built.plan.manifest
    if as_json:
        click.echo(msgspec.json.encode(manifest).decode())
        return
    training, verified = manifest.training, manifest.verified
    lines = {
        "plan": built.plan.id,
        "name": manifest.name,
        "parameters": f"{manifest.schema.size:,} in {len(manifest.schema.tensors)} tensors",
        "inputs": ", ".join(f"{spec.name} {spec.dtype} {_shape(spec.shape)}" for spec in manifest.inputs),
        "targets": f"{manifest.targets.dtype} {_shape(manifest.targets.shape)}"
        if manifest.targets
        else "none",
        "optimizer": f"{manifest.optimizer}, learning rate {training.learning_rate:g}",
        "training": f"{training.local_epochs} local epochs, batches of {training.batch_size}",
        "in the step": _options(manifest),
        "metric": manifest.metric or "none",
        "graphs": f"train {len(built.plan.train):,} bytes, evaluation {len(built.plan.evaluation):,} bytes",
        "gradients": f"median {verified.median_gradient_error:.1e}, max {verified.max_gradient_error:.1e} "
        f"from float64 torch over {verified.steps} steps",
        "built by": manifest.producer,
    }
    for name, text in lines.items():
        click.echo(f"{name:<11} {text}")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "×".join("batch" if axis is None else str(axis) for axis in shape)


def _options(manifest: PlanManifest) -> str:
    """What the plan's step has beyond the gradient and the optimizer."""
    training, options = manifest.training, []
    if manifest.proximal_input is not None:
        options.append(f"proximal term, μ {training.proximal:g}")
    if manifest.clip_norm is not None:
        options.append(f"gradients clipped to norm {manifest.clip_norm:g}")
    if manifest.class_weights is not None:
        options.append(f"class weights, {training.class_weights}")
    if manifest.buffers == "local":
        options.append("buffers of each device's own")
    return ", ".join(options) or "nothing else"
