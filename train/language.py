"""The language model alone: the scenes' questions and answers in ChatML, the scene told in words.

In the picture's place stands a list of what is where, in either language whatever the question's.
So the decoder learns to look a thing up, to count and to say yes or no before it sees a picture,
and stage 1 has only to make image tokens say what the list says.
"""

from pathlib import Path

import torch
from numpy.random import Generator
from tokenizers import Tokenizer

from answers import AnswerTask
from config import Config
from data import Batches, Example, Rows, Scenes
from loop import stage_main, train
from model import OmniVLM, new_model, replace_folder
from questions import Question
from scenes import Scene
from things import COLOURS, SETTINGS, THINGS
from tokenizer import HEAD, get_tokenizer

LIST_TOKENS = 128  # at most, for the list
ROWS = {"en": ("top", "middle", "bottom"), "zh": ("上", "中", "下")}
COLUMNS = {"en": ("left", "middle", "right"), "zh": ("左", "中", "右")}

SIZES = {"en": ("small", "", "large"), "zh": ("小", "", "大")}


def in_words(scene: Scene, rng: Generator, language: str) -> str:
    """As in "on the grass; top left: small red butterfly; middle right: horse", in random order."""
    said = [getattr(SETTINGS[scene.setting], language)]
    for thing in scene.placed:
        place = f"{ROWS[language][thing.row]} {COLUMNS[language][thing.column]}"
        colour = scene.colour(thing.kind)
        words = (
            SIZES[language][1 + scene.size(thing.kind)],
            colour if language == "en" else COLOURS.get(colour, ""),
            THINGS[thing.kind].one if language == "en" else THINGS[thing.kind].chinese,
        )
        said.append(f"{place}: {' '.join(filter(None, words))}")
    return "; ".join(said[i] for i in rng.permutation(len(said)))


class TextRows:
    """Example n: the words of scene n and questions about it."""

    def __init__(self, config: Config, tokenizer: Tokenizer, split: str) -> None:
        home_share = config.language.home_share
        self.scenes = Scenes(config, 0, split, stream=1, home_share=home_share)
        self.rows = Rows(tokenizer, 0)
        self.head = self.rows.encode(HEAD)
        self.tokens = LIST_TOKENS + config.data.tokens

    def checked(self, index: int) -> tuple[Example, list[Question]]:
        """The example, and the pairs that found room in it."""
        scene, rng = self.scenes.scene(index)
        words = in_words(scene, rng, str(rng.choice(self.scenes.languages)))
        listed = self.rows.encode(words)[:LIST_TOKENS]
        pairs = self.scenes.asked(scene, rng)
        return self.rows.row((*self.head, *listed), pairs, self.tokens - len(listed))

    def __call__(self, index: int) -> Example:
        return self.checked(index)[0]


class LanguageTask(AnswerTask):
    """Only the decoder, which is all that is exported."""

    def __init__(self, model: OmniVLM, config: Config) -> None:
        held_out = TextRows(config, model.tokenizer, "validation")
        checks = [held_out.checked(i) for i in range(config.language.validation)]
        super().__init__(model, ("language_model",), config, config.language, checks)

    def export(self, folder: Path) -> None:
        """The decoder in transformers' format."""
        fresh = folder.with_name(folder.name + ".tmp")
        self.model.language_model.save_pretrained(fresh)
        replace_folder(fresh, folder)


def run(config: Config, out: Path) -> None:
    """Train the language model, unless it is there or comes from a checkpoint."""
    folder = out / "language"
    if config.text.checkpoint or (folder / "model").exists():
        return
    torch.manual_seed(config.seed + 1)
    model = new_model(config, get_tokenizer(config, out))
    batches = Batches(TextRows(config, model.tokenizer, "train"), config.language.batch)
    train(LanguageTask(model, config), batches, config, config.language, folder)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
