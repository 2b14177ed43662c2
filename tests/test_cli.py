"""The command line in real processes: what stands on stdout, on stderr, and the exit code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from PIL import Image

from tiny_checkpoint import write_checkpoint

COMMAND = [sys.executable, "-m", "omnivlm_edge"]


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


@pytest.fixture
def image(tmp_path: Path, picture: Image.Image) -> Path:
    path = tmp_path / "my picture.png"
    picture.save(path)
    return path


def test_the_answer_alone_on_stdout(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-i", image, "-p", "What is it?", "-n", 8, "--device", "cpu")
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0
    assert first.stderr == ""
    assert first.stdout.strip()
    assert first.stdout == second.stdout


def test_seed_and_temperature(tiny_model: Path, image: Path) -> None:
    def ask(seed: int) -> str:
        hot = ("--temp", 5, "--seed", seed, "-n", 10, "-t", 1)
        return run("run", tiny_model, "-i", image, "-p", "What?", *hot).stdout

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_explicit_files(tiny_model: Path, image: Path) -> None:
    (mmproj,) = tiny_model.glob("mmproj*.gguf")
    (text,) = set(tiny_model.glob("*.gguf")) - {mmproj}
    options = ("-i", image, "-p", "What is it?", "-n", 8)
    both = run("run", text, "--mmproj", mmproj, *options)
    assert both.returncode == 0
    assert both.stdout == run("run", tiny_model, *options).stdout


def test_prompt_loop(tiny_model: Path, image: Path) -> None:
    lines = f"What is it?\n\n{image}\nWhat is it?\n'{image}'\nHow many?\nnone.png\n/bye\nunread\n"
    result = run("run", tiny_model, "-n", 6, stdin=lines)
    assert result.returncode == 0
    assert "First give the path of a picture." in result.stderr
    assert "none.png: there is no such file" in result.stderr
    direct = [
        run("run", tiny_model, "-i", image, "-n", 6, "-p", question).stdout
        for question in ("What is it?", "How many?")
    ]
    assert result.stdout == "".join(direct)


def test_prompt_loop_with_a_picture_given(tiny_model: Path, image: Path) -> None:
    result = run("run", tiny_model, "-n", 6, "-i", image, stdin="What is it?")
    assert result.returncode == 0
    assert result.stdout == run("run", tiny_model, "-i", image, "-n", 6, "-p", "What is it?").stdout


def test_prompt_loop_survives_a_wrong_picture(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    result = run("run", tiny_model, stdin=f"{text}\n")
    assert result.returncode == 0
    assert "notes.txt: is not a picture" in result.stderr


def test_prompt_loop_on_a_terminal(tiny_model: Path, image: Path) -> None:
    with pexpect.spawn(COMMAND[0], [*COMMAND[1:], "run", str(tiny_model), "-n", "4"]) as terminal:
        terminal.expect_exact(">>> ", timeout=60)
        terminal.sendline(str(image))
        terminal.expect_exact(">>> ", timeout=60)
        terminal.sendline("What is it?")
        terminal.expect_exact(">>> ", timeout=60)
        terminal.sendline("/bye")
        terminal.expect(pexpect.EOF, timeout=60)
    assert terminal.exitstatus == 0


FAILURES = {
    "no such model": (["run", "none", "-i", "{image}", "-p", "?"], 1, "'none': there is no such"),
    "no such picture": (["run", "{model}", "-i", "x.png", "-p", "?"], 1, "x.png: there is no such"),
    "not a picture": (["run", "{model}", "-i", "{text}", "-p", "?"], 1, "is not a picture"),
    "text as model": (["run", "{text}", "-i", "{image}", "-p", "?"], 1, "not a GGUF file"),
    "no device": (["run", "{model}", "-i", "{image}", "-p", "?", "--device", "x"], 1, "device 'x'"),
    "no threads": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "-t", "0"],
        2,
        "0 is not in the range",
    ),
    "no tokens": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "-n", "0"],
        2,
        "0 is not in the range",
    ),
    "cold": (["run", "{model}", "-i", "{image}", "-p", "?", "--temp", "-1"], 2, "not in the range"),
    "context": (["run", "{model}", "-i", "{image}", "-p", "?", "-c", "256"], 1, "raise n_ctx (-c)"),
    "empty model": (["run", "", "-i", "{image}", "-p", "?"], 1, "'': there is no such file"),
    "no picture": (["run", "{model}", "-p", "?"], 2, "add -i IMAGE"),
    "no model": (["run"], 2, "Missing argument 'MODEL'"),
    "no number": (["run", "{model}", "-n", "many"], 2, "not a valid integer"),
    "no command": (["walk"], 2, "No such command 'walk'"),
    "no option": (["run", "{model}", "--fast"], 2, "No such option"),
    "convert nothing": (["convert", "none", "-o", "{out}"], 1, "none"),
    "convert outtype": (["convert", "x", "-o", "{out}", "--outtype", "q9"], 2, "'q9'"),
    "convert no out": (["convert", "x"], 2, "Missing option '-o'"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES.values(), ids=FAILURES)
def test_failures(
    tmp_path: Path, tiny_model: Path, image: Path, arguments: list[str], code: int, message: str
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    places = {"model": tiny_model, "image": image, "text": text, "out": tmp_path / "out"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.returncode == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_interrupt(tiny_model: Path, image: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", str(tiny_model), "-i", str(image)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    process.stderr.readline()  # the loop's greeting: everything is loaded
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_interrupt_while_loading_and_answering(tiny_model: Path, image: Path) -> None:
    """Whenever it comes, Ctrl-C ends the program, with code 130 once the program itself runs."""
    arguments = [str(tiny_model), "-i", str(image), "-p", "?", "-n", "1500", "-c", "2048"]
    codes = set()
    for delay in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0):
        process = subprocess.Popen(
            [*COMMAND, "run", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        codes.add(process.wait(timeout=60))
    assert codes <= {130, 0, -signal.SIGINT, 1}
    assert 130 in codes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(tiny_model: Path, image: Path) -> None:
    command = [*COMMAND, "run", str(tiny_model), "-i", str(image), "-p", "?"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "Error: the output cannot be written (No space left on device)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["completion", "bash"],
        ["doctor", "--device", "cpu"],
        ["doctor", "--device", "cpu", "--json"],
    ],
    ids=" ".join,
)
def test_results_that_cannot_be_written(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr == b"Error: the output cannot be written (No space left on device)\n"


def test_reader_that_has_enough(tiny_model: Path, image: Path) -> None:
    command = [*COMMAND, "run", str(tiny_model), "-i", str(image), "-p", "?"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_input_that_is_no_text(tiny_model: Path, image: Path) -> None:
    lines = f"~nobodyx what is it?\n{image}\n\0\n{'long ' * 400}\n".encode() + b"\xff\xfe ?\n"
    command = [*COMMAND, "run", str(tiny_model), "-n", "3"]
    result = subprocess.run(command, input=lines, capture_output=True, timeout=60)
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert b"not valid text" in result.stderr


def test_convert_then_run(tmp_path: Path, image: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    result = run("convert", tmp_path / "checkpoint", "-o", tmp_path / "out", "--outtype", "bf16")
    assert result.returncode == 0
    written = [Path(line) for line in result.stdout.splitlines()]
    assert len(written) == 2
    assert all(path.is_file() for path in written)
    assert run("run", tmp_path / "out", "-i", image, "-p", "?", "-n", 3).returncode == 0


def test_help_and_version() -> None:
    assert re.fullmatch(r"omnivlm-edge, version \d+\.\d+\.\d+\n", run("--version").stdout)
    result = run("run", "--help")
    assert result.returncode == 0
    for option in ("--mmproj", "--image", "--prompt", "--max-tokens", "--temp", "--seed"):
        assert option in result.stdout
