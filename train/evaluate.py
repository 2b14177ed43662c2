"""How often a model is right about held-out scenes: things that never met in its training.

python train/evaluate.py demo -o bench/results/demo_accuracy.json
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scenes import NUMBERS, SETTINGS, THINGS, Question, Scene, questions, render, sample_scene

RENDERED = 252  # pixels; the model under test does its own resizing
_NAMES = {name: kind for kind, thing in enumerate(THINGS) for name in (thing.one, thing.many)}
_COUNTED = re.compile(rf"\b({'|'.join(NUMBERS)}) ({'|'.join(sorted(_NAMES, reverse=True))})\b")


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    scene: Scene
    image: Image.Image
    asked: Question


def exam(n: int, seed: int) -> list[Item]:
    """The questions on `n` held-out scenes, scene by scene."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(n):
        scene = sample_scene(rng, held_out=True)
        image = render(scene, RENDERED)
        items += [Item(scene, image, asked) for asked in questions(scene, rng)]
    return items


def counts_in(caption: str) -> dict[int, int]:
    """The kinds a caption names, and how many of each."""
    return {_NAMES[name]: NUMBERS.index(number) for number, name in _COUNTED.findall(caption)}


def marks(item: Item, answer: str) -> dict[str, bool]:
    """What is right in an answer, by the name of the measure."""
    asked, setting = item.asked, SETTINGS[item.scene.setting]
    if asked.kind == "describe":
        counts = counts_in(answer)
        return {
            "caption_things": counts.keys() == item.scene.counts.keys(),
            "caption_counts": counts == item.scene.counts,
            "caption_setting": setting in answer,
            "caption_exact": counts == item.scene.counts and setting in answer,
        }
    if asked.kind == "yesno":
        truth = asked.answer.split(",")[0]
        right = answer.split(",")[0] == truth
        return {"yesno": right, f"yesno_{truth.lower()}": right}
    if asked.kind == "count":
        right = answer == asked.answer
        return {"count": right, f"count_{'none' if ' no ' in asked.answer else 'some'}": right}
    return {asked.kind: answer == asked.answer}


def grade(items: list[Item], answers: list[str]) -> dict[str, float]:
    """The share of right answers by measure."""
    seen: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        for name, right in marks(item, answer).items():
            seen[name].append(right)
    return {name: round(sum(right) / len(right), 4) for name, right in sorted(seen.items())}


def score(
    answer: Callable[[Image.Image, str], str], n: int = 500, seed: int = 2024
) -> dict[str, float]:
    """The share of right answers of `answer(image, question)` on `n` held-out scenes."""
    items = exam(n, seed)
    return grade(items, [answer(item.image, item.asked.question) for item in items])


def main() -> None:
    """Score a model with the runtime."""
    from omnivlm_edge import ImageEmbedding, OmniVLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, a directory of two GGUF files, or the text model's")
    parser.add_argument("--mmproj", type=Path, help="the vision file, if it lies elsewhere")
    parser.add_argument("-n", "--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("-o", "--out", type=Path, help="where to write the JSON record")
    args = parser.parse_args()

    with OmniVLM(args.model, args.mmproj) as model:
        encoded: dict[int, ImageEmbedding] = {}  # by the image's identity; the exam keeps it alive

        def answer(image: Image.Image, question: str) -> str:
            if id(image) not in encoded:
                encoded[id(image)] = model.encode(image)
            return model.answer(encoded[id(image)], question).text

        record = {
            "model": model.files.text.name,
            "mmproj": model.files.mmproj.name,
            "scenes": args.scenes,
            "seed": args.seed,
            "accuracy": score(answer, args.scenes, args.seed),
        }
    text = json.dumps(record, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
