"""The released model on a device: the Python interface and ``fedtide agent predict``."""

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_agent.inference import LocalModel, NoModel
from edge_agent.kept_state import Kept, KeptFile, own_tensors
from edge_agent.model_slots import ModelSlots
from edge_agent.settings import KEPT_FILE, MODELS_DIRECTORY
from fedtide.cli import command
from fedtide.cli.predict import probabilities
from fedtide.wire.chunks import blob_ref
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.messages import CodecRequest, Head, Release
from fedtide.wire.parameters import fingerprint, to_bytes
from fedtide.wire.plan import Plan, seal_plan
from fedtide.wire.seal import seal
from fedtide.wire.settings import SettingsError
from fedtide.wire.signatures import HEAD_DOMAIN, SigningKey

KEY = SigningKey.from_seed(bytes(range(32)))
RNG = np.random.default_rng(11)
INPUTS = RNG.standard_normal((600, 8)).astype(np.float32)


def parameters(plan, version):
    return (0.3 * np.random.default_rng(version).standard_normal(plan.manifest.schema.size)).astype(
        np.float32
    )


@dataclass
class Device:
    """A device's files, which a coordinator's heads come to."""

    path: Path
    plan: Plan

    def __post_init__(self):
        (self.path / "agent.toml").write_text(
            f'fleet = "pumps"\ndevice = "pump-7"\ncoordinator_key = "{KEY.public}"\n'
            'key = "device.key"\nstate = "state"\n[data]\nkind = "npz"\npath = "examples.npz"\n'
        )
        self.slots = ModelSlots(self.path / "state" / MODELS_DIRECTORY, KEY.public, UNSYNCED_DISK)

    @property
    def settings(self):
        return self.path / "agent.toml"

    def head(self, version, released, gate):
        mine, theirs = (to_bytes(parameters(self.plan, number)) for number in (version, released or 0))
        return Head(
            fleet="pumps", epoch=1, version=version, parent_sha256=bytes(32), plan=self.plan.id,
            parameters_sha256=fingerprint(parameters(self.plan, version)),
            plan_blob=blob_ref(b"", 1), full_blob=blob_ref(mine, 100),
            update_codec=CodecRequest(id="q8"), training=True,
            release=released and Release(
                version=released, parameters_sha256=fingerprint(parameters(self.plan, released)),
                blob=blob_ref(theirs, 100), gate=gate,
            ),
            issued=0.0, expires=1.0,
        )  # fmt: skip

    def install(self, version, released=None, gate=""):
        """What an agent does with the head of a version that names a release."""
        head = self.head(version, released, gate)
        sealed, plan_blob = seal(head, KEY, HEAD_DOMAIN), seal_plan(self.plan, KEY)
        self.slots.install(sealed, head, plan_blob, to_bytes(parameters(self.plan, version)))
        if released is not None:
            self.slots.install_release(sealed, head, plan_blob, to_bytes(parameters(self.plan, released)))

    def torch_free_outputs(self, version, inputs):
        """The MLP 8-16-3 in numpy."""
        tensors = self.plan.manifest.schema.split(parameters(self.plan, version))
        hidden = np.maximum(inputs @ tensors["p.0.weight"].T + tensors["p.0.bias"], 0)
        return hidden @ tensors["p.2.weight"].T + tensors["p.2.bias"]


@pytest.fixture
def device(tmp_path, mlp):
    return Device(tmp_path, mlp.plan)


@pytest.mark.parametrize("examples", [1, 7, 256, 600])
def test_the_outputs_are_the_released_versions(device, examples):
    device.install(5, released=4, gate="accuracy at least 0.9")
    model = LocalModel.open(device.settings)
    outputs = model.predict(INPUTS[:examples])
    assert (model.version, model.gate, outputs.shape, outputs.dtype) == (
        4, "accuracy at least 0.9", (examples, 3), np.float32,
    )  # fmt: skip
    assert outputs == pytest.approx(device.torch_free_outputs(4, INPUTS[:examples]), abs=1e-5)
    assert model.description == "version 4 of 'mlp', released: accuracy at least 0.9"


def test_without_a_gate_the_version_is_named_and_that_there_is_none(device):
    device.install(5, released=5)
    model = LocalModel.open(device.settings)
    assert model.description == "version 5 of 'mlp'; no release gate is set"


def test_the_newest_installed_is_used_when_asked_for(device):
    device.install(5)
    with pytest.raises(NoModel, match="had released no version yet"):
        LocalModel.open(device.settings)
    model = LocalModel.open(device.settings, newest=True)
    assert model.predict(INPUTS) == pytest.approx(device.torch_free_outputs(5, INPUTS), abs=1e-5)
    assert model.description == "version 5 of 'mlp', the newest installed; it is not the released one"


