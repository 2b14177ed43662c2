"""Completion scripts, in the shells that they are for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

COMMAND = Path(sys.executable).parent / "omnivlm-edge"
TAB, CTRL_A = "\t", "\x01"


def script(shell: str) -> str:
    command = [str(COMMAND), "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model's directory, a picture and the scripts of all shells."""
    (tmp_path / "my-models").mkdir()
    (tmp_path / "horses.png").touch()
    for shell in ("bash", "zsh", "fish"):
        (tmp_path / f"_{shell}").write_text(script(shell))
    return tmp_path


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


def spawn(place: Path, command: str, *set_up: str) -> Iterator[pexpect.spawn]:
    environment = {
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
        "HOME": str(place),
        "PS1": "$ ",
        "TERM": "dumb",
    }
    shell = pexpect.spawn(command, cwd=place, env=environment, encoding="utf-8", timeout=20)
    for line in set_up:
        shell.sendline(line)
    shell.sendline("echo rea''dy")
    shell.expect("ready\r\n")
    yield shell
    shell.close(force=True)


@pytest.fixture
def bash(place: Path) -> Iterator[pexpect.spawn]:
    yield from spawn(place, "bash --norc --noprofile -i", "source ./_bash")


@pytest.fixture
def zsh(place: Path) -> Iterator[pexpect.spawn]:
    loading = "mv _zsh _omnivlm-edge; fpath+=$PWD; autoload -U compinit; compinit -u"
    yield from spawn(place, "zsh -f -i", loading)


# What is typed before TAB -> what stands there after it.
COMPLETED = {
    "doc": "doctor",
    "run de": "run demo",
    "run omnivision-p": "run omnivision-preview",
    "doctor omnivision-o": "doctor omnivision-ocr",
    "run my-": "run my-models",
    "run demo --max-t": "run demo --max-tokens",
    "run demo -i hor": "run demo -i horses.png",
    "completion f": "completion fish",
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_is_printed(shell: str) -> None:
    text = script(shell)
    assert f"_OMNIVLM_EDGE_COMPLETE={shell}_complete" in text
    assert "omnivlm-edge" in text


@needs("bash")
@pytest.mark.parametrize("typed", COMPLETED)
def test_bash(bash: pexpect.spawn, typed: str) -> None:
    assert becomes(bash, typed, COMPLETED[typed]), bash.before


@needs("zsh")
@pytest.mark.parametrize("typed", COMPLETED)
def test_zsh(zsh: pexpect.spawn, typed: str) -> None:
    assert becomes(zsh, typed, COMPLETED[typed]), zsh.before


def becomes(shell: pexpect.spawn, typed: str, completed: str) -> bool:
    """Types the line and TAB, then has the shell show what the line became."""
    shell.sendline(f"omnivlm-edge {typed}{TAB}{CTRL_A}: ")
    shell.sendline("fc -ln -1")
    return bool(shell.expect_exact([pexpect.TIMEOUT, f": omnivlm-edge {completed}"]))


@needs("fish")
@pytest.mark.parametrize("typed", COMPLETED)
def test_fish(place: Path, typed: str) -> None:
    line = f"source ./_fish; complete -C 'omnivlm-edge {typed}'"
    environment = {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["fish", "--no-config", "-c", line],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=True,
    )
    offered = [candidate.split("\t")[0].rstrip("/") for candidate in result.stdout.splitlines()]
    assert COMPLETED[typed].split()[-1] in offered


def test_names_of_models(place: Path) -> None:
    environment = {
        **os.environ,
        "_OMNIVLM_EDGE_COMPLETE": "bash_complete",
        "COMP_WORDS": "omnivlm-edge run ",
        "COMP_CWORD": "2",
    }
    result = subprocess.run([COMMAND], capture_output=True, text=True, env=environment, check=True)
    names = "demo omnivision omnivlm omnivision-ocr omnivision-preview".split()
    assert result.stdout.splitlines() == ["file,", *(f"plain,{name}" for name in names)]


def test_unknown_shell() -> None:
    result = subprocess.run([COMMAND, "completion", "tcsh"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "bash" in result.stderr
