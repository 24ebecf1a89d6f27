"""`moe-local doctor`: what this machine has, and what to fix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_local.cli.options import debug_flag, json_flag
from moe_local.cli.render import on_stdout, print_json, wrapped
from moe_local.offload.system.home import moe_local_home

if TYPE_CHECKING:
    from moe_local.offload.doctor.finding import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
WIDTH = 18


@click.command()
@click.option(
    "--measure/--no-measure",
    default=True,
    help="Measure RAM, disk and GPU anew (some two seconds), or show what was measured before.",
)
@json_flag
@debug_flag
def doctor(measure: bool, as_json: bool) -> None:
    """Examine this machine: software, GPU and its link, CPU, memory, disk, kernels, bandwidths.

    Each line is ok, warn (it works, but slower or with less than it could) or fail, with what to do about it.
    The bandwidths are kept for fit, and for scheduling what the GPU lacks. Exit code 1 if a line is fail.

    \b
    Examples:
      moe-local doctor
      moe-local doctor --no-measure --json
    """
    from huggingface_hub import constants

    from moe_local.offload.doctor.check_up import check_up

    findings = []
    for finding in check_up(moe_local_home(), Path(constants.HF_HUB_CACHE), measure=measure):
        findings.append(finding)
        if not as_json:
            _show(finding)
    counts = Counter(str(finding.level) for finding in findings)
    if as_json:
        print_json(
            {
                "ok": not counts["fail"],
                "counts": {level: counts[level] for level in STYLES},
                "findings": [finding.to_dict() for finding in findings],
            }
        )
    else:
        click.echo(", ".join(f"{counts[level]} {level}" for level in STYLES))
    if counts["fail"]:
        click.get_current_context().exit(1)


def _show(finding: Finding) -> None:
    level = str(finding.level)
    console, indent = on_stdout(), 6 + WIDTH + 2
    console.print(f"{level:<4}", style=STYLES[level], end="  ")
    first, *more = wrapped(finding.text, indent)
    console.print(f"{finding.name:<{WIDTH}}  {first}", markup=False)
    for line in more:
        console.print(f"{'':<{indent}}{line}", markup=False)
    mark = "->"
    for line in wrapped(finding.remedy, indent + 3) if finding.remedy else ():
        console.print(f"{'':<{indent}}{mark:<3}{line}", style="dim", markup=False)
        mark = ""
