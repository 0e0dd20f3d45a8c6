import inspect

import numpy as np
import onnxruntime
import torch
import torch._dynamo
from torch.export.exported_program import _decompose_exported_program
from torch.onnx._internal.exporter._core import exported_program_to_ir
from torch.onnx._internal.exporter._registration import ONNXRegistry


def test_the_private_torch_function_has_the_signature_we_call():
    # Loud on purpose: joint_graph.trace depends on it, and no public function does the same in torch 2.13.
    assert torch.__version__.startswith("2.13."), (
        "check coordinator/plan with this torch, then change the pin"
    )
    assert list(inspect.signature(_decompose_exported_program).parameters) == [
        "ep",
        "cia_to_decomp",
        "python_decomp_table",
        "joint_loss_index",
        "decompose_custom_triton_ops",
    ]


def test_the_exporters_translations_can_be_read_once_and_used_again():
    # coordinator.plan.export keeps them: torch.onnx.export would parse their sources for each graph.
    assert list(inspect.signature(exported_program_to_ir).parameters) == [
        "exported_program",
        "registry",
        "lower",
    ]
    assert list(inspect.signature(ONNXRegistry.from_torchlib).parameters) == ["opset_version"]
    assert list(inspect.signature(ONNXRegistry.register_op).parameters)[:3] == ["self", "target", "function"]
    assert ONNXRegistry().functions == {}


def test_the_cache_of_traced_operators_can_be_turned_off():
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        assert not torch._subclasses.FakeTensorMode().cache_enabled


def test_onnxruntime_shares_memory_with_numpy():
    array = np.zeros(3, np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    array[1] = 5.0
    assert value.numpy()[1] == 5.0
