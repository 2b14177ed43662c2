"""What a constrained answer must look like: JSON schemas as grammars of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

from .errors import OptionError


def json_schema_grammar(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema, as text or parsed -> the GBNF grammar of the JSON texts that it admits.

    llama-cpp-python's converter does the work: https://github.com/ggml-org/llama.cpp/tree/master/grammars
    lists what it knows of JSON Schema; references to other addresses are not fetched.

    Raises OptionError when the text is not JSON or the schema cannot be converted.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as exc:
            raise OptionError(f"the JSON schema is not JSON ({exc})") from exc
    if not isinstance(schema, Mapping):
        raise OptionError('the JSON schema must be an object: {"type": …}')
    try:
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as exc:  # the converter raises whatever a wrong schema leads it to
        raise OptionError(f"the JSON schema cannot be used ({exc or type(exc).__name__})") from exc