def test_a_state_directory_and_a_key_will_do(device):
    device.install(5, released=5)
    model = LocalModel.open(device.path / "state", str(KEY.public))
    assert model.version == 5
    with pytest.raises(NoModel):
        LocalModel.open(device.path / "state", SigningKey.from_seed(bytes(32)).public)  # signed by another


def test_settings_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SettingsError, match=r"agent\.toml"):
        LocalModel.open(tmp_path / "agent.toml")


def test_a_newer_release_is_taken_when_asked_for(device):
    device.install(1, released=1)
    model = LocalModel.open(device.settings)
    assert not model.refresh()
    device.install(2, released=1)
    assert (model.refresh(), model.version) == (False, 1)
    device.install(3, released=3)
    assert (model.refresh(), model.version) == (True, 3)
    assert model.predict(INPUTS) == pytest.approx(device.torch_free_outputs(3, INPUTS), abs=1e-5)
    (device.path / "state" / MODELS_DIRECTORY / "released.model").write_bytes(b"damaged")
    assert (model.refresh(), model.version) == (False, 3)


def test_a_reader_never_sees_half_of_what_the_agent_writes(device):
    """Each version has another plan, so the agent removes the plan of the one before last, too."""
    done = threading.Event()
    plans = [
        Plan(msgspec.structs.replace(device.plan.manifest, name=f"mlp-{number}"), device.plan.train,
             device.plan.evaluation)
        for number in range(3)
    ]  # fmt: skip
    device.install(1, released=1)

    def agent():
        for version in range(2, 60):
            replace(device, plan=plans[version % 3]).install(version, released=version)
        done.set()

    model = LocalModel.open(device.settings)
    writing = threading.Thread(target=agent)
    writing.start()
    seen = [model.version]
    while not done.is_set():
        model.refresh()
        assert np.isfinite(model.predict(INPUTS[:2])).all()
        seen.append(model.version)
    writing.join()
    model.refresh()
    assert (seen, model.version) == (sorted(seen), 59)


def test_a_devices_own_statistics_are_used_where_the_plan_says_so(tmp_path, cnn):
    manifest = msgspec.structs.replace(cnn.plan.manifest, buffers="local")
    device = Device(tmp_path, Plan(manifest, cnn.plan.train, cnn.plan.evaluation))
    device.install(1, released=1)
    images = RNG.standard_normal((5, 1, 8, 8)).astype(np.float32)
    model = LocalModel.open(device.settings)
    before = model.predict(images)
    assert np.array_equal(model.parameters, parameters(device.plan, 1))
    own = tuple(np.full([*tensor.shape], 2.5, np.float32) for tensor, _ in own_tensors(manifest))
    KeptFile(tmp_path / "state" / KEPT_FILE, UNSYNCED_DISK).keep(device.plan, Kept(statistics=own))
    assert model.refresh()
    for tensor, place in manifest.schema.slices():
        expected = 2.5 if tensor.name.startswith("b.") else parameters(device.plan, 1)[place]
        assert np.all(model.parameters[place] == expected)
    assert not np.allclose(model.predict(images), before)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((INPUTS, INPUTS), "there are 2 inputs, the plan takes 1"),
        ((INPUTS[:, :5],), r"x0 is float32 of shape \(600, 5\); the plan takes numbers of shape examples×8"),
        ((INPUTS[0],), r"x0 is float32 of shape \(8,\)"),
        ((3.0,), r"x0 is float64 of shape \(\)"),
        ((INPUTS[:0],), r"x0 is float32 of shape \(0, 8\)"),
        (([["a"] * 8],), "x0 is <U1"),
        (
            (np.where(np.arange(600)[:, None] == 41, np.nan, INPUTS),),
            "NaN or infinite, the first in example 42",
        ),
        ((1e300 * INPUTS.astype(np.float64),), "NaN or infinite, the first in example 1"),
    ],
)
def test_inputs_that_do_not_fit_are_explained(device, inputs, said):
    device.install(1, released=1)
    with pytest.raises(ValueError, match=said):
        LocalModel.open(device.settings).predict(*inputs)


def run(device, *arguments):
    return CliRunner().invoke(
        command, ["agent", "predict", "--config", str(device.settings), *map(str, arguments)]
    )


def write_csv(path, inputs, label=None):
    names = [f"f{index}" for index in range(inputs.shape[1])] + (["label"] if label else [])
    rows = [",".join([*(repr(float(value)) for value in row), *([label] if label else [])]) for row in inputs]
    path.write_text("\n".join([",".join(names), *rows]) + "\n")
    return path


