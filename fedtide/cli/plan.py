"""``fedtide plan``: from a torch module to a training plan that devices run without torch."""

from pathlib import Path

import click

from coordinator.plan.file import load, save


@click.group()
def plan() -> None:
    """Build and show training plans."""


@plan.command()
@click.argument("task", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("model.plan"), show_default=True)
def build(task: Path, out: Path) -> None:
    """Build the training plan of TASK, a Python file with a variable or function named ``task``.

    \b
    Example: fedtide plan build digits.py --out pumps/model.plan
    """
    import coordinator.plan.build as building  # noqa: PLC0415 - torch takes two seconds to import
    from coordinator.plan.task import load_task  # noqa: PLC0415

    click.echo(f"Building {task} …", err=True)
    built = building.build(load_task(task))
    save(built, out)
    verified = built.plan.manifest.verified
    click.echo(
        f"Wrote {out}: plan {built.plan.id}, {built.plan.manifest.schema.size:,} parameters, "
        f"gradients within {verified.max_gradient_error:.1e} of float64 torch over {verified.steps} steps."
    )


@plan.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def show(file: Path, *, as_json: bool) -> None:
    """Show what is in a plan FILE.

    \b
    Example: fedtide plan show pumps/model.plan
    """
    import msgspec  # noqa: PLC0415

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
