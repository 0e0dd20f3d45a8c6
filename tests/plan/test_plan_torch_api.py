import inspect

import numpy as np
import onnxruntime
import torch
from torch.export.exported_program import _decompose_exported_program


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


def test_onnxruntime_shares_memory_with_numpy():
    array = np.zeros(3, np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    array[1] = 5.0
    assert value.numpy()[1] == 5.0
