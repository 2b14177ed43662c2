"""The command line in real processes: what stands on stdout, on stderr, and the exit code."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pexpect
import pytest
from PIL import Image

import omnivlm_edge
from command import COMMAND, run
from omnivlm_edge import cli as commands
from tiny_checkpoint import write_checkpoint

CUT = "(cut off after {} tokens: see -n)\n"


@pytest.fixture
def image(tmp_path: Path, picture: Image.Image) -> Path:
    path = tmp_path / "my picture.png"
    picture.save(path)
    return path


def test_the_answer_alone_on_stdout(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-i", image, "-p", "What is it?", "-n", 8, "--device", "cpu")
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0
    assert first.stderr == CUT.format(8)
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


def test_picture_from_standard_input_data_uri_and_pattern(tiny_model: Path, image: Path) -> None:
    ask = [*COMMAND, "run", str(tiny_model), "-p", "What is it?", "-n", "6"]
    want = run("run", tiny_model, "-i", image, "-p", "What is it?", "-n", 6).stdout
    assert want
    data = image.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in ("-", uri, str(image.parent / "my*.png")):
        result = subprocess.run([*ask, "-i", source], input=data, capture_output=True, timeout=60)
        assert result.stderr.decode() == CUT.format(6)
        assert result.stdout.decode() == want


def test_show_image(tiny_model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (40, 30), "red").save(path, exif=exif)
    arguments = ("run", tiny_model, "-i", path, "-p", "What is it?", "-n", 3)
    shown = run(*arguments, "--show-image")
    assert shown.returncode == 0
    assert shown.stdout == run(*arguments).stdout
    assert shown.stderr == (
        f"{path}: JPEG, 40 x 30 pixels, turned upright (EXIF), seen as 84 x 84 in 4 tokens\n"
        + CUT.format(3)
    )


def test_several_pictures(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-p", "What is it?", "-n", 3, "--json")
    one = json.loads(run(*arguments, "-i", image).stdout)
    two = json.loads(run(*arguments, "-i", image, "-i", str(image.parent / "*.png")).stdout)
    assert [picture["name"] for picture in two["images"]] == [str(image)] * 2
    assert two["usage"]["image_tokens"] == 2 * one["usage"]["image_tokens"] == 8


def test_json(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-i", image, "-p", "What is it?", "-n", 5)
    result = run(*arguments, "--json", "--stats")
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert report["answer"] + "\n" == run(*arguments).stdout
    assert report["finish_reason"] == "length"
    assert report["usage"]["completion_tokens"] == 5
    assert report["usage"]["prompt_tokens"] > report["usage"]["image_tokens"] == 4
    assert report["images"][0]["name"] == str(image)
    timings = report["timings"]
    assert 0 < timings["prompt_ms"] < timings["ttft_ms"]
    assert timings["load_ms"] > 0 < timings["predicted_per_second"]
    assert report["peak_rss_mb"] > 20
    assert report["model"]["name"] == str(tiny_model)
    for part in ("model", "mmproj"):
        path = tiny_model / report[part]["file"]
        assert report[part]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert re.search(r"first token [\d.]+ s, .* 5 out; peak \d+ MB\n", result.stderr)


def test_a_picture_is_encoded_once_for_all_processes(
    tiny_model: Path, image: Path, tmp_path: Path
) -> None:
    def cached(*more: str) -> str | None:
        arguments = ("run", tiny_model, "-i", image, "-p", "?", "-n", 1, "--json", *more)
        report = json.loads(run(*arguments, OMNIVLM_HOME=str(tmp_path / "home")).stdout)
        found: str | None = report["images"][0]["cached"]
        return found

    assert cached("--no-cache") is None
    assert cached() is None
    assert cached() == "disk"
    assert cached("--no-cache") is None


def test_choices(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-i", image, "-p", "Is it red?", "--choices", "yes,no, maybe")
    lines = [line.split("\t") for line in run(*arguments).stdout.splitlines()]
    assert sorted(choice for choice, _ in lines) == ["maybe", "no", "yes"]
    chances = [float(chance) for _, chance in lines]
    assert sum(chances) == pytest.approx(1, abs=1e-3)
    assert chances == sorted(chances, reverse=True)
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["answer"] == lines[0][0] == next(iter(report["choices"]))


def test_schema(tiny_model: Path, image: Path, tmp_path: Path) -> None:
    schema = '{"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, '
    schema += '"required": ["n"], "additionalProperties": false}'
    file = tmp_path / "schema.json"
    file.write_text(schema)
    for given in (schema, file):
        result = run("run", tiny_model, "-i", image, "-p", "How many?", "--schema", given)
        assert result.returncode == 0
        assert isinstance(json.loads(result.stdout)["n"], int)
    cut = run("run", tiny_model, "-i", image, "-p", "How many?", "--schema", schema, "-n", 2)
    assert cut.returncode == 1
    assert "cut off after 2 tokens, before it was complete" in cut.stderr


def test_grammar(tiny_model: Path, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "ab.gbnf"
    file.write_text('root ::= ("ab" | "cd") "e"')
    result = run("run", tiny_model, "-i", image, "-p", "?", "--grammar", file)
    assert result.stdout in ("abe\n", "cde\n")
    assert result.returncode == 0


def test_settings_from_the_environment(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-i", image, "-p", "?", "--json")
    from_env = json.loads(run(*arguments, OMNIVLM_MAX_TOKENS="2").stdout)
    assert from_env["usage"]["completion_tokens"] == 2
    flag_wins = json.loads(run(*arguments, "-n", "3", OMNIVLM_MAX_TOKENS="2").stdout)
    assert flag_wins["usage"]["completion_tokens"] == 3
    wrong = run(*arguments, OMNIVLM_MAX_TOKENS="many")
    assert wrong.returncode == 2


def test_a_context_larger_than_the_training(tiny_model: Path, image: Path) -> None:
    result = run("run", tiny_model, "-i", image, "-p", "?", "-n", 2, "-c", 10**6)
    assert "(-c 1000000: the model was trained for 4096 positions only)\n" in result.stderr
    assert "trained" not in run("run", "demo", "-i", image, "-p", "?", "-n", 2).stderr


def test_every_setting_reaches_the_engine(tiny_model: Path, image: Path) -> None:
    def ask(*more: object) -> str:
        return run("run", tiny_model, "-i", image, "-p", "?", "-n", 12, "-t", 1, *more).stdout

    greedy = ask()
    assert ask("-s", "Be brief.") != greedy
    penalised = [ask("-n", 60, *more) for more in ((), ("--repeat-penalty", 9))]
    assert penalised[0] != penalised[1]
    wild = ("--temp", 9, "--seed", 3)
    free = ask(*wild, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    assert free != greedy
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 0.999999)):
        assert ask(*wild, *narrow) == greedy
    assert ask("--no-mmproj-offload", "-ngl", 0) == greedy


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(tiny_model: Path, image: Path, closed: str) -> None:
    command = shlex.join([*COMMAND, "run", str(tiny_model), "-i", str(image), "-p", "?", "-n", "2"])
    result = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


def test_private_address_only_if_allowed(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
    refused = run("run", tiny_model, "-i", url, "-p", "?")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "leads to the private address 127.0.0.1" in refused.stderr
    tried = run("run", tiny_model, "-i", url, "-p", "?", "--allow-private-urls")
    assert tried.returncode == 1
    assert "cannot be reached" in tried.stderr


def test_standard_input_that_is_a_terminal(tiny_model: Path) -> None:
    arguments = [*COMMAND[1:], "run", str(tiny_model), "-i", "-", "-p", "?"]
    with pexpect.spawn(COMMAND[0], arguments) as terminal:
        terminal.expect_exact("standard input is a terminal", timeout=60)
        terminal.expect(pexpect.EOF, timeout=60)
    assert terminal.exitstatus == 1


FAILURES = {
    "no such model": (["run", "none", "-i", "{image}", "-p", "?"], 1, "'none': there is no such"),
    "no such picture": (["run", "{model}", "-i", "x.png", "-p", "?"], 1, "x.png: there is no such"),
    "picture before model": (["run", "none", "-i", "x.png", "-p", "?"], 1, "x.png: there is no"),
    "empty picture": (["run", "{model}", "-i", "", "-p", "?"], 1, "a picture's name is empty"),
    "no match": (["run", "{model}", "-i", "x*.png", "-p", "?"], 1, "nor one that matches"),
    "no address": (["run", "{model}", "-i", "http://", "-p", "?"], 1, "not a valid address"),
    "empty stdin": (["run", "{model}", "-i", "-", "-p", "?"], 1, "standard input is empty"),
    "stdin twice": (["run", "{model}", "-i", "-", "-i", "-", "-p", "?"], 2, "can be given once"),
    "stdin and loop": (["run", "{model}", "-i", "-"], 2, "can be given once, with -p"),
    "schema and grammar": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--schema", "{{}}", "--grammar", "x"],
        2,
        "exclude each other",
    ),
    "no grammar": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--grammar", "x.gbnf"],
        1,
        "x.gbnf: cannot be read (No such file",
    ),
    "wrong grammar": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--grammar", "{text}"],
        1,
        "the grammar cannot be used",
    ),
    "no schema": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--schema", "x.json"],
        1,
        "x.json: cannot be read",
    ),
    "wrong schema": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--schema", '{{"type": "wrong"}}'],
        1,
        "the JSON schema cannot be used",
    ),
    "schema that is no JSON": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--schema", "{text}"],
        1,
        "the JSON schema is not JSON",
    ),
    "one choice": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "--choices", "yes"],
        1,
        "two or more different words",
    ),
    "choices in a chat": (["run", "{model}", "--choices", "yes,no"], 2, "add -p PROMPT"),
    "no layers": (["run", "{model}", "-ngl", "-1"], 2, "not in the range"),
    "one of two": (["run", "{model}", "-i", "{image}", "-i", "x.png"], 1, "x.png: there is no"),
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
    "context": (
        ["run", "{model}", "-i", "{image}", "-p", "?", "-c", "256", "-n", "512"],
        1,
        "raise n_ctx (-c)",
    ),
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
    for delay in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0):
        process = subprocess.Popen(
            [*COMMAND, "run", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        codes.add(process.wait(timeout=60))
    # Python itself starts before any of our code can heed the signal.
    assert codes <= {130, 0, -signal.SIGINT}
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


def test_a_file_that_fails_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "model.gguf")

    monkeypatch.setattr(commands.cli, "main", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error == "Error: model.gguf: cannot be read or written (Permission denied)\n"


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
    for option in (
        "--mmproj",
        "--image",
        "--show-image",
        "--prompt",
        "--max-tokens",
        "--temp",
        "--seed",
    ):
        assert option in result.stdout


def test_a_library_that_is_missing(tmp_path: Path) -> None:
    # Our extension finds ggml beside its package, so that a copy of the package does not.
    package = Path(omnivlm_edge.__file__).parent
    shutil.copytree(package, tmp_path / "omnivlm_edge", ignore=shutil.ignore_patterns("*.gguf"))
    for command in ("doctor", "bench"):
        result = run(command, "demo", PYTHONPATH=str(tmp_path))
        assert result.returncode == 1
        assert re.fullmatch(r"Error: .*libggml.*; install what .*\n", result.stderr, re.S)
        assert "Traceback" not in result.stderr
    assert run("--version", PYTHONPATH=str(tmp_path)).returncode == 0


def test_a_library_that_llama_cpp_python_misses(tmp_path: Path) -> None:
    message = "Failed to load shared library 'libllama.so': libcuda.so.1: cannot open"
    (tmp_path / "llama_cpp.py").write_text(f"raise RuntimeError({message!r})")
    result = run("compare", "demo", "demo", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.fullmatch(rf"Error: {message}; install what .*\n", result.stderr)
