"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def setting(*names: str, **attributes: Any) -> Decorator:
    """An option that an environment variable can set too: `--ctx-size` is OMNIVLM_CTX_SIZE."""
    long = next(name for name in names if name.startswith("--"))
    variable = "OMNIVLM_" + long.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, **attributes)
