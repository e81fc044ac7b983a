"""The process that builds an engine: ``python -m zqfp_compile.backends.tensorrt_worker job.json CHANNEL``.

The library may abort, crash or eat all memory on a bad model; here it takes only this process along. Standard
output is the build log; progress and the outcome go as JSON lines to the file descriptor CHANNEL.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zqfp_compile.backends import gpu, timing_cache
from zqfp_compile.backends.capability import chooses_capability, settle_capability
from zqfp_compile.backends.trt_api import (
    LABELS,
    Builder,
    BuilderConfig,
    Network,
    Parser,
    TrtModule,
    import_runtime,
)
from zqfp_compile.errors import BuilderError, MissingDependencyError, ZqfpError

_PR_SET_PDEATHSIG = 1
_PROGRESS_SECONDS = 0.25
_MESSAGE_CHARACTERS = 400
_SOURCE_POSITION = re.compile(
    r"IBuilder::buildSerializedNetwork: |\(?\[\S+\.\w+:\d+: \w+\] | ?In \w+ at \S+\.cpp:\d+\)"
    r"|\S+\.(cpp|h):\d+:? ?"
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to build.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        onnx_path: Engine-ready model; external data beside it.
        engine_path: Where to write the plan (the parent renames it).
        profiles: Input name to (min, opt, max) dimensions, per optimisation profile.
        compute_capability: Such as ``"89"``; ``None`` for the GPU here, or 89 without one.
        timing_cache: File, or ``None``.
        memory_gb: Limit on this process's data, in GiB, or ``None``.
        plugin: Plugin library the model needs, or ``None``.
    """

    target: str
    onnx_path: str
    engine_path: str
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    compute_capability: str | None
    timing_cache: str | None
    memory_gb: float | None
    plugin: str | None = None

    def to_json(self) -> str:
        """Serialise for :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what :meth:`to_json` wrote."""
        return cls(**json.loads(text))


