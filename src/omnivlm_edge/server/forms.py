"""A request's `response_format` -> the grammar of its answer, within what others need not wait for.

llama.cpp follows all the ways in which a text may go on at the same time; every answer has to wait
while it does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from ..errors import OptionError
from ..openai_messages import response_grammar
from .protocol import ResponseFormat

_MAX_SCHEMA = 64 * 1024  # bytes of JSON
_MAX_GRAMMAR = 32 * 1024  # bytes; 200 optional properties have 25 KB
# Choices within all regular expressions of a schema; their time grows with the third power.
_MAX_CHOICES = 64


def read_form(wanted: ResponseFormat | None) -> str | None:
    """The grammar (GBNF), if anything but text is wanted. Raises OptionError."""
    if wanted is None:
        return None
    form: dict[str, Any] = {"type": wanted.type, "schema": wanted.schema_}
    if wanted.json_schema is not None:
        form["json_schema"] = {"schema": wanted.json_schema.schema_}
    try:
        size = len(json.dumps(form))
    except RecursionError:
        size = _MAX_SCHEMA + 1
    if size > _MAX_SCHEMA:
        raise OptionError(f"response_format is larger than {_MAX_SCHEMA >> 10} KiB, or too deep")
    if sum(map(_choices, _patterns(form))) > _MAX_CHOICES:
        raise OptionError(
            f"the patterns of the JSON schema leave more than {_MAX_CHOICES} choices: simplify them"
        )
    grammar = response_grammar(form)
    if grammar is not None and len(grammar) > _MAX_GRAMMAR:
        raise OptionError("the JSON schema allows for too much: it must be simpler")
    return grammar


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions anywhere in a schema."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if isinstance(value.get("pattern"), str):
                yield value["pattern"]
            left += value.values()
        elif isinstance(value, list):
            left += value


def _choices(pattern: str) -> int:
    """How many choices it leaves, at most; a repeated group's count as often as it is repeated."""
    found = re.findall(r"\)\{(\d*),?(\d*)\}", pattern)
    repeats = [max(int(n[:6] or 1) for n in numbers) for numbers in found]
    return len(re.findall(r"[?*+{|]", pattern)) * math.prod(max(1, n) for n in repeats)
