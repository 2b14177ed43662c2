"""The chat: over a pipe, and on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from PIL import Image

from command import COMMAND, run

EXAMPLES = Path(__file__).parents[1] / "examples"
HORSES, SHOPPING = EXAMPLES / "horses.png", EXAMPLES / "shopping.png"


@pytest.fixture
def image(tmp_path: Path, picture: Image.Image) -> Path:
    path = tmp_path / "my picture.png"
    picture.save(path)
    return path


@contextmanager
def terminal(*arguments: object, cwd: Path | None = None) -> Iterator[pexpect.spawn]:
    """The chat on a terminal (which does not tell where its cursor stands)."""
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [*COMMAND[1:], "run", *map(str, arguments)]
    with pexpect.spawn(
        COMMAND[0], command, env=env, timeout=60, cwd=cwd, dimensions=(40, 200)
    ) as process:
        process.expect_exact(">>>")
        yield process


def test_lines_from_a_pipe(tiny_model: Path, image: Path) -> None:
    lines = (
        f"What is it?\n\n{image}\nWhat is it?\n/clear\n'{image}'\nHow many?\nnone.png\n/bye\nno\n"
    )
    result = run("run", tiny_model, "-n", 6, stdin=lines)
    assert result.returncode == 0
    assert "First give a picture" in result.stderr
    assert "none.png: there is no such file" in result.stderr
    direct = [
        run("run", tiny_model, "-i", image, "-n", 6, "-p", question).stdout
        for question in ("What is it?", "How many?")
    ]
    assert result.stdout == "".join(direct)


def test_a_picture_given_before(tiny_model: Path, image: Path) -> None:
    result = run("run", tiny_model, "-n", 6, "-i", image, stdin="What is it?")
    assert result.returncode == 0
    assert result.stdout == run("run", tiny_model, "-i", image, "-n", 6, "-p", "What is it?").stdout


def test_a_follow_up_knows_what_was_said(tiny_model: Path, image: Path) -> None:
    arguments = ("run", tiny_model, "-n", 6, "-i", image, "--json")
    first, second = map(json.loads, run(*arguments, stdin="What is it?\nSure?").stdout.splitlines())
    alone = json.loads(run(*arguments, "-p", "Sure?").stdout)
    assert second["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"] + 6
    # All but the new question was in the context already.
    kept = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    assert second["usage"]["cached_tokens"] == kept


def test_a_model_of_single_questions_takes_each_alone() -> None:
    questions = "Do I have eggs?\nHow many carrots are there?\n"
    result = run("run", "demo", "-i", SHOPPING, stdin=questions + f"{HORSES}\nIs there a duck?")
    assert "takes each question on its own" in result.stderr
    assert result.stdout.splitlines() == [
        "Yes, there are three eggs.",
        "There are two carrots.",
        "Yes, there is one duck.",
    ]


def test_several_pictures_in_one_conversation(tiny_model: Path, image: Path) -> None:
    lines = f"/image '{image}' {HORSES}\nWhat?\n{HORSES}\nAnd here?\n"
    result = run("run", tiny_model, "-n", 2, "--json", stdin=lines)
    first, second = map(json.loads, result.stdout.splitlines())
    assert [i["name"] for i in first["images"]] == [str(image), str(HORSES)]
    assert [i["name"] for i in second["images"]] == [str(image), str(HORSES), str(HORSES)]
    assert second["images"][2]["cached"] == "memory"


def test_settings(tiny_model: Path, image: Path) -> None:
    lines = "/set max_tokens 3\nWhat?\n/set temperature hot\n/set speed 3\n"
    lines += "/set history maybe\n/set history off\n/set"
    lines += "\n/set system Be brief.\nWhat?\n/set system\n/set max_tokens off\n/set"
    result = run("run", tiny_model, "-i", image, "--json", stdin=lines)
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["usage"]["completion_tokens"] == 3
    assert second["usage"]["prompt_tokens"] < first["usage"]["prompt_tokens"]
    for line in (
        "temperature is 'hot': it must be a number",
        "there is no setting speed: there are system, history, max_tokens, temperature",
        "history is 'maybe': it must be on or off",
        "history false\nmax_tokens 3\n",
        "system null\nhistory false\nmax_tokens null\n",
    ):
        assert line in result.stderr


def test_save(tiny_model: Path, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = f"What?\n/save {file}\n/save {file}\n/save\n/save {tmp_path}/none/talk.json\n"
    result = run("run", tiny_model, "-i", image, "-n", 4, stdin=lines)
    (turn,) = json.loads(file.read_text())["turns"]
    assert turn == {
        "question": "What?",
        "images": [str(image)],
        "answer": result.stdout.removesuffix("\n"),
    }
    assert f"Saved to {file}." in result.stderr
    assert "exists already" in result.stderr
    assert "/save needs a file" in result.stderr
    assert "cannot be written (No such file or directory)" in result.stderr


def test_save_of_names_that_are_no_text(tiny_model: Path, image: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(image, odd)
    file = tmp_path / "talk.json"
    lines = b"/image '%s'\nWhat?\n/save %s\n" % (odd, os.fsencode(file))
    command = [*COMMAND, "run", str(tiny_model), "-n", "2"]
    result = subprocess.run(command, input=lines, capture_output=True, timeout=60)
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert json.loads(file.read_text())["turns"][0]["images"] == [os.fsdecode(odd)]


def test_mistakes_are_told_and_the_chat_goes_on(
    tiny_model: Path, image: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    lines = (
        f"{text}\nno such.png\n/walk\n/image\n/image 'a\n/image *.nothing\n/help\nWhat?\nquit\nno"
    )
    result = run("run", tiny_model, "-i", image, "-n", 2, stdin=lines)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    for line in (
        "notes.txt: is not a picture",
        "no such.png: there is no such file",
        "there is no command /walk; /help lists them",
        "/image needs a picture",
        "/image 'a: No closing quotation",
        "*.nothing",
        "/save FILE        write the conversation",
    ):
        assert line in result.stderr


def test_reading_model_answers_each_picture(tiny_ocr_model: Path, image: Path) -> None:
    result = run("run", tiny_ocr_model, "-n", 3, "--json", stdin=f"{image}\n{HORSES}\n")
    first, second = map(json.loads, result.stdout.splitlines())
    assert [i["name"] for i in first["images"]] == [str(image)]
    assert [i["name"] for i in second["images"]] == [str(HORSES)]
    direct = json.loads(run("run", tiny_ocr_model, "-n", 3, "--json", "-i", image, "-p", "").stdout)
    assert direct["answer"] == first["answer"]


def test_terminal(tmp_path: Path) -> None:
    with terminal("demo", cwd=EXAMPLES) as chat:
        chat.sendline("shopping.png")
        chat.expect_exact("768 x 768 pixels, seen as 126 x 126 in 9 tokens")
        chat.sendline("Do I have eggs?")
        chat.expect_exact("Yes, there are three eggs.")
        chat.send("\x1b[A\r")  # arrow up: the same question again
        chat.expect_exact("Yes, there are three eggs.")
        for typed, completed, shown in (
            ("hors", "es.png", "horses.png: PNG"),
            ("/he", "lp", "write the conversation as JSON"),
        ):
            chat.send(f"{typed}\t")
            chat.expect_exact(completed)
            chat.send("\r")
            chat.expect_exact(shown)
            chat.expect_exact(">>>")
        chat.sendline("/bye")
        chat.expect(pexpect.EOF)
    assert chat.exitstatus == 0
    with terminal("demo") as chat:  # the history outlives the program
        chat.send("\x1b[A\x1b[A\r")
        chat.expect_exact("write the conversation as JSON")
        chat.expect_exact(">>>")
        chat.sendeof()
        chat.expect(pexpect.EOF)
    assert chat.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    tiny_model: Path, image: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.gbnf"
    endless.write_text("root ::= [a-z ] root")
    options = ("-i", image, "--grammar", endless, "-c", 4096, "-n", 3500)
    with terminal(tiny_model, *options) as chat:
        chat.sendintr()
        chat.expect_exact("/bye or Ctrl-D leaves.")
        chat.expect_exact(">>>")
        chat.sendline("What is it?")
        chat.expect("[a-z ]{40}")
        chat.sendintr()
        chat.expect_exact("(stopped)")
        chat.expect_exact(">>>")
        chat.sendline("/set max_tokens 2")
        chat.expect_exact(">>>")
        chat.sendline("Sure?")
        chat.expect_exact("cut off after 2 tokens")
        chat.expect_exact(">>>")
        chat.sendeof()
        chat.expect(pexpect.EOF)
    assert chat.exitstatus == 0
