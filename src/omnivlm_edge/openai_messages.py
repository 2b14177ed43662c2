"""What OpenAI's clients send -> our conversations and grammars.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import OptionError
from .grammar import json_schema_grammar
from .values import Turn


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Turn]]:
    """OpenAI messages -> the system text, and turns whose pictures are addresses."""
    system = None
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        match message:
            case {"role": str(role), "content": content}:
                text, urls = _read_content(f"messages[{i}]", role, content)
            case _:
                raise OptionError(f"messages[{i}] must have a role and content")
        waiting = bool(turns) and turns[-1].answer is None
        if role == "system" and i == 0:
            system = text
        elif role == "user" and not waiting:
            turns.append(Turn(text, urls))
        elif role == "assistant" and waiting:
            turns[-1] = replace(turns[-1], answer=text)
        else:
            raise OptionError(
                f"messages[{i}] cannot be of the role '{role}': a system message may come first, "
                "then user and assistant take turns"
            )
    if not turns or turns[-1].answer is not None:
        raise OptionError("the last message must be the user's")
    return system, turns


def _read_content(where: str, role: str, content: object) -> tuple[str, tuple[str, ...]]:
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
    return "\n".join(texts), tuple(urls)


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
