"""A Qwen2-style byte-level BPE tokenizer, trained on the sentences of the scenes."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from config import Config
from errors import TrainError
from questions import questions
from scenes import sample_scene
from things import COLOURS, NUMBERS, THINGS

SYSTEM = "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant."
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n\n<|vision_start|>"
QUESTION = "<|vision_end|>{question}<|im_end|>"
ANSWER = "\n<|im_start|>assistant\n{answer}<|im_end|>"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
FILES = ("tokenizer.json", "tokenizer_config.json")
# The split of Qwen2: contractions, words with a leading space, single digits, punctuation, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# Chinese has no spaces: cut before and after these, no token becomes "两只兔子", which held-out
# numbers of rabbits would never have come in.
CHINESE = sorted(
    {thing.chinese for thing in THINGS}
    | {thing.measure for thing in THINGS}
    | {*NUMBERS["zh"], *COLOURS.values(), *"有在的是和大小左右上下中边我你"},
    key=len,
    reverse=True,
)
CUT = re.compile(f"({'|'.join(CHINESE)})")


def words(text: str) -> list[str]:
    """The text, cut around the words of `CHINESE`."""
    return [word for word in CUT.split(text) if word]


def corpus(languages: tuple[str, ...], scenes: int = 4000) -> Iterator[str]:
    """Questions and answers on random scenes, in words, and the words of the prompt."""
    rng = np.random.default_rng(0)
    for _ in range(scenes):
        scene = sample_scene(rng, "train")
        for language in languages:
            for asked in questions(scene, rng, language):
                yield from words(asked.question)
                yield from words(asked.answer)
    yield from [f"system\n{SYSTEM}\nuser\n\nassistant\n"] * 100


def train_tokenizer(vocabulary: int, languages: tuple[str, ...]) -> Tokenizer:
    """Learn the merges; the special tokens take the last ids, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(languages), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def get_tokenizer(config: Config, out: Path) -> Tokenizer:
    """The decoder checkpoint's, or that of `out`, which is trained at the first call."""
    folder = Path(config.text.checkpoint) if config.text.checkpoint else out / "tokenizer"
    with PartialState().main_process_first():  # the others find it
        if not config.text.checkpoint and not folder.exists():
            fresh = folder.with_name("tokenizer.tmp")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            save_tokenizer(train_tokenizer(config.text.vocabulary, config.data.languages), fresh)
            fresh.rename(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILES[0]))
    except Exception as error:  # the library's own kind of error
        raise TrainError(f"{folder}/{FILES[0]} cannot be read: {error}") from error
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise TrainError(f"{folder}/{FILES[0]} has no token {missing[0]}; take Qwen2.5's own")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, source: str = "") -> None:
    """Write tokenizer.json and tokenizer_config.json, or copy those of the folder `source`."""
    if source:
        for name in FILES:
            shutil.copyfile(Path(source) / name, folder / name)
        return
    tokenizer.save(str(folder / FILES[0]))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 1024,
        "additional_special_tokens": list(SPECIAL[1:]),
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for text in SPECIAL
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / FILES[1]).write_text(json.dumps(config, indent=2) + "\n")
