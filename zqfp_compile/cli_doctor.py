"""``zqfp-doctor``: what this machine has and can do; argument handling and printing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from zqfp_compile.cli import EPILOG, run
from zqfp_compile.doctor import Diagnosis, diagnose

app = typer.Typer(add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(epilog=EPILOG)
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="The same for programs.")] = False,
) -> None:
    """Print versions, GPUs and libraries, which targets build and run here, and the fix for what does not."""
    found = diagnose()
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(_lines(found)), flush=True)


def _lines(found: Diagnosis) -> list[str]:
    lines = [f"{name:<14}{text}" for name, text in found.system.items()]
    gpus = ", ".join(f"SM{capability}" for capability in found.gpus)
    lines += [f"{'GPUs':<14}{gpus or 'none found (or no driver)'}", "", "Libraries"]
    for library in found.libraries:
        text = (
            f"{library.version}  {library.detail}".rstrip() if library.fix is None else f"no: {library.fix}"
        )
        lines.append(f"  {library.name:<14}{text}")
    lines += ["", "Targets"]
    for target in found.targets:
        lines.append(f"  {target.target:<14}builds here: {_verdict(target.build_fix)}")
        lines.append(f"  {'':<14}runs here:   {_verdict(target.run_fix)}")
    return [*lines, "", f"--target auto takes {found.auto}"]


def _verdict(fix: str | None) -> str:
    return "yes" if fix is None else f"no: {fix}"


def main() -> None:
    """Entry point of ``zqfp-doctor``."""
    run(app, "zqfp-doctor")


if __name__ == "__main__":
    main()
