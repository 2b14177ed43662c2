"""tokenizer.json, or vocab.json with merges.txt -> the vocabulary that a GGUF file holds.

The runtime has its own Qwen2 tokenizer (byte-level BPE behind a fixed regular expression), so a
tokenizer that would cut text differently is refused here instead of answering nonsense later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from ..errors import ConvertError
from .config import Section, read_json, read_optional_json

FAST = "tokenizer.json"
SLOW = ("vocab.json", "merges.txt")
SETTINGS = "tokenizer_config.json"

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges by rank, and the ids with a meaning of their own."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    eos: int
    pad: int | None = None
    bos: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class _Added:
    """A token that is found in the text before BPE begins."""

    content: str
    special: bool


def byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's choice)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def read_vocabulary(checkpoint: Path, size: int, eos_default: int | None) -> Vocabulary:
    """`size` is the number of embedding rows; `eos_default` is config.json's id, if it has one."""
    settings = read_optional_json(checkpoint / SETTINGS)
    settings.only("tokenizer_class", "Qwen2Tokenizer", "Qwen2TokenizerFast", None)
    if (checkpoint / FAST).exists():
        where, (vocab, merges, added) = checkpoint / FAST, _read_fast(checkpoint / FAST)
    elif all((checkpoint / name).exists() for name in SLOW):
        where, (vocab, merges, added) = checkpoint / SLOW[0], _read_slow(checkpoint, settings)
    else:
        raise ConvertError(
            f"{checkpoint} has neither {FAST} nor {' with '.join(SLOW)}; "
            "take the tokenizer files from the original model"
        )
    _check_bpe(where, vocab, merges)
    tokens, types = _by_id(where, vocab, added, size)
    ids = vocab | {token.content: i for i, token in added.items()}
    eos = _special(settings, "eos_token", ids)
    if eos is None:
        eos = eos_default
    if eos is None or not 0 <= eos < size:
        raise ConvertError(f"{settings.where}: no eos_token says where an answer ends")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        eos=eos,
        pad=_special(settings, "pad_token", ids),
        bos=_special(settings, "bos_token", ids),
        chat_template=_chat_template(checkpoint, settings),
    )


def _read_fast(path: Path) -> tuple[dict[str, int], list[str], dict[int, _Added]]:
    root = read_json(path)
    model = root.section("model")
    model.only("type", "BPE")
    model.only("byte_fallback", False, None)
    model.only("ignore_merges", False, None)
    model.only("continuing_subword_prefix", "", None)
    model.only("end_of_word_suffix", "", None)
    _check_split(root)
    entries = root.items("added_tokens") if root.values.get("added_tokens") else []
    added = dict(_added(entry, path, None) for entry in entries)
    joined = [" ".join(merge) if _is_pair(merge) else merge for merge in model.items("merges")]
    return dict(model.section("vocab").values), joined, added


def _read_slow(
    checkpoint: Path, settings: Section
) -> tuple[dict[str, int], list[str], dict[int, _Added]]:
    """These files carry no regular expression: their class, Qwen2Tokenizer, has it built in."""
    vocab, merges_file = (checkpoint / name for name in SLOW)
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as exc:
        raise ConvertError(f"{merges_file} cannot be read: {exc}") from exc
    merges = [line for line in lines if line and not line.startswith("#version")]
    added: dict[int, _Added] = {}
    if "added_tokens_decoder" in settings.values:
        for key, entry in settings.section("added_tokens_decoder").values.items():
            added.update([_added(entry, checkpoint / SETTINGS, key)])
    return dict(read_json(vocab).values), merges, added


def _added(entry: Any, where: Path, key: str | None) -> tuple[int, _Added]:
    """One added token; its id stands in the entry, or is the entry's key."""
    try:
        token_id = int(entry["id"] if key is None else key)
        content, special = entry["content"], entry.get("special", False)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ConvertError(f"{where}: {entry!r} is not an added token") from exc
    if not isinstance(content, str) or not content or not isinstance(special, bool):
        raise ConvertError(f"{where}: {entry!r} is not an added token")
    return token_id, _Added(content, special)


def _check_split(root: Section) -> None:
    """The text must be cut as the runtime cuts it: Qwen2's expression, then bytes."""
    steps = root.section("pre_tokenizer")
    steps.only("type", "Sequence")
    parts = steps.items("pretokenizers")
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if kinds != ["Split", "ByteLevel"]:
        raise ConvertError(f"{steps.where} is {kinds}, but Qwen2's is ['Split', 'ByteLevel']")
    split, byte_level = (Section(part, steps.where) for part in parts)
    split.only("behavior", "Isolated")
    split.only("invert", False)
    byte_level.only("add_prefix_space", False)
    byte_level.only("use_regex", False)
    if split.present("pattern") != {"Regex": QWEN2_SPLIT}:
        raise ConvertError(
            f"{steps.where} splits text by {split.values['pattern']!r}, which is not Qwen2's "
            "expression; the runtime would tokenise differently"
        )
    if root.values.get("normalizer") is not None:
        root.section("normalizer").only("type", "NFC")


def _check_bpe(where: Path, vocab: dict[str, Any], merges: list[Any]) -> None:
    alphabet = set(byte_alphabet().values())
    for character in sorted(alphabet):
        if character not in vocab:
            raise ConvertError(f"{where} has no token for the byte written {character!r}")
    if not merges:
        raise ConvertError(f"{where} has no merges, so it is not a BPE tokenizer")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else ()
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ConvertError(f"{where}: the merge {merge!r} does not join two known tokens")


def _by_id(
    where: Path, vocab: dict[str, Any], added: dict[int, _Added], size: int
) -> tuple[list[str], list[TokenType]]:
    """Tokens and types in the order of the embedding rows; rows without a token are padding."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for text, token_id in _entries(vocab, added):
        if type(token_id) is not int or not 0 <= token_id < size:
            raise ConvertError(
                f"{where}: the token {text!r} has the id {token_id!r}, but there are "
                f"{size} embeddings"
            )
        if types[token_id] is not TokenType.UNUSED and tokens[token_id] != text:
            raise ConvertError(
                f"{where}: {text!r} and {tokens[token_id]!r} have the same id {token_id}"
            )
        tokens[token_id], types[token_id] = text, TokenType.NORMAL
    for token_id, token in added.items():
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    alphabet = set(byte_alphabet().values())
    for text, kind in zip(tokens, types, strict=True):
        if kind is TokenType.NORMAL and not alphabet.issuperset(text):
            raise ConvertError(f"{where}: the token {text!r} is not written in byte characters")
    return tokens, types


def _entries(vocab: dict[str, Any], added: dict[int, _Added]) -> Iterable[tuple[str, Any]]:
    yield from vocab.items()
    yield from ((token.content, token_id) for token_id, token in added.items())


def _special(settings: Section, key: str, ids: dict[str, int]) -> int | None:
    """The id of a token that the settings name, by its text or by an object around it."""
    value = settings.values.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if not isinstance(text, str) or text not in ids:
        raise ConvertError(f"{settings.where}: {key} is {text!r}, which is not in the vocabulary")
    return ids[text]


def _chat_template(checkpoint: Path, settings: Section) -> str | None:
    file = checkpoint / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as exc:
            raise ConvertError(f"{file} cannot be read: {exc}") from exc
    template = settings.values.get("chat_template")
    return template if isinstance(template, str) else None


def _is_pair(merge: Any) -> bool:
    return isinstance(merge, list) and all(isinstance(part, str) for part in merge)
