"""A snapshot: the state and the ledger after a record, as safetensors: a file anyone can open. Pure."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coordinator.aggregation import Buffer
from coordinator.journal.ledger import Ledger
from coordinator.model_state import ModelState
from coordinator.server_optimizers import OptimizerState
from coordinator.settings import Rules
from fedtide.wire.ids import ModelVersion

_OPTIMIZER: Final = "optimizer."


@dataclass(frozen=True)
class Snapshot:
    """What is known after record ``ledger.sequence``."""

    state: ModelState
    ledger: Ledger

    def to_bytes(self) -> bytes:
        """The file's content."""
        state = self.state
        tensors: dict[str, npt.NDArray[Any]] = {
            "version": np.array(state.version, np.int64),
            "parameters": state.parameters,
            "buffer.total": state.buffer.total,
            "buffer.divisor": np.array(state.buffer.divisor, np.float64),
            "buffer.count": np.array(state.buffer.count, np.int64),
            "rules": np.frombuffer(state.rules.to_bytes(), np.uint8),
            "ledger": np.frombuffer(self.ledger.to_bytes(), np.uint8),
        }
        tensors.update({_OPTIMIZER + name: vector for name, vector in state.optimizer.arrays().items()})
        return save_tensors(tensors)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Snapshot":
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: it is no snapshot.
        """
        try:
            tensors = load_tensors(content)
            return cls(_state(tensors), Ledger.from_bytes(tensors["ledger"].tobytes()))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"not a snapshot: {error}") from error


def _state(tensors: dict[str, npt.NDArray[Any]]) -> ModelState:
    rules = Rules.from_bytes(tensors["rules"].tobytes())
    parameters = tensors["parameters"]
    vectors = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    optimizer: OptimizerState = rules.server_optimizer.from_arrays(vectors, parameters.size)
    buffer = Buffer(
        total=np.array(tensors["buffer.total"]),  # a copy of our own, because folding writes to it
        divisor=float(tensors["buffer.divisor"]),
        count=int(tensors["buffer.count"]),
    )
    return ModelState(ModelVersion(int(tensors["version"])), parameters, buffer, optimizer, rules)
