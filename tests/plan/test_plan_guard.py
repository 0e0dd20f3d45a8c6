import contextlib
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_agent import plan_guard
from edge_agent.plan_guard import PlanRefused, check, check_graph
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import MAX_GRAPH_BYTES, Plan

NOTHING = frozenset()


def model(nodes, initializers=(), **fields):
    """An ONNX model with one input, one output and these nodes."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    graph = helper.make_graph(nodes, "plan", [value], [value], initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **fields)


def external(name, location):
    """An initializer whose content is in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def refused(proto, allowed=NOTHING):
    with pytest.raises(PlanRefused) as refusal:
        check_graph(proto.SerializeToString(), allowed)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["mlp", "cnn", "autoencoder"])
def test_built_plans_pass(name, request):
    check(request.getfixturevalue(name).plan)


def test_a_small_legal_model_passes():
    check_graph(model([helper.make_node("Relu", ["x"], ["y"])]).SerializeToString(), NOTHING)


def test_control_flow_is_refused():
    body = helper.make_graph([], "body", [], [])
    assert "contains another graph" in refused(model([helper.make_node("Loop", ["x"], ["y"], body=body)]))
    assert "operator 'Loop'" in refused(model([helper.make_node("Loop", ["x"], ["y"])]))


def test_another_domain_is_refused():
    node = helper.make_node("Relu", ["x"], ["y"], domain="com.microsoft")
    assert "operator 'com.microsoft::Relu'" in refused(model([node]))


def test_functions_are_refused():
    function = helper.make_function("", "Relu", ["a"], ["b"], [], [helper.make_opsetid("", 20)])
    assert "functions" in refused(model([helper.make_node("Relu", ["x"], ["y"])], functions=[function]))


def test_a_file_of_the_device_is_refused():
    # onnxruntime reads this one happily from the working directory.
    assert "initializer 'secret' names a file" in refused(model([], [external("secret", "identity.pem")]))


def test_a_file_in_a_node_is_refused():
    node = helper.make_node("Constant", [], ["y"], value=external("secret", "identity.pem"))
    assert "names a file" in refused(model([node]))


def test_a_parameter_may_be_external_once():
    proto = model([], [external("p.w", "parameters")])
    check_graph(proto.SerializeToString(), frozenset({"p.w"}))
    proto.graph.initializer.append(external("p.w", "parameters"))
    assert "once each" in refused(proto, frozenset({"p.w"}))


def test_a_parameter_without_a_place_is_refused():
    assert "without a place in the graph: ['p.w']" in refused(model([]), frozenset({"p.w"}))


def test_external_data_in_the_train_graph_is_refused(mlp):
    with pytest.raises(PlanRefused, match="names a file"):
        check(Plan(mlp.plan.manifest, mlp.plan.evaluation, mlp.plan.evaluation))


def test_constants_are_bounded():
    # Nine constants of 2^20 elements, counted at 8 bytes each: 72 MiB, and 64 are allowed.
    tensors = [TensorProto(name=f"c{i}", data_type=1, dims=[1 << 10, 1 << 10]) for i in range(9)]
    check_graph(model([], tensors[:8]).SerializeToString(), NOTHING)
    assert "constants of more than" in refused(model([], tensors))


@pytest.mark.parametrize("dims", [[1 << 62], [1 << 20, 1 << 20], [-1], [0, 1 << 62, 1 << 62]])
def test_impossible_shapes_are_refused(dims):
    tensor = TensorProto(name="p.w", data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
    proto = model([], [tensor])
    if dims[0] == 0:  # no elements at all: harmless
        check_graph(proto.SerializeToString(), frozenset({"p.w"}))
    else:
        assert "a tensor of more than" in refused(proto, frozenset({"p.w"}))


def test_too_many_nodes_are_refused(monkeypatch):
    monkeypatch.setattr(plan_guard, "MAX_NODES", 3)
    nodes = [helper.make_node("Relu", ["x"], ["y"])] * 4
    check_graph(model(nodes[:3]).SerializeToString(), NOTHING)
    assert refused(model(nodes)) == "more than 3 nodes"


def test_sparse_initializers_are_refused():
    proto = model([])
    proto.graph.sparse_initializer.add(dims=[4])
    assert "sparse" in refused(proto)


def test_a_newer_operator_set_is_refused():
    proto = model([])
    proto.opset_import[0].version = 21
    assert refused(proto) == "operator set 21; at most 20 is allowed"


def test_two_graphs_are_refused():
    content = model([]).SerializeToString()
    with pytest.raises(PlanRefused, match="2 graphs"):
        check_graph(content + content, NOTHING)


def test_a_large_graph_is_refused_unread():
    with pytest.raises(PlanRefused, match="at most 8,388,608 are allowed"):
        check_graph(bytes(MAX_GRAPH_BYTES + 1), NOTHING)


def test_every_truncation_is_refused(mlp):
    # The graph is one field of the model and its largest; behind it stand a few bytes of operator sets.
    graph = mlp.plan.train
    for length in range(0, len(graph) - 50, 7):
        with pytest.raises(PlanRefused):
            check_graph(graph[:length], NOTHING)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else(content):
    with pytest.raises(PlanRefused):
        check_graph(content, NOTHING)


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_plan_passes_or_is_refused_and_nothing_else(mlp, data):
    graph = bytearray(mlp.plan.evaluation)
    for _ in range(data.draw(st.integers(1, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PlanRefused):
        check_graph(bytes(graph), frozenset(mlp.plan.manifest.evaluation_state))


def test_a_plan_is_checked_in_milliseconds(cnn):
    def seconds():
        begin = time.process_time()
        check(cnn.plan)
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.05


def test_optimizer_state_beyond_any_optimizer_is_refused(autoencoder):
    manifest = autoencoder.plan.manifest
    huge = TensorSpec(name="o.huge", dtype="float32", shape=(1 << 30,))
    plan = Plan(
        msgspec.structs.replace(manifest, local_state=(*manifest.local_state, huge)),
        autoencoder.plan.train,
        autoencoder.plan.evaluation,
    )
    with pytest.raises(PlanRefused, match="optimizer state and counters of 1,073,741"):
        check(plan)


def test_a_number_of_a_tensors_axes_ends_within_them():
    # Packed axes whose last number goes on: into the next field if nobody looks.
    tensor = b"\x0a\x01\x80" + b"\x42\x01c"
    graph = b"\x2a" + bytes((len(tensor),)) + tensor
    with pytest.raises(PlanRefused, match="a number ends after its message"):
        check_graph(b"\x3a" + bytes((len(graph),)) + graph, NOTHING)


def test_the_guard_counts_the_nodes():
    nodes = [helper.make_node("Relu", ["x"], ["y"])] * 4
    assert check_graph(model(nodes).SerializeToString(), NOTHING) == 4
