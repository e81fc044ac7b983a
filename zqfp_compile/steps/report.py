"""Report what the run made and measured."""

from __future__ import annotations

from zqfp_compile.compilation import Compilation
from zqfp_compile.disk import size_of
from zqfp_compile.report.assemble import Facts, assemble, worst_histograms
from zqfp_compile.report.html import write_html
from zqfp_compile.report.json_report import write_json
from zqfp_compile.report.model import Report, ResourcesReport


def write_report(run: Compilation) -> Report:
    """Write ``report.json``, ``report.html`` and ``recipe.yaml``; return the report."""
    with run.timer.step("report"):
        facts = Facts(
            name=run.name,
            source=run.source,
            recipe=run.recipe,
            plan=run.plan,
            model=run.model,
            artifact=run.artifact,
            samples=run.samples,
            distillation=run.distillation,
            certificate=run.certificate,
            evaluation=run.evaluation,
            eval_description="" if run.eval_text is None else run.eval_text.description,
            engine=run.engine,
            warnings=tuple(run.warnings),
            seconds=run.timer.seconds,
            resources=_resources(run),
        )
        report = assemble(facts)
        write_json(report, run.folder.path / "report.json")
        write_html(report, run.folder.path / "report.html", worst_histograms(report, facts))
        (run.folder.path / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    return report


def _resources(run: Compilation) -> ResourcesReport:
    """What was estimated, and what it took up to here."""
    return ResourcesReport(
        estimated=run.estimate,
        seconds=sum(run.timer.seconds.values()),
        anonymous_bytes=run.memory.peak.anonymous or None,
        resident_bytes=run.memory.peak.resident or None,
        anonymous_bytes_by_step=dict(run.memory.by_step),
        disk_bytes=size_of(run.work.path) + size_of(run.folder.path) + size_of(run.folder.scratch),
    )


def manifest(report: Report) -> dict[str, object]:
    """Return the content of ``manifest.json``."""
    return {
        "schema_version": 1,
        "source": report.model,
        "source_sha256": report.source_sha256,
        "created": report.created,
        "versions": dict(report.versions),
        "recipe": dict(report.recipe),
    }
