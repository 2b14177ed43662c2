"""The command line: arguments -> engine -> stdout (answers alone) and stderr (all the rest).

One file per command; each imports what it needs inside, so that `--help` loads no llama.cpp.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some rows of a batch failed, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click

from ..errors import OmniVLMError
from .batch import batch
from .bench import bench
from .compare import compare
from .completion import completion
from .convert import convert
from .doctor import doctor
from .imatrix import imatrix
from .quantize import quantize
from .run import run
from .serve import serve
from .store import ls, pull, rm, show

ALIASES = {"list": "ls", "remove": "rm", "server": "serve"}

EPILOG = """\b
Examples:
  omnivlm-edge run omnivision -i photo.jpg -p "What is in the picture?"
  omnivlm-edge run demo
  omnivlm-edge batch omnivision photos -p "Describe the image" -o photos.jsonl
  omnivlm-edge serve omnivision
  omnivlm-edge quantize omnivision small --q4_k_m
  omnivlm-edge doctor

\b
Environment:
  OMNIVLM_...      sets the option whose help names the variable; the option
                   itself, given on the command line, wins
  OMNIVLM_HOME     where models made here and the cache of encoded pictures are
                   kept [default: the system's directories for such things]
  HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE
                   where downloaded models come from and are kept
                   [default: ~/.cache/huggingface]

\b
Output and exit codes:
  Answers and results go to stdout, all else to stderr.
  0 done, 1 failed, 2 wrong usage, 3 some rows of a batch failed,
  130 interrupted

\b
Files:
  A model is two GGUF files: a text model and its vision file (mmproj).
"""


class _Group(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="omnivlm-edge")
def cli() -> None:
    """Ask small vision-language models about pictures, on your own machine."""


for command in (
    run,
    batch,
    serve,
    pull,
    ls,
    show,
    rm,
    quantize,
    imatrix,
    compare,
    bench,
    convert,
    doctor,
    completion,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Runs the command and maps every outcome to an exit code."""
    # huggingface_hub's warnings are for programmers; our errors say what a user needs to know.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    sys.exit(_outcome())


def _outcome() -> int:
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by the caller (`>&-`)
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        code: int = cli.main(prog_name="omnivlm-edge", standalone_mode=False) or 0  # of ctx.exit()
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        code = 130
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except OmniVLMError as exc:
        click.echo(f"Error: {exc}", err=True)
        code = 1
    except (ImportError, RuntimeError) as exc:
        if not _is_missing_library(exc):
            raise
        click.echo(
            f"Error: {exc}; install what this library belongs to, such as the GPU's driver or "
            "toolkit, or build llama-cpp-python and omnivlm-edge anew (see Devices in the README)",
            err=True,
        )
        code = 1
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError):  # a reader that has enough is no error to tell
            what = "the output cannot be written"
            if exc.filename is not None:
                what = f"{os.fsdecode(exc.filename)}: cannot be read or written"
            click.echo(f"Error: {what} ({exc.strerror})", err=True)
        # Python would try once more to write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: Ctrl-C has nothing left to stop
    return code


def _is_missing_library(exc: Exception) -> bool:
    """Whether our extension, or llama-cpp-python in its own words, could not be loaded."""
    if isinstance(exc, ImportError):
        return not isinstance(exc, ModuleNotFoundError)
    return str(exc).startswith("Failed to load shared library")
