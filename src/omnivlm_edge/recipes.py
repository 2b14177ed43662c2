"""The names of quantizations, and which types each gives to the matrices of a vision file."""

from __future__ import annotations

from .errors import OptionError

# Name -> (type where 256 divides a matrix's rows, type where only 32 does). The first is what the
# name says; the second has blocks of 32 and about as many bits. Rows that fit neither stay F16.
RECIPES = {
    "f16": ("F16", "F16"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q6_k": ("Q6_K", "Q8_0"),
    "q5_k_m": ("Q5_K", "Q5_1"),
    "q5_k_s": ("Q5_K", "Q5_0"),
    "q5_1": ("Q5_1", "Q5_1"),
    "q5_0": ("Q5_0", "Q5_0"),
    "q4_k_m": ("Q4_K", "Q4_1"),
    "q4_k_s": ("Q4_K", "Q4_0"),
    "q4_1": ("Q4_1", "Q4_1"),
    "q4_0": ("Q4_0", "Q4_0"),
    "iq4_nl": ("IQ4_NL", "IQ4_NL"),
    "iq4_xs": ("IQ4_XS", "IQ4_NL"),
}
_ALIASES = {"fp16": "f16"}


def recipe_name(type_name: str) -> str:
    """The key in RECIPES that `type_name` means, whatever its case. Raises OptionError."""
    name = type_name.lower()
    name = _ALIASES.get(name, name)
    if name not in RECIPES:
        raise OptionError(
            f"the type {type_name!r} is unknown: it must be one of {', '.join(RECIPES)}"
        )
    return name
