"""The command line: arguments -> engine -> stdout (answers alone) and stderr (all the rest).

One file per command; each imports what it needs inside, so that `--help` loads no llama.cpp.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click

from ..errors import OmniVLMError
from .convert import convert
from .quantize import quantize
from .run import run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="omnivlm-edge")
def cli() -> None:
    """Ask small vision-language models about pictures, on your own machine."""


for command in (run, convert, quantize):
    cli.add_command(command)


def main() -> NoReturn:
    """Runs the command and maps every outcome to an exit code."""
    sys.exit(_outcome())


def _outcome() -> int:
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by the caller (`>&-`)
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        cli.main(prog_name="omnivlm-edge", standalone_mode=False)
        sys.stdout.flush()
        code = 0
    except click.exceptions.Exit as exc:
        code = exc.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        code = 130
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except OmniVLMError as exc:
        click.echo(f"Error: {exc}", err=True)
        code = 1
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError):  # a reader that has enough is no error to tell
            click.echo(f"Error: the output cannot be written ({exc.strerror})", err=True)
        # Python would try once more to write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: Ctrl-C has nothing left to stop
    return code