def test_predict_prints_a_class_for_each_example(device):
    device.install(9, released=8, gate="accuracy at least 0.9")
    np.savez(device.path / "today.npz", x=INPUTS[:4], y=np.zeros(4))
    shown = run(device, "--input", device.path / "today.npz")
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == "Model: version 8 of 'mlp', released: accuracy at least 0.9\n"
    header, *lines = shown.stdout.splitlines()
    assert header.split() == ["example", "class", "probability"]
    outputs = device.torch_free_outputs(8, INPUTS[:4])
    assert [line.split()[:2] for line in lines] == [
        [str(number), str(label)] for number, label in enumerate(outputs.argmax(1), start=1)
    ]
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    assert [float(line.split()[2]) for line in lines] == pytest.approx(shares.max(axis=1), abs=1e-4)


@pytest.mark.parametrize("label", [None, "2", "unknown"])
def test_predict_reads_tables_with_and_without_labels(device, label):
    device.install(3, released=3)
    table = write_csv(device.path / "today.csv", INPUTS[:4], label)
    shown = run(device, "--input", table, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert (found["version"], found["released"], found["gate"]) == (3, True, None)
    outputs = device.torch_free_outputs(3, INPUTS[:4])
    assert np.array(found["outputs"]) == pytest.approx(outputs, abs=1e-5)
    assert found["classes"] == outputs.argmax(1).tolist()
    assert np.array(found["probabilities"]).sum(axis=1) == pytest.approx(np.ones(4), abs=1e-6)


@pytest.mark.parametrize("names", [("x",), ("x0",), ("readings",)])
def test_predict_writes_an_archive(device, names):
    device.install(3, released=3)
    if names == ("readings",):
        device.settings.write_text(device.settings.read_text() + 'inputs = ["readings"]\n')
    np.savez(device.path / "today.npz", **{names[0]: INPUTS})
    shown = run(device, "--input", device.path / "today.npz", "--output", device.path / "out.npz")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == ""
    with np.load(device.path / "out.npz", allow_pickle=False) as archive:
        assert archive["outputs"] == pytest.approx(device.torch_free_outputs(3, INPUTS), abs=1e-5)
        assert archive["classes"].tolist() == archive["outputs"].argmax(1).tolist()
        assert int(archive["version"]) == 3


def test_predict_prints_the_outputs_of_a_model_without_classes(tmp_path, autoencoder):
    device = Device(tmp_path, autoencoder.plan)
    device.install(3, released=3)
    np.savez(tmp_path / "today.npz", x=INPUTS[:2])
    shown = run(device, "--input", tmp_path / "today.npz")
    assert shown.exit_code == 0, shown.output
    model = LocalModel.open(device.settings)
    rows = [[float(value) for value in line.split()[1:]] for line in shown.stdout.splitlines()]
    assert np.array(rows) == pytest.approx(model.predict(INPUTS[:2]), rel=1e-4)


def test_probabilities_that_the_model_gives_itself_are_left_alone(device):
    given = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], np.float32)
    assert probabilities(given, device.plan.manifest) is given
    logits = np.log(given + 1e-9)
    assert probabilities(logits, device.plan.manifest) == pytest.approx(given, abs=1e-6)
    huge = probabilities(np.array([[1e30, 0.0, -1e30]], np.float32), device.plan.manifest)
    assert huge.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("today.txt", b"", 2, ".npz and .csv are read"),
        ("none.npz", None, 2, "does not exist"),
        ("today.npz", b"not an archive", 1, "is not a numpy archive"),
        ("today.csv", b"a,b\n1,2\n", 1, "8"),
        ("today.csv", b"a,b,c,d,e,f,g,h\n1,2,3,4,5,6,7,8\n1,2,3,4,x,6,7,8\n", 1, "'x'"),
    ],
)
def test_mistakes_are_explained(device, name, content, code, said):
    device.install(3, released=3)
    if content is not None:
        (device.path / name).write_bytes(content)
    shown = run(device, "--input", device.path / name)
    text = f"{shown.output} {shown.exception}"
    assert (shown.exit_code, said in text) == (code, True), text


def test_arrays_that_do_not_fit_are_explained_with_the_file(device):
    device.install(3, released=3)
    np.savez(device.path / "today.npz", x=INPUTS[:, :3])
    shown = run(device, "--input", device.path / "today.npz")
    assert shown.exit_code == 1
    assert (
        "today.npz: x0 is float32 of shape (600, 3); the plan takes numbers of shape examples×8"
        in shown.output
    )
    np.savez(device.path / "today.npz", other=INPUTS)
    shown = run(device, "--input", device.path / "today.npz")
    assert "no array 'x'; the archive has other" in str(shown.exception)


def test_without_a_model_predict_says_what_is_missing(device):
    np.savez(device.path / "today.npz", x=INPUTS)
    shown = run(device, "--input", device.path / "today.npz")
    assert shown.exit_code == 1
    assert "there is no usable model" in str(shown.exception)
