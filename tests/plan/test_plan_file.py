import json
import subprocess
import sys
import textwrap
import zlib

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from coordinator.plan.file import BuiltPlan, DamagedPlanFile, load, save
from fedtide.cli.plan import plan as plan_command
from fedtide.wire.plan import open_plan, seal_plan
from fedtide.wire.signatures import SigningKey


@pytest.fixture
def file(mlp, tmp_path):
    path = tmp_path / "mlp.plan"
    save(mlp, path)
    return path


def test_a_saved_plan_comes_back_whole(mlp, file):
    loaded = load(file)
    assert loaded.plan == mlp.plan
    assert loaded.plan.id == mlp.plan.id
    np.testing.assert_array_equal(loaded.initial, mlp.initial)
    assert [path.name for path in file.parent.iterdir()] == ["mlp.plan"]


def test_every_truncation_is_damaged(file):
    content = file.read_bytes()
    for length in range(0, len(content), 13):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedPlanFile, match="build it again"):
            load(file)


def test_no_changed_byte_gives_another_plan(mlp, file):
    content = file.read_bytes()
    accepted = 0
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 0x40
        file.write_bytes(changed)
        try:
            loaded = load(file)
        except DamagedPlanFile:
            continue
        accepted += 1
        assert loaded.plan == mlp.plan
        np.testing.assert_array_equal(loaded.initial, mlp.initial)
    assert accepted <= 2  # bits of fill at the end of a deflate stream mean nothing (RFC 1951, section 3.2.3)


def test_parameters_of_another_plan_are_damaged(mlp, tmp_path):
    save(BuiltPlan(mlp.plan, mlp.initial[:-1]), tmp_path / "short.plan")
    with pytest.raises(DamagedPlanFile, match="776 bytes of parameters, and the plan needs 780"):
        load(tmp_path / "short.plan")


def test_a_saved_plan_can_be_published(mlp, file):
    key = SigningKey.from_seed(bytes(32))
    blob = seal_plan(load(file).plan, key)
    assert open_plan(blob, key.public) == mlp.plan
    assert len(blob) < 8192


def test_the_plan_id_changes_with_the_manifest(mlp):
    renamed = msgspec.structs.replace(mlp.plan.manifest, name="other")
    assert type(mlp.plan)(renamed, mlp.plan.train, mlp.plan.evaluation).id != mlp.plan.id


DEVICE = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "onnx", "onnxscript"}:
                raise ModuleNotFoundError(f"{name} is not on a device")

    sys.meta_path.insert(0, Absent())

    import numpy as np
    from coordinator.plan.file import load
    from edge_agent.dataset import Dataset
    from edge_agent.plan_runtime import Evaluator, Trainer
    from fedtide.wire.training import Training

    built = load(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((64, 8)).astype(np.float32)
    dataset = Dataset((inputs,), inputs[:, :3].argmax(1))
    evaluator = Evaluator(built.plan)
    before = evaluator.evaluate(built.initial, dataset).loss
    result = Trainer(built.plan).run_epochs(built.initial, dataset, Training(local_epochs=5), rng)
    print(json.dumps([before, evaluator.evaluate(result.parameters, dataset).loss, "torch" in sys.modules]))
    """
)


def test_a_plan_trains_where_torch_and_onnx_are_absent(file):
    finished = subprocess.run(
        [sys.executable, "-c", DEVICE, str(file)], capture_output=True, text=True, check=True, timeout=60
    )
    before, after, has_torch = json.loads(finished.stdout)
    assert after < before
    assert not has_torch


TASK_FILE = """
import torch
from coordinator.plan.task import Task

model = torch.nn.Linear(3, 2)
task = Task(
    name="line",
    model=model,
    loss=torch.nn.MSELoss(),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    example=(torch.randn(4, 3), torch.randn(4, 2)),
)
"""


def test_a_build_sums_itself_up_for_machines(tmp_path):
    (tmp_path / "line.py").write_text(TASK_FILE)
    out = tmp_path / "line.plan"
    ran = CliRunner().invoke(plan_command, ["build", str(tmp_path / "line.py"), "--out", str(out), "--json"])
    assert ran.exit_code == 0
    summary, built = json.loads(ran.stdout), load(out)
    graphs = (built.plan.train, built.plan.evaluation)
    assert summary == {
        "file": str(out),
        "plan": built.plan.id,
        "name": "line",
        "parameters": 8,  # 3 * 2 + 2, of 4 bytes each
        "model_bytes": 32,
        "graph_bytes": sum(map(len, graphs)),
        "compressed_bytes": sum(len(zlib.compress(graph, 9)) for graph in graphs),
        "verified": msgspec.to_builtins(built.plan.manifest.verified),
    }
    assert "exporting the training step" in ran.stderr
