"""What OpenAI's clients send -> our conversations and grammars.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import OptionError
from .grammar import json_schema_grammar
from .values import Turn


@dataclass
class _Draft:
    """A turn whose parts are not joined yet: each message is copied once."""

    questions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def turn(self) -> Turn:
        answer = _join(self.answers) if self.answers else None
        return Turn(_join(self.questions), tuple(self.urls), answer)


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Turn]]:
    """OpenAI messages -> the system text, and turns whose pictures are addresses.

    Of one role, neighbours are joined by an empty line, and system messages wherever they are. An
    assistant's message at the beginning is a turn without a question; one at the end is the
    beginning of the answer; an empty one (without `content`, too) is left out. `developer` is
    OpenAI's newer name for `system`.
    """
    system: list[str] = []
    drafts: list[_Draft] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise OptionError(f"messages[{i}] must have a role and content")
        role, content = message["role"], message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise OptionError(
                f"messages[{i}] cannot be of the role '{role}': "
                "it must be system, user or assistant"
            )
        if content is None and role == "assistant":
            continue
        if content is None:
            raise OptionError(f"messages[{i}] must have content")
        text, urls = _read_content(f"messages[{i}]", role, content)
        if role == "user":
            if not drafts or drafts[-1].answers:
                drafts.append(_Draft())
            drafts[-1].questions.append(text)
            drafts[-1].urls += urls
        elif role == "assistant" and text:
            if not drafts:
                drafts.append(_Draft())
            drafts[-1].answers.append(text)
        elif role != "assistant":
            system.append(text)
    if not any(message["role"] == "user" for message in messages):
        raise OptionError("messages hold none of the user's: ask a question")
    return _join(system) or None, [draft.turn() for draft in drafts]


def _join(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _read_content(where: str, role: str, content: object) -> tuple[str, list[str]]:
    """A message's text and the addresses of its pictures."""
    texts: list[str] = []
    urls: list[str] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        match part:
            case str(text) | {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": str(url) | {"url": str(url)}} if role == "user":
                urls.append(url)
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise OptionError(
                    f"{where} has content of the type '{kind}', which cannot be used: it must be "
                    "text or a list of text and, from a user, image_url parts"
                )
    return "\n".join(texts), urls


def response_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """OpenAI's `response_format` -> the grammar (GBNF) that answers must follow, if any."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            schema = response_format.get("schema") or {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            pass
        case _:
            raise OptionError(
                "response_format must be of the type text, json_object, or json_schema with a "
                "schema in json_schema"
            )
    return json_schema_grammar(schema)
