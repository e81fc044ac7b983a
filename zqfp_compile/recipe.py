"""The recipe: every option of a compile in one frozen, serialisable value.

The command line, ``--recipe FILE.yaml`` and the Python API all produce a :class:`Recipe`; the effective one
is written to the output folder so that a run can be repeated.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from zqfp_compile.device_list import parse_devices
from zqfp_compile.errors import UsageError
from zqfp_compile.precision.goal import Goal, parse_goal
from zqfp_compile.text_file import UnreadableError, read_text

Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "none"]
LorcFormat = Literal["fp16", "fp8"]
Algorithm = Literal["rtn", "gptq"]
Device = Literal["auto", "cpu", "cuda"]
Weights = Literal["fp4", "int4", "fp8", "none"]
Fp4Format = Literal["e2m1", "e3m0"]
Activations = Literal["fp8", "fp8-e5m2", "int8", "none"]
ActivationScale = Literal["tensor", "token"]
KvCacheDtype = Literal["auto", "fp8"]
Attention = Literal["none", "fp8"]
ScaleConstraint = Literal["none", "m1", "m2", "e4m3"]
WeightLowering = Literal["auto", "int4", "fp8", "plugin"]
Emit = Literal["fp4", "engine-onnx", "onnxruntime", "triton-repository"]

MAX_LORC_RANK = 512
DEFAULT_LORC_RANK, MIXED_LORC_RANK = 16, 64
# Calibration windows and tokens in each. Ranges need little text; GPTQ's moments, K x K numbers, need many
# times K tokens. The built-in text has 56 windows of 1024 (SmolLM2's tokenizer).
CALIBRATION_WINDOWS = {"rtn": (8, 512), "gptq": (48, 1024)}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
MAX_BYTES = 1 << 16
_MAX_SHOWN = 80
_MAX_COUNT, _MAX_INT64 = 10**9, (1 << 63) - 1
_AT_MOST = {"seed": _MAX_INT64, "lorc_budget": math.inf, "max_perplexity_increase": math.inf}
GROUP_SIZES = (16, 32, 64, 128, 256, 0)  # 0 is written "row": one group per row


@dataclass(frozen=True)
class Recipe:
    """Options of one compile. Field names are the command-line flags with ``-`` replaced by ``_``.

    Attributes:
        target: Engine to build; ``auto`` picks the best one that can build here.
        weights: Storage of the linear layers' weights; ``none`` leaves them as they are (A8 only).
        fp4_format: The 4-bit code book when ``weights="fp4"``.
        algorithm: How weights are rounded: ``rtn`` is to nearest; ``gptq`` minimises the error of the layer's
            output on the calibration text, layer after layer, each seeing those before it quantised.
        activations: Quantisation of the linear layers' inputs.
        activation_scale: ``tensor`` is static and calibrated, ``token`` is dynamic.
        kv_cache_dtype: Type of the KV cache's inputs and outputs; ``auto`` is the model's own.
        attention: Quantisation of the operands of attention's two matrix products.
        group_size: Weights along K that share one group scale; 0, in files and flags also ``row``: the row.
        scale_constraint: How group scales are restricted (DESIGN section 2; ZeroQuant-FP section 4).
        scale_rows: Rows of a compute group of ``m2``, which have one row scale.
        lorc_rank: Rank of the low-rank error compensation, 16 by default; 0 turns it off. With ``auto`` or
            ``lorc_budget`` the largest rank a layer may get, 64 by default.
        lorc_budget: Bits per weight that the compensation may take on average; ranks are chosen per layer.
        auto: Choose formats and ranks per layer for ``bits=4.5`` (average bits per weight) or
            ``perplexity=+2%`` (rise on calibration windows that are held out).
        lorc_format: Storage of its factors: ``fp16`` is the layer's own float type, ``fp8`` is E4M3 and one
            scale per rank.
        distill_tokens: Tokens of calibration text on which row scales and LoRC factors are trained end to end
            after quantisation, so that the model predicts what the original does; 0 is off.
        weight_lowering: How the engine holds the weights.
        emit: Extra files to write.
        calibration: Text or ``.npz`` used for calibration; ``None`` uses built-in text.
        calibration_samples: Number of calibration windows, by default 8, with ``gptq`` 48.
        calibration_length: Tokens per calibration window, by default 512, with ``gptq`` 1024.
        eval_text: Text for the perplexity in the report; ``None`` uses built-in text.
        eval_tokens: At most this many tokens are scored.
        eval_length: Tokens per evaluation window.
        evaluate: Whether to run the accuracy evaluation and the certificate's output comparison.
        include: Layer-name regexes; only matching linears are rewritten.
        exclude: Layer-name regexes; matching linears are left alone.
        quantize_lm_head: Also rewrite the output projection to the vocabulary.
        quantize_embedding: Also store the token embedding in FP8, one scale per row. A table that the lm_head
            shares is stored once, for both; without ``quantize_lm_head`` it stays as it is.
        min_shapes, opt_shapes, max_shapes: Optimisation-profile overrides, input name to dimensions.
        compute_capability: Builder's target architecture such as ``"89"``; ``None`` is the builder's default.
        timing_cache: File that keeps builder timings between runs.
        max_perplexity_increase: Gate, in percent of the original's perplexity.
        builder_timeout: Seconds the engine builder may take.
        builder_memory_gb: Memory the engine builder may allocate, in GiB; ``None`` is no limit.
        device: Where ``gptq`` and distillation compute; ``auto`` takes a GPU when torch can use one.
        devices: Instead of that: the devices that ``gptq`` is spread over, ``cuda:0,cuda:1``; what cannot be
            is done on the first. How many there are changes no result.
        seed: Seed of everything random.
    """

    target: Target = "auto"
    weights: Weights = "fp4"
    fp4_format: Fp4Format = "e2m1"
    algorithm: Algorithm = "rtn"
    activations: Activations = "fp8"
    activation_scale: ActivationScale = "tensor"
    kv_cache_dtype: KvCacheDtype = "auto"
    attention: Attention = "none"
    group_size: int = 64
    scale_constraint: ScaleConstraint = "e4m3"
    scale_rows: int = 1
    lorc_rank: int = typing.cast(int, None)  # depends on auto and lorc_budget; never None afterwards
    lorc_budget: float | None = None
    auto: str | None = None
    lorc_format: LorcFormat = "fp16"
    distill_tokens: int = 0
    weight_lowering: WeightLowering = "auto"
    emit: tuple[Emit, ...] = ()
    calibration: str | None = None
    calibration_samples: int = typing.cast(int, None)  # these two depend on algorithm, likewise
    calibration_length: int = typing.cast(int, None)
    eval_text: str | None = None
    eval_tokens: int = 20480
    eval_length: int = 1024
    evaluate: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    quantize_lm_head: bool = False
    quantize_embedding: bool = False
    min_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    opt_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    max_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    compute_capability: str | None = None
    timing_cache: str | None = None
    max_perplexity_increase: float | None = None
    builder_timeout: int = 3600
    builder_memory_gb: float | None = None
    device: Device = "auto"
    devices: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, default in _dependent_defaults(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = _coerce(spec.name, getattr(self, spec.name), hints[spec.name])
            object.__setattr__(self, spec.name, value)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def mixed(self) -> bool:
        """Whether precisions are chosen per layer."""
        return self.auto is not None or self.lorc_budget is not None

    @property
    def listed_devices(self) -> tuple[str, ...]:
        """What ``devices`` lists."""
        return () if self.devices is None else parse_devices(self.devices)

    @property
    def goal(self) -> Goal | None:
        """What ``auto`` asks for."""
        return None if self.auto is None else parse_goal(self.auto)

    def to_dict(self) -> dict[str, Any]:
        """Return plain YAML/JSON types, one key per option in declaration order."""
        return {spec.name: _plain(getattr(self, spec.name)) for spec in dataclasses.fields(self)}

    def to_yaml(self) -> str:
        """Return the recipe as YAML text that :meth:`from_yaml` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Build a recipe from plain values.

        Keys may use ``-`` or ``_``.

        Raises:
            UsageError: On an unknown key or a wrong value.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        odd = [key for key in values if not isinstance(key, str)]
        if odd:
            raise UsageError(f"recipe: {_show(odd[0])} is no option; write 'option: value' lines")
        normal = {key.replace("-", "_"): value for key, value in values.items()}
        if len(normal) < len(values):
            raise UsageError("recipe: an option is given twice, with '-' and with '_'; keep one")
        unknown = sorted(set(normal) - known)
        if unknown:
            raise UsageError(
                f"recipe: unknown option {_show(unknown[0])}; {_options_like(unknown[0], known)}"
            )
        if normal.get("group_size") == "row":
            normal["group_size"] = 0
        return cls(**normal)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            UsageError: When the file cannot be read, is no YAML mapping, or holds a wrong option.
        """
        try:
            values = yaml.load(read_text(Path(path), MAX_BYTES, regular=False), _PlainLoader)  # a SafeLoader
        # ValueError: an impossible date; RecursionError: brackets without end.
        except (UnreadableError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"recipe {path}: cannot be read ({reason}); give a YAML file") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise UsageError(f"recipe {path}: holds a {type(values).__name__}; write 'option: value' lines")
        try:
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML without references: a few lines of them can stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases; the rest is PyYAML's."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken")
        return super().compose_node(parent, index)


def _show(value: Any) -> str:
    """Return a value from a file so that it fits on one line of a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no more than 4300 digits
        return (
            f"a number of {value.bit_length()} bits"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _dependent_defaults(recipe: Recipe) -> dict[str, int]:
    """Return the defaults that depend on other options."""
    samples, length = CALIBRATION_WINDOWS["gptq" if recipe.algorithm == "gptq" else "rtn"]
    rank = MIXED_LORC_RANK if recipe.mixed else DEFAULT_LORC_RANK
    return {"lorc_rank": rank, "calibration_samples": samples, "calibration_length": length}


def _options_like(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"the options are {', '.join(sorted(known))}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: list(dims) for key, dims in value.items()}
    return value


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check one field against its annotation, turning lists into tuples."""
    origin = typing.get_origin(hint)
    flag = name.replace("_", "-")
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UsageError(f"--{flag}: {_show(value)} is not one of {', '.join(map(str, choices))}")
        return value
    if origin is types.UnionType:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return None if value is None else _coerce(name, value, inner[0])
    if origin is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UsageError(f"--{flag}: {_show(value)} is not a list")
        return tuple(_coerce(name, item, typing.get_args(hint)[0]) for item in items)
    if origin is dict:
        return _coerce_shapes(flag, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and (isinstance(value, os.PathLike) or type(value) is int):
        # A Path from Python; a number such as ``compute-capability: 89`` that YAML read as an integer.
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UsageError(f"--{flag}: {_show(value)} is not {_KINDS[hint]}")
    return value


def _coerce_shapes(flag: str, value: Any) -> dict[str, tuple[int, ...]]:
    """Accept ``{"input_ids": [1, 8]}`` or the trtexec form ``"input_ids:1x8,other:1x4"``."""
    if isinstance(value, str):
        pairs = [item.rpartition(":") for item in value.split(",") if item]
        if not all(name and re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", dims) for name, _, dims in pairs):
            raise UsageError(f"--{flag}: {_show(value)} is not of the form NAME:1x128,OTHER:1x64")
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise UsageError(f"--{flag}: {_show(value)} names an input twice; keep one")
        return {name: tuple(map(int, dims.split("x"))) for name, _, dims in pairs}
    if not isinstance(value, dict):
        raise UsageError(f"--{flag}: {_show(value)} is not of the form NAME:1x128,OTHER:1x64")
    result = {}
    for name, dims in value.items():
        if not isinstance(dims, (list, tuple)) or not all(
            type(d) is int and 0 <= d <= _MAX_INT64 for d in dims
        ):
            raise UsageError(
                f"--{flag}: dimensions of {_show(name)} are {_show(dims)}; write a list such as [1, 128]"
            )
        result[str(name)] = tuple(dims)
    return result


def _check_ranges(recipe: Recipe) -> None:
    if recipe.group_size not in GROUP_SIZES:
        sizes = ", ".join(str(size or "row") for size in GROUP_SIZES)
        raise UsageError(f"--group-size: {_show(recipe.group_size)} is not one of {sizes}")
    if not 0 <= recipe.lorc_rank <= MAX_LORC_RANK:
        raise UsageError(f"--lorc-rank: {_show(recipe.lorc_rank)} is outside 0..{MAX_LORC_RANK}")
    at_least = {
        "scale_rows": 1,
        "lorc_budget": 0.01,
        "distill_tokens": 0,
        "calibration_samples": 1,
        "calibration_length": 2,
        "eval_tokens": 2,
        "eval_length": 2,
        "builder_timeout": 1,
        "max_perplexity_increase": 0,
        "builder_memory_gb": 0.1,
        "seed": 0,
    }
    for name, low in at_least.items():
        value = getattr(recipe, name)
        high = _AT_MOST.get(name, _MAX_COUNT)
        if value is not None and not low <= value <= high:
            fault = f"above {high}" if value > high else f"below {low}"
            raise UsageError(f"--{name.replace('_', '-')}: {_show(value)} is {fault}")
    for flag, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UsageError(
                    f"--{flag}: {_show(pattern)} is not a regular expression ({error})"
                ) from error


def _check_combinations(recipe: Recipe) -> None:
    if recipe.weights == "none" and recipe.activations == "none":
        raise UsageError("--weights none with --activations none leaves nothing to do; choose one of them")
    if recipe.scale_rows > 1 and recipe.scale_constraint != "m2":
        raise UsageError(
            f"--scale-rows {recipe.scale_rows}: rows share a scale only under --scale-constraint m2; drop it"
        )
    engine = recipe.target in ("tensorrt", "tensorrt-rtx")
    if engine and recipe.weights in ("fp4", "int4") and recipe.scale_constraint == "none":
        raise UsageError(
            "--scale-constraint none is a reference without FP8 tensor-core form; "
            "use m1, m2 or e4m3, or --target onnxruntime"
        )
    if engine and recipe.activations in ("fp8-e5m2", "int8"):
        raise UsageError(
            f"--activations {recipe.activations} has no FP8 tensor-core form with these weights; "
            "use fp8, or --target onnxruntime"
        )
    if recipe.mixed:
        _check_mixed(recipe)
    if recipe.distill_tokens:
        _check_distillation(recipe)
    listed = recipe.listed_devices  # read even if it cannot contradict: it may be wrong
    if recipe.device != "auto" and not all(name.startswith(recipe.device) for name in listed):
        raise UsageError(f"--devices {recipe.devices} says where to compute; drop --device {recipe.device}")
    if recipe.max_perplexity_increase is not None and not recipe.evaluate:
        raise UsageError("--max-perplexity-increase needs the evaluation; drop --no-evaluate")


def _check_distillation(recipe: Recipe) -> None:
    if recipe.weights == "none":
        raise UsageError("--distill-tokens trains what belongs to quantised weights; drop --weights none")
    if recipe.weights != "fp8" and recipe.scale_constraint == "m1" and recipe.lorc_rank == 0:
        raise UsageError(
            "--distill-tokens has nothing to train: m1 scales are powers of two and --lorc-rank is 0; "
            "use m2 or e4m3, or a rank"
        )


def _check_mixed(recipe: Recipe) -> None:
    if recipe.auto is not None and recipe.lorc_budget is not None:
        raise UsageError("--auto chooses LoRC ranks itself; drop --lorc-budget")
    if recipe.auto is not None:
        parse_goal(recipe.auto)
        if recipe.weights not in ("fp4", "int4"):
            raise UsageError(f"--auto chooses which layers get 4 bits; drop --weights {recipe.weights}")
    elif recipe.weights == "none":
        raise UsageError("--lorc-budget has no error to compensate with --weights none; drop one of them")
    elif recipe.lorc_rank == 0:
        raise UsageError("--lorc-budget with --lorc-rank 0 leaves no rank to choose; drop --lorc-rank")
