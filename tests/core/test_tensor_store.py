"""The spill file gives back exactly what was put, in ONNX's own packing, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from zqfp_compile.tensor_store import TensorStore, pack

TYPES = {
    ir.DataType.FLOAT: np.array([[0.1, -2.5, np.inf]], np.float32),
    ir.DataType.FLOAT16: np.array([0.1, -2.5, 65504.0], np.float16),
    ir.DataType.BFLOAT16: np.array([1.5, -3e38, 0.0]).astype(ml_dtypes.bfloat16),
    ir.DataType.INT4: np.array([[-8, 7, -1], [0, 1, 2], [3, 4, 5]], np.int8),
    ir.DataType.FLOAT8E4M3FN: np.array([448.0, -0.001953125, 0.0, 1.125], np.float32),
    ir.DataType.FLOAT8E5M2: np.array([57344.0, -1.25], np.float32),
    ir.DataType.FLOAT4E2M1: np.array([0.5, -6.0, 1.5], np.float32),
    ir.DataType.INT8: np.array([-128, 127], np.int8),
    ir.DataType.INT64: np.array(1 << 40, np.int64),
}


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
def test_values_survive_and_onnx_reads_them(tmp_path: Path, dtype: ir.DataType) -> None:
    values = TYPES[dtype]
    with TensorStore(tmp_path) as store:
        store.put("before", np.ones(3, np.int8), ir.DataType.INT8)  # an odd offset to recover from
        tensor = store.put("t", values, dtype)
        assert tensor.dtype == dtype and tuple(tensor.shape) == values.shape and tensor.offset % 64 == 0
        np.testing.assert_array_equal(tensor.numpy().astype(values.dtype), values)
        # The reference reader of the onnx package on the same bytes.
        proto = onnx.TensorProto(dims=values.shape, data_type=int(dtype), raw_data=tensor.tobytes())
        np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(values.dtype), values)


def test_int4_low_nibble_first(tmp_path: Path) -> None:
    with TensorStore(tmp_path) as store:
        tensor = store.put("t", np.array([1, -2, 7], np.int8), ir.DataType.INT4)
        assert tensor.tobytes() == bytes([0xE1, 0x07])
        assert store.path.read_bytes() == bytes([0xE1, 0x07])


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([8], np.int8), ir.DataType.INT4),
        (np.array([-9], np.int8), ir.DataType.INT4),
        (np.array([449.0], np.float32), ir.DataType.FLOAT8E4M3FN),
        (np.array([1.01], np.float32), ir.DataType.FLOAT8E4M3FN),
        (np.array([np.nan], np.float32), ir.DataType.FLOAT8E4M3FN),
        (np.array([1e6], np.float32), ir.DataType.FLOAT16),
        (np.array([0.5, 1.0], np.float32), ir.DataType.INT4),
    ],
)
def test_nothing_is_rounded(tmp_path: Path, array: np.ndarray, dtype: ir.DataType) -> None:
    with TensorStore(tmp_path) as store, pytest.raises(ValueError, match=r"'t'.*no exact"):
        store.put("t", array, dtype)


def test_strided_and_transposed_arrays(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    with TensorStore(tmp_path) as store:
        for view in (values.T, values[::2, 1::2]):
            np.testing.assert_array_equal(store.put("t", view, ir.DataType.FLOAT).numpy(), view)
            codes = np.asarray(view % 16 - 8, np.int8)
            np.testing.assert_array_equal(store.put("c", codes.T, ir.DataType.INT4).numpy(), codes.T)


def test_closing_invalidates(tmp_path: Path) -> None:
    with TensorStore(tmp_path) as store:
        tensor = store.put("t", np.ones(4, np.float32), ir.DataType.FLOAT)
        held = tensor.numpy()
        unread = store.put("u", np.ones(4, np.float32), ir.DataType.FLOAT)
    np.testing.assert_array_equal(held, np.ones(4))
    for closed in (tensor, unread):
        with pytest.raises(ValueError, match="invalid"):
            closed.numpy()


def _item(store: TensorStore, key: str, value: float) -> np.ndarray:
    values = np.full((3, 5), value, np.float32)
    store.add(key, {"codes": pack(f"{key}.codes", values, ir.DataType.FLOAT16)})
    return values


def test_finished_items_are_found_again(tmp_path: Path) -> None:
    """What was put outside of items, or after the last one, is not."""
    with TensorStore(tmp_path) as store:
        a = _item(store, "a", 1.5)
        store.put("loose", np.ones(3, np.float32), ir.DataType.FLOAT)
        b = _item(store, "b", -2.0)
        end = store.path.stat().st_size
        store.put("loose", np.ones(3, np.float32), ir.DataType.FLOAT)
    with TensorStore(tmp_path) as store:
        assert store.path.stat().st_size == end
        assert "a" in store and "b" in store and "c" not in store and store.get("c") is None
        for key, values in (("a", a), ("b", b)):
            (tensor,) = store.get(key).values()
            assert tensor.name == f"{key}.codes" and tensor.dtype == ir.DataType.FLOAT16
            np.testing.assert_array_equal(tensor.numpy(), values)
        _item(store, "c", 3.0)
    with TensorStore(tmp_path) as store:
        assert [key in store for key in "abc"] == [True] * 3


@pytest.mark.parametrize("damage", ["data", "data cut", "journal cut", "journal gone"])
def test_damaged_items_are_forgotten(tmp_path: Path, damage: str) -> None:
    """A power cut leaves anything: only what is intact counts."""
    with TensorStore(tmp_path) as store:
        _item(store, "a", 1.5)
        _item(store, "b", -2.0)
    data, journal = tmp_path / "tensors.bin", tmp_path / "tensors.jsonl"
    content = bytearray(data.read_bytes())
    if damage == "data":
        content[-1] ^= 1
        data.write_bytes(content)
    elif damage == "data cut":
        data.write_bytes(content[:-1])
    elif damage == "journal cut":
        journal.write_text(journal.read_text()[:-20])
    else:
        journal.unlink()
    with TensorStore(tmp_path) as store:
        assert ("a" in store) == (damage != "journal gone") and "b" not in store
        values = _item(store, "b", 4.0)
        np.testing.assert_array_equal(store.get("b")["codes"].numpy(), values)


_FULL_DISK = """
import pathlib, resource, sys
import numpy as np, onnx_ir as ir
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.tensor_store import TensorStore

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with TensorStore(pathlib.Path(sys.argv[1])) as store:
    kept = store.put("a", np.ones(1000, np.float32), ir.DataType.FLOAT)
    try:
        store.put("b", np.ones(1 << 20, np.float32), ir.DataType.FLOAT)
    except MissingDependencyError as error:
        print(error)
    assert kept.numpy().sum() == 1000
"""


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """A file size limit stands for the disk: the kernel refuses the write in the same way."""
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "the disk is full" in result.stdout and "free some space" in result.stdout
    assert result.stdout.count("\n") == 1


_MEMORY = """
import pathlib, resource, sys
import numpy as np, onnx_ir as ir
from zqfp_compile.tensor_store import TensorStore

base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TensorStore(pathlib.Path(sys.argv[1])) as store:
    for index in range(24):
        codes = np.full((4096, 4096), index % 8, np.int8)
        tensor = store.put(str(index), codes, ir.DataType.INT4)
        assert tensor.numpy()[0, 0] == index % 8
        tensor.release()
    assert store.path.stat().st_size == 24 * (8 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) >> 10)
"""


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """24 tensors of 16 MiB of codes; packing one takes a few copies, all of them would take 384 MiB."""
    command = [sys.executable, "-c", _MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 180  # MiB
