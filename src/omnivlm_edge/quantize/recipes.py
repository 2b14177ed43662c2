"""Which type each matrix gets: the recipes by name, and what a user asks for beyond them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import OptionError

# A regular expression that is searched in a tensor's name, and the type of what it is found in.
Rule: TypeAlias = "tuple[str, str]"

FLOATS = ("F32", "F16", "BF16")
# Values in a block of each type: a row must be whole blocks.
BLOCK = {
    **dict.fromkeys(FLOATS, 1),
    **dict.fromkeys(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"), 32),
    **dict.fromkeys(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "IQ4_XS"), 256),
}

# What a row gets that is whole blocks of 32 but not of 256 (the tower's are 1152 values wide, the
# language model's 896): the type of 32 with the least error for about as many bits.
_NARROW = {"Q6_K": "Q8_0", "Q5_K": "Q5_0", "Q4_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL"}


@dataclass(frozen=True)
class Recipe:
    """`base` for every matrix that none of the rules of its file names; the first rule counts."""

    base: str
    text: tuple[Rule, ...] = ()
    vision: tuple[Rule, ...] = ()


# The _m recipes spend about 10 MB where a byte helps most. Measured on the demo's held-out scenes
# with one group of matrices in Q4_K and the others in Q8_0 (`quantize --q8_0 --tensor-type
# 'mm\.2=q4_k'`, then `compare`), the relative error of the image embeddings is 0.052 for mm.2,
# 0.037 for mm.0 and 0.021 to 0.030 for each group of the tower's; all in Q8_0: 0.010. In the text
# model, keys and values in Q8_0 nearly halve the KL divergence of the 4-bit file.
_PROJECTOR = (r"^mm\.2\.", "Q8_0"), (r"^mm\.0\.", "Q5_K")
_KEYS_VALUES = ((r"attn_[kv]\.", "Q8_0"),)

RECIPES = {
    "f16": Recipe("F16"),
    "bf16": Recipe("BF16"),
    "q8_0": Recipe("Q8_0"),
    "q6_k": Recipe("Q6_K"),
    "q5_k_m": Recipe("Q5_K", text=_KEYS_VALUES, vision=((r"^mm\.2\.", "Q8_0"),)),
    "q5_k_s": Recipe("Q5_K"),
    "q5_1": Recipe("Q5_1"),
    "q5_0": Recipe("Q5_0"),
    "q4_k_m": Recipe("Q4_K", text=_KEYS_VALUES, vision=_PROJECTOR),
    "q4_k_s": Recipe("Q4_K"),
    "q4_1": Recipe("Q4_1"),
    "q4_0": Recipe("Q4_0"),
    "iq4_nl": Recipe("IQ4_NL"),
    "iq4_xs": Recipe("IQ4_XS"),
}
_ALIASES = {"FP32": "F32", "FP16": "F16"}


@dataclass(frozen=True)
class QuantizeOptions:
    """What is asked for beyond a recipe.

    `tensor_types` are rules that come before the recipe's: (regular expression, type).
    `embedding_type` and `output_type` are those of the text model's token embeddings and output;
    where these are one matrix, as in Qwen2.5-0.5B, it has one type. `imatrix` is the path of an
    importance matrix (see imatrix.py), by which each column's error counts. `allow_requantize`
    admits sources that are quantized already, at a loss.

    Raises OptionError for a name that is no type, or an expression that is none.
    """

    tensor_types: tuple[Rule, ...] = ()
    embedding_type: str | None = None
    output_type: str | None = None
    imatrix: str | os.PathLike[str] | None = None
    allow_requantize: bool = False

    def __post_init__(self) -> None:
        for pattern, name in self.tensor_types:
            check_type(name)
            try:
                re.compile(pattern)
            except re.error as exc:
                raise OptionError(f"{pattern!r} is no regular expression: {exc}") from exc
        for role in (self.embedding_type, self.output_type):
            if role is not None:
                check_type(role)

    def rules(self, recipe: str, kind: Literal["text", "vision"], *, tied: bool) -> list[Rule]:
        """All rules of a file in the order in which they count; the last one holds for the rest.

        `tied`: the token embeddings are the output as well. Raises OptionError.
        """
        roles = []
        if kind == "text":
            both = [check_type(n) for n in (self.embedding_type, self.output_type) if n is not None]
            if tied and len(set(both)) > 1:
                raise OptionError(
                    "the token embeddings of this model are its output as well: they have one type"
                )
            if self.embedding_type is not None:
                roles.append((r"^token_embd\.", self.embedding_type))
            if self.output_type is not None:
                roles.append((r"^token_embd\." if tied else r"^output\.", self.output_type))
        chosen = RECIPES[recipe_name(recipe)]
        own = chosen.text if kind == "text" else chosen.vision
        rules = [*self.tensor_types, *roles, *own, ("", chosen.base)]
        return [(pattern, check_type(name)) for pattern, name in rules]


def recipe_name(name: str) -> str:
    """The key in RECIPES that `name` means, whatever its case. Raises OptionError."""
    known = _ALIASES.get(name.upper(), name).lower()
    if known not in RECIPES:
        raise OptionError(f"the type {name!r} is unknown: it must be one of {', '.join(RECIPES)}")
    return known


def check_type(name: str) -> str:
    """The key in BLOCK that `name` means, whatever its case. Raises OptionError."""
    known = _ALIASES.get(name.upper(), name.upper())
    if known not in BLOCK:
        names = ", ".join(map(str.lower, BLOCK))
        raise OptionError(f"the tensor type {name!r} is unknown: it must be one of {names}")
    return known


def choose(name: str, width: int, rules: Sequence[Rule]) -> tuple[str, str]:
    """The type of the matrix `name` with rows of `width` values, and why it is not the wanted one.

    (Empty where it is.)
    """
    wanted = next(type_name for pattern, type_name in rules if re.search(pattern, name))
    chosen = wanted
    while width % BLOCK[chosen]:
        chosen = _NARROW.get(chosen, "F16")
    if chosen == wanted:
        return chosen, ""
    return chosen, f"not {wanted}: {width} is no multiple of {BLOCK[wanted]}"
