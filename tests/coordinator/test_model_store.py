"""Published versions on disk, and the few of them that stay in memory."""

import numpy as np

from coordinator import model_store
from coordinator.model_store import ModelStore
from fedtide.wire.parameters import Schema, TensorSpec

SCHEMA = Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(2,)),))


def test_an_old_base_is_found_where_memory_holds_only_newer_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(model_store, "_RECENT_BYTES", 0)
    store = ModelStore(tmp_path, SCHEMA, keep=10)
    for version in range(5):
        store.save(version, np.full(2, version, np.float32))
    assert [store.parameters(version)[0] for version in (0, 4, 1, 3, 0, 2)] == [0, 4, 1, 3, 0, 2]
