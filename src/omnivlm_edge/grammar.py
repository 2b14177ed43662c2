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
    lists what it knows of JSON Schema; references to other addresses are not fetched. Of
    bounds of numbers only a `minimum` and `maximum` of integers hold that are less than 1,000
    apart.

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
        return str(json_schema_to_gbnf(json.dumps(_listed(schema))))
    except Exception as exc:  # the converter raises whatever a wrong schema leads it to
        raise OptionError(f"the JSON schema cannot be used ({exc or type(exc).__name__})") from exc


def _listed(schema: Any) -> Any:
    """The schema with integers between two bounds, which the converter passes over, as a list."""
    if isinstance(schema, list):
        return [_listed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    low, high = schema.get("minimum"), schema.get("maximum")
    if (
        schema.get("type") == "integer"
        and isinstance(low, int)
        and isinstance(high, int)
        and 0 <= high - low < 1000
    ):
        return {"enum": list(range(low, high + 1))}
    found = {}
    for key, part in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(part, Mapping):
            found[key] = {name: _listed(named) for name, named in part.items()}
        elif key in ("const", "default", "enum", "examples"):  # hold values, no schemas
            found[key] = part
        else:
            found[key] = _listed(part)
    return found
