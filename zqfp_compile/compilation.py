"""The state of one compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile import engines
from zqfp_compile.backends.target import TargetChoice
from zqfp_compile.calibrate.samples import EvalTokens, Samples
from zqfp_compile.certificate import Certificate
from zqfp_compile.companions import companion_folder, find_companions
from zqfp_compile.device import torch_devices
from zqfp_compile.distill.train import Distillation
from zqfp_compile.estimate import Estimate
from zqfp_compile.evaluate import Evaluation
from zqfp_compile.memory import MemoryWatch
from zqfp_compile.output_folder import ARTIFACT, TOKENIZER, OutputFolder
from zqfp_compile.parallel.choice import Workers
from zqfp_compile.pass_runner import PassRunner
from zqfp_compile.plan import QuantPlan
from zqfp_compile.precision.auto import Chooser
from zqfp_compile.progress import Reporter, StepTimer
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.model import EngineReport
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.work_folder import WorkFolder

MARK = "zqfp.version"  # metadata of every model we write

Rows = Mapping[str, npt.NDArray[np.float32]]


@dataclass
class Compilation:
    """State of one run; each step reads what earlier steps left here."""

    source: Path
    model: ir.Model
    name: str  # of the model, for people: its path where it was given as a file
    recipe: Recipe
    folder: OutputFolder
    timer: StepTimer
    runner: PassRunner
    work: WorkFolder
    store: TensorStore
    workers: Workers
    memory: MemoryWatch
    choice: TargetChoice
    explain: bool
    plan: QuantPlan = field(default_factory=QuantPlan)
    samples: Samples | None = None
    held_out: Samples | None = None
    distill_samples: tuple[Samples, Samples] | None = None
    estimate: Estimate | None = None
    chooser: Chooser | None = None
    distillation: Distillation | None = None
    rows: Rows = field(default_factory=dict)
    energies: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    certificate: Certificate | None = None
    evaluation: Evaluation | None = None
    eval_text: EvalTokens | None = None
    engine: EngineReport | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def reporter(self) -> Reporter:
        """Who is told about progress."""
        return self.timer.reporter

    @property
    def devices(self) -> tuple[str, ...]:
        """Where torch computes: what cannot be spread on the first."""
        return torch_devices(self.recipe.device, self.recipe.listed_devices)

    @property
    def walks(self) -> bool:
        """Whether calibration and quantisation are one step, layer by layer."""
        return self.recipe.algorithm == "gptq" and self.plan.quantizes_weights

    @property
    def artifact(self) -> Path:
        """The portable model, in the folder being made."""
        return self.folder.path / ARTIFACT

    @property
    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` beside the source, if there is one."""
        path = companion_folder(self.source) / TOKENIZER
        return path if path.is_file() else None

    @property
    def companions(self) -> tuple[Path, ...]:
        """The files beside the source that whoever generates text needs as well."""
        return find_companions(companion_folder(self.source))

    @property
    def place(self) -> engines.Workplace:
        """Where lowered models come from and go to, by the plan as it is now."""
        return engines.Workplace(self.source, self.folder, self.artifact, self.plan, self.runner, self.timer)

    def warn(self, lines: Sequence[str]) -> None:
        """Tell the reporter, and keep the lines for the report."""
        self.warnings.extend(lines)
        for line in lines:
            self.reporter.warn(line)
