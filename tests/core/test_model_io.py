"""Models come in sorted and memory-mapped, and go out with external data, without being disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from zqfp_compile.errors import UsageError
from zqfp_compile.model_io import load_model, save_model

GENERATOR = np.random.default_rng(0)
W = GENERATOR.standard_normal((16, 32)).astype(np.float32)
SMALL = np.arange(4, dtype=np.float32)


def _proto(
    nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray], **kwargs: object
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    kwargs.setdefault("ir_version", 8)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], **kwargs)


def _linear() -> onnx.ModelProto:
    return _proto([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], {"w": W, "unused": SMALL})


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    """The onnx package's own evaluator on the file: independent of the code under test."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})[0]


X = GENERATOR.standard_normal((3, 16)).astype(np.float32)


def test_external_data_is_not_read_at_load(tmp_path: Path) -> None:
    onnx.save(_linear(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load_model(tmp_path / "m.onnx")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(_linear(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    model = load_model("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), W)


def test_save_and_load_again(tmp_path: Path) -> None:
    onnx.save(_linear(), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out" / "zqfp.onnx"
    out.parent.mkdir()
    save_model(model, out, progress=lambda done, total: seen.append((done, total)))

    assert sorted(path.name for path in out.parent.iterdir()) == ["zqfp.onnx", "zqfp.onnx.data"]
    assert (out.parent / "zqfp.onnx.data").stat().st_size == W.nbytes  # the small tensor is inline
    assert seen == [(0, 1)]
    np.testing.assert_array_equal(_run(out, X), _run(tmp_path / "m.onnx", X))
    saved = onnx.load(out, load_external_data=False)
    assert saved.ir_version == 10 and saved.opset_import[0].version == 18
    # The model in memory is the same object graph as before.
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())
    onnx.checker.check_model(str(out), full_check=True)


def test_higher_ir_version_is_kept(tmp_path: Path) -> None:
    model = ir.from_proto(_linear())
    model.ir_version = 11
    save_model(model, tmp_path / "m.onnx", data_name="weights.bin")
    assert onnx.load(tmp_path / "m.onnx", load_external_data=False).ir_version == 11
    assert (tmp_path / "weights.bin").stat().st_size == W.nbytes


def test_saving_over_the_own_weights_is_refused(tmp_path: Path) -> None:
    save_model(ir.from_proto(_linear()), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="own weights"):
        save_model(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), W)


def test_unsorted_graph_is_sorted(tmp_path: Path) -> None:
    """Also through a subgraph that captures a value, and in a function."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    yes = helper.make_tensor("c", TensorProto.BOOL, [], [1])
    nodes = [
        helper.make_node("Relu", ["d"], ["y"], name="last"),
        helper.make_node("If", ["c"], ["d"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("F", ["a"], ["b"], name="call", domain="f"),
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Constant", [], ["c"], name="constant", value=yes),
    ]
    opsets = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Neg", ["u"], ["v"]), helper.make_node("Abs", ["i"], ["u"])]
    function = helper.make_function("f", "F", ["i"], ["v"], body, opsets)
    proto = _proto(nodes, {"w": W}, functions=[function])
    proto.opset_import.append(helper.make_opsetid("f", 1))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = load_model(tmp_path / "m.onnx")
    order = [node.name for node in model.graph]
    assert order.index("first") < order.index("call") < order.index("if") < order.index("last")
    assert [node.op_type for node in next(iter(model.functions.values()))] == ["Abs", "Neg"]
    save_model(model, tmp_path / "sorted.onnx")
    # Relu(-|a|) is 0 everywhere; the evaluator refuses unsorted graphs, so running at all is the point.
    np.testing.assert_array_equal(_run(tmp_path / "sorted.onnx", X), np.zeros((3, 32)))


def test_sorted_graph_keeps_its_order(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["p"], name="p"),
        helper.make_node("Neg", ["x"], ["q"], name="q"),
        helper.make_node("Add", ["q", "p"], ["r"], name="r"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="y"),
    ]
    onnx.save(_proto(nodes, {"w": W}), tmp_path / "m.onnx")
    assert [node.name for node in load_model(tmp_path / "m.onnx").graph] == ["p", "q", "r", "y"]


@pytest.mark.parametrize("external", [False, True])
def test_constant_nodes(tmp_path: Path, external: bool) -> None:
    """A weight in a Constant node becomes an initializer, a small one stays; neither stays external."""
    weight = np.tile(W, (1, 2))  # 1024 elements
    small = np.ones(64, np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight, "w_tensor")),
        helper.make_node("Constant", [], ["s"], value=onnx.numpy_helper.from_array(small, "s_tensor")),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "s"], ["y"]),
    ]
    proto = _proto(nodes, {})
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 64
    path = tmp_path / "m.onnx"
    onnx.save(
        proto,
        path,
        save_as_external_data=external,
        location="m.data" if external else None,
        size_threshold=0,
        convert_attribute=True,
    )
    expected = _run(path, X)
    model = load_model(path)
    assert list(model.graph.initializers) == ["w"]
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, out / "m.onnx")
    np.testing.assert_array_equal(_run(out / "m.onnx", X), expected)


_BIG = """
import pathlib, resource, sys
import ml_dtypes, numpy as np, onnx_ir as ir
from zqfp_compile.model_io import load_model, save_model

folder = pathlib.Path(sys.argv[1])
shape = ir.Shape([4096, 4096])

def make(index):
    return lambda: ir.Tensor(np.full((4096, 4096), index, ml_dtypes.bfloat16), name=f"w{index}")

values = []
for index in range(16):
    tensor = ir.LazyTensor(make(index), dtype=ir.DataType.BFLOAT16, shape=shape, name=f"w{index}")
    kind = ir.TensorType(ir.DataType.BFLOAT16)
    value = ir.Value(name=f"w{index}", shape=shape, type=kind, const_value=tensor)
    values.append(value)
x = ir.Value(name="x", shape=ir.Shape([1, 4096]), type=ir.TensorType(ir.DataType.BFLOAT16))
last, nodes = x, []
for value in values:
    nodes.append(ir.node("MatMul", [last, value]))
    last = nodes[-1].outputs[0]
last.type, last.shape = x.type, x.shape
graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 18}, name="big")
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_model(ir.Model(graph, ir_version=10), folder / "lazy.onnx")
again = load_model(folder / "lazy.onnx")
save_model(again, folder / "copy.onnx")
assert (folder / "copy.onnx.data").stat().st_size == 16 * (32 << 20)
assert load_model(folder / "copy.onnx").graph.initializers["w7"].const_value.numpy()[1, 1] == 7
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) >> 10)
"""


def test_weights_stream_through(tmp_path: Path) -> None:
    """512 MiB of lazy and then of external weights in 32 MiB tensors: memory stays at a few tensors."""
    command = [sys.executable, "-c", _BIG, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 160  # MiB


_FULL_DISK = """
import pathlib, resource, sys
import onnx_ir as ir
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.model_io import load_model, save_model

model = load_model(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_model(model, pathlib.Path(sys.argv[2]) / "m.onnx")
except MissingDependencyError as error:
    print(error)
"""


@pytest.mark.parametrize("external", [False, True])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, external: bool) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(_linear(), source, save_as_external_data=external, location="m.data", size_threshold=0)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", _FULL_DISK, str(source), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "the disk is full" in result.stdout and result.stdout.count("\n") == 1
    assert not list(out.iterdir())
