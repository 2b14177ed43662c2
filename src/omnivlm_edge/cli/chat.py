"""The chat on a terminal, or over lines from a pipe: pictures, questions and commands."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OmniVLMError, OptionError
from ..files import make_private, write_whole
from ..paths import cache_dir
from ..values import GenerateOptions
from .output import Output, describe

if TYPE_CHECKING:
    from ..engine import OmniVLM
    from ..image import Picture

HELP = """\
A line that names a picture (a path, a pattern, an http(s) address) loads it; any other line is a
question about the pictures so far.

/image FILE…      load pictures, for the next question
/clear            forget questions, answers and pictures
/set              show the settings; /set NAME VALUE changes one
/save FILE        write the conversation as JSON
/help             this text
/bye              leave; so does Ctrl-D. Ctrl-C stops an answer"""


class ChatLoop:
    """One chat with one model. Errors are told, and the chat goes on."""

    def __init__(
        self,
        engine: OmniVLM,
        output: Output,
        options: GenerateOptions,
        system: str | None,
        *,
        allow_private: bool,
        keep_history: bool,
    ) -> None:
        self._keep_history = keep_history
        self._engine = engine
        self._output = output
        self._options = options
        self._allow_private = allow_private
        self._chat = engine.chat(system=system)
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/clear": self._clear,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda _: _say(HELP),
        }

    def run(self, pictures: Sequence[Picture]) -> None:
        """Reads lines until /bye or the end of input."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if not self._engine.takes_questions:
            _say("Give pictures, one at a time: the model reads them. /bye or Ctrl-D leaves.")
        elif self._chat.history:
            _say("Give a picture, then ask about it. /help lists commands, /bye or Ctrl-D leaves.")
        else:
            _say(
                "Give a picture, then ask about it; this model takes each question on its own. "
                "/help lists commands, /bye or Ctrl-D leaves."
            )
        if pictures:
            self._load(pictures)
        typed = partial(_typed_lines, [*self._commands, "/bye"], keep_history=self._keep_history)
        for line in typed() if interactive else _piped_lines():
            if line in ("/bye", "/exit", "/quit", "bye", "exit", "quit"):
                return
            try:
                self._handle(line)
            except OmniVLMError as exc:
                _say(f"Error: {exc}")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                click.echo()
                _say("(stopped)")

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command in self._commands:
            self._commands[command](rest.strip())
            return
        source = _picture_in(line)
        if source is not None:
            self._load(self._read(source))
        elif command.startswith("/") and "/" not in command[1:]:
            raise OptionError(f"there is no command {command}; /help lists them")
        elif not self._chat.has_images:
            _say("First give a picture: its path, or /image FILE.")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        stream = self._chat.stream(question, options=self._options)
        with contextlib.closing(stream):
            self._output.answer(self._engine, stream, self._options)

    def _read(self, source: str) -> list[Picture]:
        from ..image import shrink
        from ..sources import read_sources

        pictures = read_sources(source, allow_private=self._allow_private)
        return [shrink(picture, self._engine.image_size) for picture in pictures]

    def _load(self, pictures: Sequence[Picture]) -> None:
        self._chat.add_images(*pictures)
        for picture in pictures:
            _say(describe(self._engine, picture))
        self._output.doubts(self._engine, pictures)
        if not self._engine.takes_questions:
            self._ask("")

    def _image(self, names: str) -> None:
        try:
            sources = shlex.split(names)
        except ValueError as exc:
            raise OptionError(f"/image {names}: {exc}") from exc
        if not sources:
            raise OptionError("/image needs a picture: /image FILE…")
        self._load([picture for source in sources for picture in self._read(source)])

    def _clear(self, _: str) -> None:
        self._chat.clear()
        _say("Forgotten.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        settings = self._settings()
        if not name:
            for key, current in settings.items():
                _say(f"{key} {json.dumps(current, ensure_ascii=False)}")
        elif name not in settings:
            raise OptionError(f"there is no setting {name}: there are {', '.join(settings)}")
        elif name == "system":
            self._chat.system = value.strip() or None
        elif name == "history":
            switch = {"on": True, "off": False}.get(value.strip())
            if switch is None:
                raise OptionError(f"history is {value.strip()!r}: it must be on or off")
            self._chat.history = switch
        else:
            self._options = replace(self._options, **{name: _parse(value)})

    def _settings(self) -> dict[str, Any]:
        options = {
            field.name: getattr(self._options, field.name)
            for field in fields(self._options)
            if field.name not in ("grammar", "logit_bias")
        }
        return {"system": self._chat.system, "history": self._chat.history, **options}

    def _save(self, name: str) -> None:
        if not name:
            raise OptionError("/save needs a file: /save FILE")
        path = Path(name).expanduser()
        conversation = {
            "model": self._output.model,
            "system": self._chat.system,
            "turns": [
                {
                    "question": turn.question,
                    "images": [image.name for image in turn.images],
                    "answer": turn.answer,
                }
                for turn in self._chat.turns
            ],
        }
        if path.exists():  # no file is lost
            raise OptionError(f"{path}: exists already; give another name")
        text = json.dumps(conversation, ensure_ascii=False, indent=1) + "\n"
        try:
            write_whole(path, text.encode(errors="backslashreplace"))  # names may be no text
        except OSError as exc:
            raise OptionError(f"{path}: cannot be written ({exc.strerror})") from exc
        _say(f"Saved to {path}.")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _parse(value: str) -> Any:
    """`off` (None), a whole number or a number; what is none of them stays text, to be refused."""
    if value.strip() in ("off", "none", "null"):
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value.strip())
    return value


def _piped_lines() -> Iterator[str]:
    """Non-empty lines of stdin, whatever bytes they hold."""
    for line in sys.stdin.buffer:
        text = line.decode("utf-8", "surrogateescape").strip()
        if text:
            yield text


def _typed_lines(commands: Sequence[str], *, keep_history: bool) -> Iterator[str]:
    """Non-empty lines from the terminal, with history, editing and completion."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter, merge_completers
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Paths(Completer):
        """Completes the path that the line ends with."""

        _paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Document, event: Any) -> Any:
            return self._paths.get_completions(Document(document.text.split(" ")[-1]), event)

    history: History = InMemoryHistory()
    if keep_history:
        with contextlib.suppress(OSError):
            make_private(cache_dir())
            history = FileHistory(str(cache_dir() / "chat-history"))
    session: PromptSession[str] = PromptSession(
        ">>> ",
        history=history,
        completer=merge_completers([WordCompleter(commands, sentence=True), Paths()]),
        complete_while_typing=False,
    )
    while True:
        try:
            line = session.prompt().strip()
        except KeyboardInterrupt:
            _say("/bye or Ctrl-D leaves.")
            continue
        except EOFError:
            return
        if line:
            yield line


def _picture_in(line: str) -> str | None:
    """What a line names, if it names a picture and asks no question."""
    text = line.strip("'\"").replace("\\ ", " ")
    if text.startswith(("http://", "https://", "data:", "clipboard:")) and " " not in text:
        return text
    try:
        path = Path(text).expanduser()
        if path.is_file():
            return text
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such user, a null byte
        return None
    from PIL import Image

    return text if path.suffix.lower() in Image.registered_extensions() else None
