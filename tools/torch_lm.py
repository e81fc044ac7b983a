"""Fake quantisation of a causal LM in torch, on CPU or CUDA, with the product's own ``quantize/`` code.

For large grids of experiments (``tools/paper_table.py``); headline figures come from the ONNX path.
Calibration is sequential: decoder layer by decoder layer, and within a layer group by group of linears that
share an input, so that every linear is quantised on inputs that its quantised predecessors make.

    loaded = torch_models.load(Path("build/cache/SmolLM2-135M-Instruct.Q4_1.gguf"), device="cuda")
    calibration = Calibration(loaded.model, take_windows(loaded.tokens(valid), 64, 2048))
    with quantized(calibration, QuantConfig(algorithm="gptq", lorc_rank=32)) as summary:
        print(torch_models.perplexity(loaded.model, loaded.tokens(test)), summary.bits_per_weight)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch_models import decoder_layers

from zqfp_compile.quantize.activation import ACTIVATION_MAX, fake_quantize_activation
from zqfp_compile.quantize.layer import Algorithm, LayerOptions, quantize_layer
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.reference import (
    REFERENCE_WEIGHTS,
    asymmetric_parameters,
    fake_quantize_asymmetric,
    quantize_reference,
)

PRODUCT_WEIGHTS = {"fp4-e2m1": "e2m1", "fp4-e3m0": "e3m0", "int4": "int4", "fp8-e4m3": "fp8"}
WEIGHTS = ("none", *PRODUCT_WEIGHTS, *REFERENCE_WEIGHTS)
ACTIVATIONS = {
    "fp8-e4m3": "e4m3",
    "fp8-e5m2": "e5m2",
    "int8": "int8",
    "int8-asym": "int8-asym",
    "none": "none",
}
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
FACTOR_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "fp8": 8}

# Tokens whose moments are added at once; rows of calibration windows run at once on a GPU.
ROWS = 1 << 15
CUDA_BATCH = 8


@dataclass(frozen=True)
class QuantConfig:
    """One row of a table: how all linears of the decoder are quantised.

    Attributes:
        weights: One of :data:`WEIGHTS`.
        activations: A key of :data:`ACTIVATIONS`.
        activation_scale: ``tensor`` (static, from the calibration's range) or ``token`` (dynamic).
        constraint: Scale constraint of the 4-bit formats; reference formats and FP8 have none.
        group_size: Weights along K per group scale; 0 is a whole row.
        algorithm: One of :data:`ALGORITHMS`.
        lorc_rank: 0 for no compensation.
        lorc_dtype: Storage of its factors.
        lorc_metric: ``moments`` weighs the error with the input's second moment; ``plain`` is the papers'
            SVD, once, after quantising.
        tuning: Further fields of :class:`zqfp_compile.quantize.layer.LayerOptions`; ``cross`` (bool) says
            whether moments hold the original model's input (by default with GPTQ).
    """

    weights: str = "fp4-e2m1"
    activations: str = "fp8-e4m3"
    activation_scale: str = "tensor"
    constraint: str = "e4m3"
    group_size: int = 64
    algorithm: Algorithm = "rtn"
    lorc_rank: int = 0
    lorc_dtype: str = "float16"
    lorc_metric: str = "moments"
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {
            "weights": WEIGHTS,
            "activations": tuple(ACTIVATIONS),
            "activation_scale": ("tensor", "token"),
            "constraint": ("none", "m1", "m2", "e4m3"),
            "algorithm": ALGORITHMS,
            "lorc_dtype": tuple(FACTOR_BITS),
            "lorc_metric": ("moments", "plain"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: take one of {', '.join(allowed)}")
        self.layer_options()  # an unknown tuning field fails here, not after minutes of calibration

    def layer_options(self) -> LayerOptions:
        """Return the options of one layer."""
        tuning = {key: value for key, value in self.tuning.items() if key != "cross"}
        return LayerOptions(
            algorithm=self.algorithm,
            weight_format=PRODUCT_WEIGHTS.get(self.weights, "e2m1"),
            group_size=self.group_size,
            scale_constraint=self.constraint,
            lorc_rank=self.lorc_rank,
            lorc_dtype=self.lorc_dtype,
            **tuning,
        )

    @property
    def needs_moments(self) -> bool:
        """Whether quantising looks at the input."""
        aware = self.lorc_rank > 0 and self.lorc_metric == "moments"
        return self.weights != "none" and (self.algorithm == "gptq" or aware)

    @property
    def cross(self) -> bool:
        """Whether the moments hold the original model's input."""
        wanted = bool(self.tuning.get("cross", self.algorithm == "gptq"))
        return self.needs_moments and wanted and self.layer_options().correction > 0


@dataclass(frozen=True, eq=False)
class ActivationQuantizer:
    """``x -> x_hat``, float32. Without a scale every token makes its own."""

    format: str
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    @classmethod
    def calibrated(cls, config: QuantConfig, rows: list[torch.Tensor]) -> ActivationQuantizer:
        """Return the quantiser that ``config`` asks for, a static scale fitted to the rows."""
        name = ACTIVATIONS[config.activations]
        if name == "none" or config.activation_scale == "token":
            return cls(name)
        low = torch.stack([part.min() for part in rows]).min()
        high = torch.stack([part.max() for part in rows]).max()
        if name == "int8-asym":
            return cls(name, *asymmetric_parameters(low, high))
        largest = torch.maximum(-low, high)
        return cls(name, torch.where(largest > 0, largest / ACTIVATION_MAX[name], 1.0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x_hat of x's shape."""
        if self.format == "none":
            return x.float()
        if self.format == "int8-asym":
            return fake_quantize_asymmetric(x, self.scale, self.zero)
        return fake_quantize_activation(x, self.format, self.scale)


class QuantLinear(nn.Module):
    """``y = x_hat W_hat^T + (x V) U + b`` in float32, returned in x's dtype (DESIGN section 2)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    v: torch.Tensor | None
    u: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        quantizer: ActivationQuantizer,
        lorc: LowRank | None,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.float())
        self.register_buffer("v", None if lorc is None else lorc.v)
        self.register_buffer("u", None if lorc is None else lorc.u)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., N] for x [..., K]."""
        y = nn.functional.linear(self.quantizer(x), self.weight, self.bias)
        if self.v is not None and self.u is not None:
            y += (x.float() @ self.v) @ self.u
        return y.to(x.dtype)


@dataclass(frozen=True)
class Summary:
    """What quantising a model gave.

    Attributes:
        bits_per_weight: Mean over the decoder's linear weights, LoRC factors included.
        seconds: Wall time of calibration and quantisation.
        linears: Number of linears replaced.
    """

    bits_per_weight: float
    seconds: float
    linears: int


class _Reached(Exception):  # noqa: N818 (control flow, no error)
    """Raised by a hook: the module's input is known, the rest of the layer need not run."""


class Calibration:
    """Calibration windows up to the first decoder layer's input; serves any number of configurations."""

    def __init__(self, model: Any, windows: npt.NDArray[np.int64], *, batch: int | None = None) -> None:
        """Run the embedding on all windows and one batch through the model.

        Args:
            model: transformers causal LM, unquantised.
            windows: int64 [M, L].
            batch: Windows run together (cut to a divisor of M); by default 8 on a GPU, 1 on a CPU.
        """
        self.model = model
        self.layers = decoder_layers(model)
        limit = batch or (CUDA_BATCH if model.device.type == "cuda" else 1)
        size = max(b for b in range(1, limit + 1) if len(windows) % b == 0)
        parts = torch.split(torch.from_numpy(windows).to(model.device), size)
        # Masks and rotary tables depend on the batch's shape alone: one batch's serve all.
        self.keywords = [keywords for _, keywords in self._calls(parts[0], list(self.layers))]
        self.inputs = [self._calls(part, [self.layers[0]])[0][0] for part in parts]

    @torch.no_grad()
    def _calls(
        self, ids: torch.Tensor, modules: list[nn.Module]
    ) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Run the model until the last of ``modules`` is called; return every one's input and keywords."""
        calls = []

        def record(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            keywords = dict(keywords)
            hidden = args[0] if args else keywords.pop("hidden_states")
            calls.append((hidden, keywords))
            if module is modules[-1]:
                raise _Reached

        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
        try:
            with contextlib.suppress(_Reached):
                self.model.base_model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return calls


@contextlib.contextmanager
def quantized(
    calibration: Calibration, config: QuantConfig, *, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Summary]:
    """Quantise the calibration's model in place; leaving the context puts the original modules back.

    Args:
        calibration: Windows and model.
        config: What to do.
        progress: Called with one line per decoder layer.
    """
    work = _Work(calibration, config)
    try:
        for index in range(len(calibration.layers)):
            work.quantize_layer(index)
            progress(f"layer {index + 1}/{len(calibration.layers)}, {time.perf_counter() - work.start:.1f} s")
        yield work.summary()
    finally:
        work.restore()


class _Work:
    """The two streams of hidden states through the decoder, and what was replaced on the way."""

    def __init__(self, calibration: Calibration, config: QuantConfig) -> None:
        self.start = time.perf_counter()
        self.config = config
        self.layers = calibration.layers
        self.keywords = calibration.keywords
        self.seen = list(calibration.inputs)
        self.original = list(calibration.inputs)
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self.bits = 0.0
        self.weights = 0

    @torch.no_grad()
    def quantize_layer(self, index: int) -> None:
        """Replace the linears of one decoder layer and move the streams past it."""
        layer, keywords = self.layers[index], self.keywords[index]
        original = copy.deepcopy(layer) if self.config.cross else None
        for names in _input_groups(layer, self.seen[0], keywords):
            self._quantize_group(index, names, original)
        for place in range(len(self.seen)):
            self.seen[place] = _run(layer, self.seen[place], keywords)
            if original is not None:
                self.original[place] = _run(original, self.original[place], keywords)

    def _quantize_group(self, index: int, names: list[str], original: nn.Module | None) -> None:
        """Quantise linears that share an input."""
        layer, keywords = self.layers[index], self.keywords[index]
        rows = [_input_of(layer, names[0], hidden, keywords) for hidden in self.seen]
        quantizer = ActivationQuantizer.calibrated(self.config, rows)
        moments = None
        if self.config.needs_moments:
            k = rows[0].shape[-1]
            moments = InputMoments(k, device=rows[0].device, cross=original is not None)
            for place, part in enumerate(rows):
                exact = None
                if original is not None:
                    exact = _input_of(original, names[0], self.original[place], keywords).reshape(-1, k)
                _add(moments, quantizer, part.reshape(-1, k), exact)
        for name in names:
            self._replace(layer, name, f"layers.{index}.{name}", quantizer, moments)

    def _replace(
        self,
        layer: nn.Module,
        name: str,
        label: str,
        quantizer: ActivationQuantizer,
        moments: InputMoments | None,
    ) -> None:
        linear = _linears(layer)[name]
        parent_name, _, attribute = name.rpartition(".")
        parent = layer.get_submodule(parent_name)
        weight, lorc, bits = quantize_linear(linear.weight, self.config, moments, label)
        self.replaced.append((parent, attribute, linear))
        setattr(parent, attribute, QuantLinear(weight, linear.bias, quantizer, lorc))
        self.bits += bits * weight.numel()
        self.weights += weight.numel()

    def summary(self) -> Summary:
        """Return the result so far."""
        if self.seen[0].is_cuda:
            torch.cuda.synchronize(self.seen[0].device)
        # The model is evaluated next: its memory is better used there.
        self.seen, self.original = [], []
        return Summary(self.bits / self.weights, time.perf_counter() - self.start, len(self.replaced))

    def restore(self) -> None:
        """Put the original linears back."""
        for parent, attribute, linear in self.replaced:
            setattr(parent, attribute, linear)


def quantize_linear(
    weight: torch.Tensor, config: QuantConfig, moments: InputMoments | None, name: str
) -> tuple[torch.Tensor, LowRank | None, float]:
    """Return W_hat (float32 [N, K]), the compensation, and the bits per weight with it."""
    options = config.layer_options()
    plain = options.lorc_rank > 0 and config.lorc_metric == "plain"
    if plain:
        options = dataclasses.replace(options, lorc_rank=0)
    if config.weights == "none":
        return weight.float(), None, 8.0 * weight.element_size()
    if config.weights in REFERENCE_WEIGHTS:
        result = quantize_reference(weight, config.weights, options, moments=moments, name=name)
        effective, lorc, bits = result.weight, result.lorc, result.bits_per_weight
    else:
        layer = quantize_layer(weight, options, moments=moments, name=name)
        effective, lorc = layer.effective_weight(weight.device), layer.lorc
        bits = layer.weight.bits_per_weight()
    if plain:
        lorc = low_rank_factors(weight.float() - effective, config.lorc_rank, dtype=config.lorc_dtype)
    return effective, lorc, bits + _lorc_bits(weight, lorc, config)


def _lorc_bits(weight: torch.Tensor, lorc: LowRank | None, config: QuantConfig) -> float:
    """Return the factors' bits per weight, FP8 scales (two float32 per rank) included."""
    if lorc is None:
        return 0.0
    scales = 64 * lorc.rank if lorc.v_scale is not None else 0
    return (FACTOR_BITS[config.lorc_dtype] * lorc.rank * sum(weight.shape) + scales) / weight.numel()


def _add(
    moments: InputMoments, quantizer: ActivationQuantizer, rows: torch.Tensor, exact: torch.Tensor | None
) -> None:
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        moments.add(quantizer(rows[part]), None if exact is None else exact[part])


def _run(layer: nn.Module, hidden: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    output = layer(hidden, **keywords)
    moved: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return moved


def _input_of(layer: nn.Module, name: str, hidden: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    """Run the layer as far as linear ``name`` and return its input [b, L, K]."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            _run(layer, hidden, keywords)
    finally:
        hook.remove()
    return found[0]


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the layer's unquantised linears by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _input_groups(layer: nn.Module, hidden: torch.Tensor, keywords: dict[str, Any]) -> list[list[str]]:
    """Return the names of the layer's linears, grouped by the input they share, in order of execution.

    Raises:
        ValueError: When a linear did not run: its input would be unknown.
    """
    linears = _linears(layer)
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return record

    hooks = [module.register_forward_pre_hook(recorder(name)) for name, module in linears.items()]
    try:
        _run(layer, hidden, keywords)
    finally:
        for hook in hooks:
            hook.remove()
    called = [name for _, names in groups for name in names]
    if sorted(called) != sorted(linears):
        raise ValueError(f"linears {sorted(set(linears) ^ set(called))} ran never or twice: no plain decoder")
    return [names for _, names in groups]
