"""libzqfp through ctypes: what ``zqfp.h`` declares, torch tensors on the GPU and numpy arrays on the host.

``load_library()`` looks for ``libzqfp.so`` at ``$ZQFP_KERNELS`` (the file or its folder), beside this module,
and in ``build/kernels`` of the repository (``make kernels``). The library loads without a GPU; calls that
need one then raise CudaError.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.errors import MissingDependencyError, ZqfpError

NAME = "libzqfp.so"
ABI_VERSION = 5
VARIABLE = "ZQFP_KERNELS"
# ZQFP_WORKSPACE_ZEROED_BYTES: where a workspace must be zero before a call, and is zero after it.
WORKSPACE_ZEROED_BYTES = 16384

MAX_OUTPUTS = 4

_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}


class KernelError(ZqfpError):
    """libzqfp refused a call; ``str(error)`` is its sentence. One subclass per ``zqfpStatus``."""


class InvalidValueError(KernelError):
    """A null or misaligned pointer, a negative size, an unknown enumerator."""


class NotSupportedError(KernelError):
    """A legal layer that no kernel computes."""


class WrongArchitectureError(KernelError):
    """The current device is not sm_90."""


class WorkspaceTooSmallError(KernelError):
    """The workspace has fewer bytes than ``workspace_bytes`` says."""


class CudaError(KernelError):
    """A CUDA call failed, for example because there is no driver."""


_ERRORS: dict[int, type[KernelError]] = {
    1: InvalidValueError,
    2: NotSupportedError,
    3: WrongArchitectureError,
    4: WorkspaceTooSmallError,
    5: CudaError,
}


@dataclass(frozen=True)
class Layer:
    """``zqfpLinearDesc``: one linear layer.

    Attributes:
        n: Output features, a multiple of 8.
        k: Input features, a multiple of 16.
        group_size: Weights per group scale: 32, 64 or 128.
        lorc_rank: 0, or a multiple of 8 up to 64.
        dtype: torch.float16 or torch.bfloat16, of y, bias, xv and u.
        per_token: Whether a is [M] or [1].
        outputs: n of each of up to MAX_OUTPUTS layers that are one, all but the last multiples of 64; empty:
            one output of n.
        gated: Whether rows are gate and up, in turns of eight (``packing.gated_order``), and y is
            silu(gate) * up, [M, n / 2]. n is a multiple of 16 then, and there are no ``outputs``.
    """

    n: int
    k: int
    group_size: int
    lorc_rank: int = 0
    dtype: torch.dtype = torch.float16
    per_token: bool = True
    outputs: tuple[int, ...] = ()
    gated: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each output."""
        return self.outputs or ((self.n // 2,) if self.gated else (self.n,))


class _Desc(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int32),
        ("lorc_rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("outputs", ctypes.c_int64 * MAX_OUTPUTS),
    )


# Of zqfpLinearArgs, in order; then y.
_ARGUMENTS = ("x8", "a", "codes", "group_scales", "row_scales", "bias", "xv", "u")
_Pointers = ctypes.c_void_p * MAX_OUTPUTS


class _Args(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in _ARGUMENTS), ("y", _Pointers))


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What of ``zqfpLinearArgs`` no quantizer makes: CUDA tensors, contiguous, aligned to 16 bytes.

    Attributes:
        codes: uint8, ``packing.pack_codes``.
        group_scales: uint8, ``packing.pack_group_scales``.
        row_scales: float32 [N].
        y: The layer's dtype [M, N], or one such tensor for each of its ``outputs``, or [M, N / 2] of a gated
            layer; written.
        bias: The layer's dtype [N], or ``None``.
        u: The layer's dtype [r, N], or ``None``.
    """

    codes: torch.Tensor
    group_scales: torch.Tensor
    row_scales: torch.Tensor
    y: torch.Tensor | tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    u: torch.Tensor | None = None

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """All of y."""
        return self.y if isinstance(self.y, tuple) else (self.y,)


@dataclass(frozen=True, kw_only=True)
class LinearTensors(LayerTensors):
    """``zqfpLinearArgs``.

    Attributes:
        x8: float8_e4m3fn or uint8 [M, K].
        a: float32 [M] or [1].
        xv: The layer's dtype [M, r], or ``None``.
    """

    x8: torch.Tensor
    a: torch.Tensor
    xv: torch.Tensor | None = None


class Source(enum.IntEnum):
    """``zqfpSource``: what a quantizer computes its input h from."""

    PLAIN = 1
    SILU_MUL = 2
    RMS_NORM = 3


@dataclass(frozen=True)
class Activation:
    """``zqfpActivation``: CUDA tensors of one type, contiguous, aligned to 16 bytes.

    Attributes:
        source: What h is.
        x: float16, bfloat16 or float32 [M, K]; gate of SiLU times up.
        other: Like x: up, or the skip of a norm; else ``None``.
        gamma: The type of x [K], of a norm.
        epsilon: Of a norm.
        scale: float32 [1], static; ``None``: one scale per token.
        sum_: Like x, receives a norm's x + skip, or ``None``. It may be x or skip.
        v: The layer's dtype [K, r], or ``None``.
    """

    source: Source
    x: torch.Tensor
    other: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    epsilon: float = 0.0
    scale: torch.Tensor | None = None
    sum_: torch.Tensor | None = None
    v: torch.Tensor | None = None


class _Activation(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "other", "gamma")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("scale", "sum", "v")),
    )


@dataclass(frozen=True)
class QuantizerTensors:
    """What a quantizer of an input [M, K] writes and is told: CUDA tensors, contiguous, aligned to 16 bytes.

    Attributes:
        x8: float8_e4m3fn or uint8 [M, K], written.
        a: float32 [M], or [1] with a ``scale``; written.
        scale: float32 [1], static; ``None``: one scale per token.
        v: The input's type (not float32) [K, r], or ``None``.
        xv: The input's type [M, r], written; ``None`` without ``v``.
    """

    x8: torch.Tensor
    a: torch.Tensor
    scale: torch.Tensor | None = None
    v: torch.Tensor | None = None
    xv: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, x: torch.Tensor, scale: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> QuantizerTensors:
        """Return uninitialised outputs for an input x [M, K]."""
        m, k = x.shape
        x8 = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
        a = torch.empty(m if scale is None else 1, dtype=torch.float32, device=x.device)
        xv = None if v is None else torch.empty((m, v.shape[1]), dtype=x.dtype, device=x.device)
        return cls(x8, a, scale, v, xv)


class Library:
    """A loaded ``libzqfp.so``.

    Raises:
        MissingDependencyError: When the file cannot be loaded or has another ABI version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingDependencyError(f"{path} does not load: {error}") from error
        self.path = path
        self._c.zqfpGetLastErrorString.restype = ctypes.c_char_p
        self._c.zqfpGetKernelName.restype = ctypes.c_char_p
        version = self._c.zqfpGetVersion()
        if version != ABI_VERSION:
            raise MissingDependencyError(
                f"{path} has ABI version {version}, not {ABI_VERSION}: run `make kernels`"
            )

    def _check(self, status: int) -> None:
        if status != 0:
            message = self._c.zqfpGetLastErrorString().decode()
            raise _ERRORS.get(status, KernelError)(f"libzqfp: {message}")

    def packed_sizes(self, layer: Layer) -> tuple[int, int]:
        """Return the bytes of packed codes and packed group scales.

        Raises:
            KernelError: When no kernel computes the layer.
        """
        codes, scales = ctypes.c_size_t(), ctypes.c_size_t()
        self._check(self._c.zqfpGetPackedSizes(_desc(layer), ctypes.byref(codes), ctypes.byref(scales)))
        return codes.value, scales.value

    def decode(
        self, layer: Layer, codes: npt.NDArray[np.uint8], group_scales: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        """Decode packed weights on the host.

        Returns:
            The E4M3 bits of w8, uint8 [N, K].

        Raises:
            ValueError: When the arrays do not have ``packed_sizes`` bytes.
            KernelError: When no kernel computes the layer.
        """
        if (codes.nbytes, group_scales.nbytes) != self.packed_sizes(layer):
            raise ValueError(
                f"{codes.nbytes} and {group_scales.nbytes} bytes are not {self.packed_sizes(layer)}"
            )
        codes, group_scales = np.ascontiguousarray(codes), np.ascontiguousarray(group_scales)
        w8 = np.empty((layer.n, layer.k), dtype=np.uint8)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (codes, group_scales, w8)]
        self._check(self._c.zqfpDecodeHost(_desc(layer), *pointers))
        return w8

    def workspace_bytes(self, layer: Layer, m: int) -> int:
        """Return the bytes of workspace for up to ``m`` rows; the first WORKSPACE_ZEROED_BYTES must be zero.

        Raises:
            KernelError: When no kernel computes the layer.
        """
        size = ctypes.c_size_t()
        self._check(self._c.zqfpGetWorkspaceSize(_desc(layer), ctypes.c_int64(m), ctypes.byref(size)))
        return size.value

    def linear(self, layer: Layer, tensors: LinearTensors, workspace: torch.Tensor) -> None:
        """Launch y = a * R * (x8 @ w8^T) + xv @ u + bias on torch's current stream.

        Raises:
            ValueError: When a tensor is not what :class:`LinearTensors` says.
            KernelError: When libzqfp refuses the call.
        """
        m = tensors.x8.shape[0]
        _check_linear(layer, tensors, self.packed_sizes(layer))
        self._check(self._c.zqfpLinear(_desc(layer), *_linear_arguments(tensors, m, workspace)))

    def quantized_workspace_bytes(self, layer: Layer, m: int) -> int:
        """Return the bytes of workspace that :meth:`quantized_linear` needs; else :meth:`workspace_bytes`.

        Raises:
            KernelError: When no kernel computes the layer.
        """
        size = ctypes.c_size_t()
        self._check(
            self._c.zqfpGetQuantizedWorkspaceSize(_desc(layer), ctypes.c_int64(m), ctypes.byref(size))
        )
        return size.value

    def quantized_linear(
        self, layer: Layer, activation: Activation, tensors: LayerTensors, workspace: torch.Tensor
    ) -> None:
        """Launch quantizer and linear layer on torch's current stream, in one kernel where tokens are few.

        Raises:
            ValueError: When a tensor is not what :class:`Activation` and :class:`LayerTensors` say.
            KernelError: When libzqfp refuses the call.
        """
        m = activation.x.shape[0]
        _check_activation(layer, activation)
        _check_layer(layer, tensors, m, self.packed_sizes(layer))
        given = _Activation(
            activation.source,
            _DTYPES[activation.x.dtype],
            *map(_pointer, (activation.x, activation.other, activation.gamma)),
            activation.epsilon,
            *map(_pointer, (activation.scale, activation.sum_, activation.v)),
        )
        arguments = _linear_arguments(tensors, m, workspace)
        self._check(self._c.zqfpQuantizedLinear(_desc(layer), ctypes.byref(given), *arguments))

    def quantize_activation(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Launch the activation quantizer on torch's current stream.

        Args:
            x: CUDA float16, bfloat16 or float32 [M, K], contiguous.
            scale: float32 [1], static; ``None``: one scale per token.
            v: The type of x (not float32) [K, r], or ``None``.

        Returns:
            ``(x8, a, xv)``: float8_e4m3fn [M, K], float32 [M] or [1], and x @ v [M, r] or ``None``.

        Raises:
            KernelError: When libzqfp refuses the call.
        """
        made = QuantizerTensors.empty(x, scale, v)
        self.quantize_activation_into(x, made)
        return made.x8, made.a, made.xv

    def quantize_activation_into(self, x: torch.Tensor, tensors: QuantizerTensors) -> None:
        """:meth:`quantize_activation` with given tensors.

        Raises:
            ValueError: When a tensor does not fit the others.
            KernelError: When libzqfp refuses the call.
        """
        shape, *rest = _quantizer_arguments(x, tensors)
        self._check(self._c.zqfpQuantizeActivation(_void(x), *shape, *rest, _stream()))

    def quantize_silu_mul_into(self, gate: torch.Tensor, up: torch.Tensor, tensors: QuantizerTensors) -> None:
        """Launch the quantizer of h = silu(gate) * up on torch's current stream; ``tensors.xv`` gets h @ v.

        Args:
            gate: CUDA float16, bfloat16 or float32 [M, K], contiguous.
            up: The same.
            tensors: What is written, and the scale and v.

        Raises:
            ValueError: When a tensor does not fit the others.
            KernelError: When libzqfp refuses the call.
        """
        _require(up, "up", tuple(gate.shape), (gate.dtype,))
        shape, *rest = _quantizer_arguments(gate, tensors)
        self._check(self._c.zqfpQuantizeSiluMul(_void(gate), _void(up), *shape, *rest, _stream()))

    def quantize_rms_norm_into(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor,
        epsilon: float,
        tensors: QuantizerTensors,
        *,
        skip: torch.Tensor | None = None,
        sum_: torch.Tensor | None = None,
    ) -> None:
        """Launch the quantizer of an RMS norm on torch's current stream; ``tensors.xv`` gets h @ v.

        Args:
            x: CUDA float16, bfloat16 or float32 [M, K], contiguous.
            gamma: The type of x [K].
            epsilon: Added to the mean square.
            tensors: What is written, and the scale and v.
            skip: Like x, added to it first, or ``None``.
            sum_: Like x, receives the sum, or ``None``. It may be x or skip.

        Raises:
            ValueError: When a tensor does not fit the others.
            KernelError: When libzqfp refuses the call.
        """
        _require(gamma, "gamma", (x.shape[1],), (x.dtype,))
        for tensor, name in ((skip, "skip"), (sum_, "sum")):
            _require_optional(tensor, name, tuple(x.shape), x.dtype)
        shape, scale, x8, a, *lorc = _quantizer_arguments(x, tensors)
        status = self._c.zqfpQuantizeRmsNorm(
            *map(_void, (x, skip, gamma)),
            ctypes.c_float(epsilon),
            *shape,
            *(scale, x8, a, _void(sum_)),
            *lorc,
            _stream(),
        )
        self._check(status)

    def kernel_names(self) -> list[str]:
        """Return the GEMM kernels' names in the order of :meth:`tune`'s index."""
        names: list[str] = []
        while (name := self._c.zqfpGetKernelName(len(names))) is not None:
            names.append(name.decode())
        return names

    def tune(self, kernel: int = -1, cut: int = -1, overlap: int = -1) -> None:
        """Override the plans of the whole process (``tuning.h``); without arguments let them choose again."""
        self._check(self._c.zqfpTune(kernel, cut, overlap))

    def describe_plan(self, layer: Layer, m: int, processors: int = 132) -> tuple[str, list[int]]:
        """Return the kernel a call would use, and workers, row tiles, token tiles, K units, uncut tiles.

        Raises:
            KernelError: When no kernel computes the layer.
        """
        plan = (ctypes.c_int32 * 6)()
        self._check(self._c.zqfpDescribePlan(_desc(layer), ctypes.c_int64(m), ctypes.c_int(processors), plan))
        return self.kernel_names()[plan[0]], list(plan)[1:]


def find_library() -> Path | None:
    """Return the path of ``libzqfp.so``, or ``None``: the places of the module's docstring, in that order."""
    here = Path(__file__).resolve()
    candidates = [here.parent / NAME, here.parents[2] / "build" / "kernels" / NAME]
    if chosen := os.environ.get(VARIABLE):
        path = Path(chosen)
        candidates = [path / NAME if path.is_dir() else path]
    return next((path for path in candidates if path.is_file()), None)


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> Library:
    return Library(path)


def load_library() -> Library:
    """Return the library, loaded once.

    Raises:
        MissingDependencyError: When there is none, with what to do.
    """
    path = find_library()
    if path is None:
        raise MissingDependencyError(
            f"{NAME} is not built: run `make kernels` (it needs nvcc), or set {VARIABLE}"
        )
    return _load(path)


def _desc(layer: Layer) -> ctypes._CArgObject:
    dtype = _DTYPES.get(layer.dtype, 0)
    numbers = (layer.n, layer.k, layer.group_size, layer.lorc_rank, dtype, int(layer.per_token))
    return ctypes.byref(_Desc(*numbers, int(layer.gated), (ctypes.c_int64 * MAX_OUTPUTS)(*layer.outputs)))


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _void(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_pointer(tensor))


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else None)


def _require(
    tensor: torch.Tensor,
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] | dict[torch.dtype, int],
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not contiguous {wanted} {shape}")


def _require_optional(
    tensor: torch.Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tensor is not None:
        _require(tensor, name, shape, (dtype,))


def _check_layer(layer: Layer, tensors: LayerTensors, m: int, packed: tuple[int, int]) -> None:
    _require(tensors.codes, "codes", (packed[0],), (torch.uint8,))
    _require(tensors.group_scales, "group_scales", (packed[1],), (torch.uint8,))
    _require(tensors.row_scales, "row_scales", (layer.n,), (torch.float32,))
    for y, n in zip(tensors.outputs, layer.widths, strict=True):
        _require(y, "y", (m, n), (layer.dtype,))
    _require_optional(tensors.bias, "bias", (layer.n,), layer.dtype)
    _require_optional(tensors.u, "u", (layer.lorc_rank, layer.n), layer.dtype)


def _check_linear(layer: Layer, tensors: LinearTensors, packed: tuple[int, int]) -> None:
    m = tensors.x8.shape[0]
    _require(tensors.x8, "x8", (m, layer.k), (torch.float8_e4m3fn, torch.uint8))
    _require(tensors.a, "a", (m if layer.per_token else 1,), (torch.float32,))
    _check_layer(layer, tensors, m, packed)
    _require_optional(tensors.xv, "xv", (m, layer.lorc_rank), layer.dtype)


def _linear_arguments(tensors: LayerTensors, m: int, workspace: torch.Tensor) -> tuple[Any, ...]:
    """Return what follows the layer's description in a call; what the quantizer makes may be missing."""
    y = _Pointers(*map(_pointer, tensors.outputs))
    args = _Args(*(_pointer(getattr(tensors, name, None)) for name in _ARGUMENTS), y)
    size = ctypes.c_size_t(workspace.nbytes)
    return ctypes.byref(args), ctypes.c_int64(m), _void(workspace), size, _stream()


def _check_activation(layer: Layer, activation: Activation) -> None:
    m, dtype = activation.x.shape[0], activation.x.dtype
    _require(activation.x, "x", (m, layer.k), _DTYPES)
    for tensor, name in ((activation.other, "other"), (activation.sum_, "sum")):
        _require_optional(tensor, name, (m, layer.k), dtype)
    _require_optional(activation.gamma, "gamma", (layer.k,), dtype)
    _require_optional(activation.scale, "scale", (1,), torch.float32)
    _require_optional(activation.v, "v", (layer.k, layer.lorc_rank), dtype)


def _quantizer_arguments(x: torch.Tensor, tensors: QuantizerTensors) -> tuple[Any, ...]:
    """Check the tensors of an input x; return ``(dtype, m, k)`` and what follows it in a quantizer's call."""
    (m, k), rank = x.shape, 0 if tensors.v is None else tensors.v.shape[1]
    _require(x, "x", (m, k), _DTYPES)
    _require(tensors.x8, "x8", (m, k), (torch.float8_e4m3fn, torch.uint8))
    _require(tensors.a, "a", (m if tensors.scale is None else 1,), (torch.float32,))
    _require_optional(tensors.scale, "scale", (1,), torch.float32)
    _require_optional(tensors.v, "v", (k, rank), x.dtype)
    _require_optional(tensors.xv, "xv", (m, rank), x.dtype)
    shape = (ctypes.c_int32(_DTYPES[x.dtype]), ctypes.c_int64(m), ctypes.c_int64(k))
    lorc = (_void(tensors.v), ctypes.c_int32(rank), _void(tensors.xv))
    return shape, *map(_void, (tensors.scale, tensors.x8, tensors.a)), *lorc
