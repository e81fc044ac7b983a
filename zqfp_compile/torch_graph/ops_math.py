"""Element by element, reductions, products."""

from __future__ import annotations

from functools import reduce

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812

from zqfp_compile.torch_graph.call import Call, Function, Result
from zqfp_compile.torch_graph.dtypes import convert, on_host, torch_type

Tensor = torch.Tensor


def _unary(function: Function) -> Function:
    return lambda call, x: function(x)


def _binary(function: Function) -> Function:
    return lambda call, x, y: function(x, y)


def _variadic(function: Function) -> Function:
    return lambda call, *inputs: reduce(function, inputs)


def _div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """The remainder takes the sign of the divisor, with ``fmod`` that of the dividend."""
    return torch.fmod(x, y) if call.get("fmod", 0) else torch.remainder(x, y)


def _pow(call: Call, x: Tensor, y: Tensor) -> Tensor:
    # A number instead of a tensor: squares and roots have their own, faster code.
    power = torch.pow(x, y.item()) if y.ndim == 0 and on_host(y) else torch.pow(x, y)
    return power.to(x.dtype)


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(call: Call, x: Tensor) -> Tensor:
    target = ir.DataType(call.get("to"))
    if "INT4" in target.name or "FLOAT4" in target.name:
        raise call.unsupported(f"to={target.name}")
    return convert(x, torch_type(target), bool(call.get("saturate", 1)))


def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return convert(x, like.dtype, bool(call.get("saturate", 1)))


def _is_inf(call: Call, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if call.get("detect_positive", 1):
        found = found | torch.isposinf(x)
    if call.get("detect_negative", 1):
        found = found | torch.isneginf(x)
    return found


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call.get("alpha", 1.0))


def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call.get("alpha", 1.702))


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    alpha, beta = float(call.get("alpha", 0.2)), float(call.get("beta", 0.5))
    return (x * alpha + beta).clamp(0.0, 1.0)


def _softmax_of(function: Function) -> Function:
    def softmax(call: Call, x: Tensor) -> Result:
        if call.opset >= 13:
            return function(x, dim=call.get("axis", -1))
        # Until opset 12, over all axes from ``axis`` on.
        axis = call.get("axis", 1) % max(x.ndim, 1)
        flat = x.reshape(*x.shape[:axis], -1)
        rows = function(flat, dim=-1)
        assert isinstance(rows, Tensor)
        return rows.reshape(x.shape)

    return softmax


def _reduction(function: Function) -> Function:
    """``function(x, axes, keepdim)``; axes are an input in newer opsets."""

    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Result:
        chosen = call.axes(axes)
        if not chosen:
            if call.get("noop_with_empty_axes", 0):
                return x
            chosen = list(range(x.ndim))
        return function(x, chosen, bool(call.get("keepdims", 1)))

    return run


def _sum(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keepdim, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keepdim)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(_sum(x, axes, keepdim), count, rounding_mode="trunc")


def _prod(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % max(x.ndim, 1) for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keepdim, dtype=x.dtype)
    return x


def _sum_square(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return _sum(x * x, axes, keepdim)


def _cum_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis.reshape(()).item())
    if call.get("reverse", 0):
        x = x.flip(along)
    total = torch.cumsum(x, along, dtype=x.dtype)
    if call.get("exclusive", 0) and x.shape[along]:
        first = torch.zeros_like(x.narrow(along, 0, 1))
        total = torch.cat((first, total.narrow(along, 0, x.shape[along] - 1)), along)
    return total.flip(along) if call.get("reverse", 0) else total


def _arg(function: Function) -> Function:
    """``function(x, dim, keepdim)`` gives the first of equals; ``select_last_index`` asks for the last."""

    def run(call: Call, x: Tensor) -> Result:
        axis, keepdim = call.get("axis", 0), bool(call.get("keepdims", 1))
        if not call.get("select_last_index", 0):
            return function(x, axis, keepdim)
        index = function(x.flip(axis), axis, keepdim)
        assert isinstance(index, Tensor)
        return torch.sub(x.shape[axis] - 1, index)

    return run


def _top_k(call: Call, x: Tensor, k: Tensor) -> Result:
    count = int(k.reshape(()).item())
    values, indices = torch.topk(x, count, call.get("axis", -1), bool(call.get("largest", 1)))
    return values, indices


def _mat_mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = torch.matmul(a.t() if call.get("transA", 0) else a, b.t() if call.get("transB", 0) else b)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if alpha != 1.0:
        product = product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.get("equation"), *inputs)


OPS: dict[str, Function] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "CumSum": _cum_sum,
    "Div": _div,
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax_of(torch.log_softmax),
    "MatMul": _mat_mul,
    "Max": _variadic(torch.maximum),
    "Mean": lambda call, *inputs: reduce(torch.add, inputs) / len(inputs),
    "Min": _variadic(torch.minimum),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduction(lambda x, axes, keepdim: _sum(x.abs(), axes, keepdim)),
    "ReduceL2": _reduction(lambda x, axes, keepdim: _sum_square(x, axes, keepdim).sqrt()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keepdim: torch.logsumexp(x, axes, keepdim)),
    "ReduceMax": _reduction(lambda x, axes, keepdim: torch.amax(x, axes, keepdim)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, axes, keepdim: torch.amin(x, axes, keepdim)),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_square),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softmax": _softmax_of(torch.softmax),
    "Softplus": _unary(F.softplus),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": _swish,
    "Tanh": _unary(torch.tanh),
    "TopK": _top_k,
    "Xor": _binary(torch.logical_xor),
    "com.microsoft::BiasGelu": _bias_gelu,
    "com.microsoft::FastGelu": _fast_gelu,
    "com.microsoft::Gelu": _unary(F.gelu),
    "com.microsoft::QuickGelu": _quick_gelu,
}