def main(arguments: Sequence[str]) -> int:
    """Build what the job file ``arguments[0]`` says, talking on descriptor ``arguments[1]``; 0 is success."""
    job = Job.from_json(Path(arguments[0]).read_text(encoding="utf-8"))
    _limit(job.memory_gb)
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8", buffering=1) as channel:

        def send(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")

        try:
            send(result=_build(job, lambda text: send(phase=text)))
        except ZqfpError as error:
            send(error=type(error).__name__, text=str(error))
            return error.exit_code
        except OSError as error:
            send(
                error="MissingDependencyError",
                text=f"{error.strerror or error} while writing the engine or its log in "
                f"{Path.cwd().parent}; free some space, or choose other folders with --output and TMPDIR",
            )
            return 1
        except MemoryError:
            send(error="MemoryError", text="")
            return 1
    return 0


def _limit(memory_gb: float | None) -> None:
    """Die with the parent, leave no core file, and stay below ``memory_gb`` of writable memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gb is not None:
        # Not RLIMIT_AS: CUDA reserves far more address space than it uses.
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _build(job: Job, tell: Tell) -> dict[str, Any]:
    tell("loading the builder")
    trt = import_runtime(job.target)
    label = f"{LABELS[job.target]} {trt.__version__}"
    log = _make_logger(trt)
    builder = _create_builder(trt, log, label)
    if job.plugin is not None:
        load_plugin(builder.get_plugin_registry(), Path(job.plugin), label)
    network = builder.create_network(_network_flags(trt))
    tell("parsing the model")
    parser = trt.OnnxParser(network, log)  # owns the weights: it must outlive the build
    _parse(parser, network, log, Path(job.onnx_path), label)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    capability = _set_capability(trt, config, job.compute_capability, label)
    _add_profiles(builder, network, config, job.profiles)
    cache = _timing_cache(job, config, tell)
    config.progress_monitor = _make_monitor(trt, tell)
    tell("building the engine")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuilderError(f"{label} cannot build {Path(job.onnx_path).name}: {_build_failure(log, network)}")
    tell("writing the engine")
    with Path(job.engine_path).open("wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    if cache is not None:
        timing_cache.save(config, cache)
    if not log.lists_layers:
        _inspect(trt, log, plan)
    if log.write_error is not None:
        raise log.write_error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"version": trt.__version__, "compute_capability": capability, "peak_bytes": peak}


def _create_builder(trt: TrtModule, log: Any, label: str) -> Builder:
    try:
        return trt.Builder(log)
    except TypeError as error:  # "factory function returned nullptr": no driver, or one too old
        why = log.errors[0] if log.errors else str(error)
        raise MissingDependencyError(
            f"{label} does not start here ({_one_line(why)}); check the GPU and its driver"
        ) from error


def load_plugin(registry: Any, library: Path, label: str) -> None:
    """Load a plugin library into a builder's or a runtime's registry.

    Raises:
        MissingDependencyError: When it does not load; the registry itself returns ``None`` in silence.
    """
    if registry.load_library(str(library)) is None:
        raise MissingDependencyError(
            f"{label} does not load the plugin {library}; build it again: make tensorrt-plugin"
        )


def _network_flags(trt: TrtModule) -> int:
    """Strong typing: the ONNX carries every dtype. TensorRT 11 knows nothing else and may drop the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _make_logger(trt: TrtModule) -> Any:
    """An ``ILogger`` that writes every message to standard output at once: a crash loses nothing."""
    base: Any = trt.ILogger

    class BuildLog(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []
            self.lists_layers = False
            self.write_error: OSError | None = None

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rpartition(".")[2]
            if "ERROR" in level:
                self.errors.append(message)
            self.lists_layers |= "Layers:\nName: " in message
            try:
                os.write(1, f"[{level[0]}] {message}\n".encode())
            except OSError as error:  # raising here, under the library, would end the process
                self.write_error = error

    return BuildLog()


def _make_monitor(trt: TrtModule, tell: Tell) -> Any:
    """An ``IProgressMonitor`` that tells at most four times a second."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            self._tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def _tell(self, phase: str, step: int) -> None:
            now = time.monotonic()
            if now - self.told >= _PROGRESS_SECONDS:
                self.told = now
                tell(f"{phase.lower()} {step}/{self.steps.get(phase, 0)}")

    return Monitor()


def _parse(parser: Parser, network: Network, log: Any, path: Path, label: str) -> None:
    """Parse from the path, so that the parser finds external data beside the file."""
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [error for error in errors if error.node_name()]
        where = f" at node {named[0].node_name()!r} ({named[0].node_operator()})" if named else ""
        # Without a node the first error of the log is the cause; the description may be no more than "false".
        reason = named[0].desc() if named else (log.errors or ["the log holds no error"])[0]
        reason = "the parser does not support it" if reason == "false" else reason
        raise BuilderError(
            f"{label} cannot parse {path.name}{where}: {_one_line(reason)}; "
            "run the model with --target onnxruntime, or change that part of the export"
        )
    if network.num_outputs == 0:  # the parser takes a file of any bytes for a model without nodes
        raise BuilderError(f"{label} finds no graph in {path.name}: it is no ONNX model, or is cut short")


def _set_capability(trt: TrtModule, config: BuilderConfig, wanted: str | None, label: str) -> str:
    """Choose the GPU architecture; returns it as digits."""
    capability = settle_capability(trt, wanted, label)
    if chooses_capability(trt):
        known = getattr(trt, "ComputeCapability").__members__  # noqa: B009  TensorRT-RTX only
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[f"SM{capability}"], 0)
    return capability


def _add_profiles(
    builder: Builder,
    network: Network,
    config: BuilderConfig,
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    names = {tensor.name for tensor in inputs}
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise BuilderError(
                f"input {tensor.name!r} sets shapes by its value, which the profiles here cannot bound; "
                "export the model with that input as a constant"
            )
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            if name in names:  # the parser drops inputs nothing reads
                profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuilderError(f"the builder refuses the profile {dict(shapes)}; change --min/opt/max-shapes")


def _timing_cache(job: Job, config: BuilderConfig, tell: Tell) -> Path | None:
    if job.timing_cache is None:
        return None
    if job.target == "tensorrt-rtx":
        tell("timing cache not used: TensorRT-RTX measures no kernels while building")
        return None
    path = Path(job.timing_cache)
    timing_cache.load(config, path)
    return path


def _build_failure(log: Any, network: Network) -> str:
    """The last error of the log, with the network's layer it names, if any."""
    message = _one_line(log.errors[-1] if log.errors else "the log holds no error")
    names = (network.get_layer(index).name for index in range(network.num_layers))
    named = max((name for name in names if len(name) > 2 and name in message), key=len, default=None)
    return (f"at node {named!r}: " if named else "") + message


def _one_line(text: str) -> str:
    """Drop line breaks and the library's source positions; keep the start of long texts."""
    text = " ".join(_SOURCE_POSITION.sub("", text).split())
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "..."


def _inspect(trt: TrtModule, log: Any, plan: Any) -> None:
    """Append the engine inspector's layer list to the log, for a builder whose log has none; needs a GPU."""
    if not gpu.compute_capabilities():
        return
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is not None:
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
        log.log("VERBOSE", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
