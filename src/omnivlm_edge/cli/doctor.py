"""`omnivlm-edge doctor`: what is installed, what is used, and what to do about what is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import device_option, mmproj_option, model_argument

if TYPE_CHECKING:
    from ..doctor import Check


@click.command()
@model_argument(default="demo")
@mmproj_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.pass_context
def doctor(
    context: click.Context, model: str, mmproj: Path | None, device: str, as_json: bool
) -> None:
    """Check this machine and the installation.

    Says what is installed, which devices there are and whether a GPU is really used, whether MODEL
    (default: demo) fits the memory, and whether the device computes what the CPU computes: a known
    picture and an answer go through both. Each problem comes with the next step. Exit code 1 says
    that there is a problem; warnings are none.
    """
    from ..doctor import examine

    checks = []
    for check in examine(model, mmproj, device=device):
        checks.append(check)
        if not as_json:
            _print(check)
    healthy = all(check.status != "problem" for check in checks)
    if as_json:
        result = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(result, indent=2))
    if not healthy:
        context.exit(1)


def _print(check: Check) -> None:
    click.echo(f"{check.status:<8} {check.name:<11} {check.detail}")
    if check.advice:
        click.echo(f"{'':<8} {'':<11} next step: {check.advice}")
