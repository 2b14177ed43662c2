"""Write a test set of held-out scenes, for `omnivlm-edge eval`: pictures, questions, POPE's files.

python train/testset.py testset --split test -n 500
python train/testset.py testset-twemoji --split test -n 500 --style twemoji

Twemoji is the style that no training shows. Answers to POPE's questions are half yes, half no. The
things of the no's are random ones, the commonest of the training that the picture lacks
("popular"), or those which in the training most often stand beside what it shows ("adversarial").
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from drawings import STYLES, fetch
from errors import TrainError
from questions import questions
from scenes import SPLITS, Scene, render, sample_scene
from things import THINGS

SIZE = 252  # pixels; the model under test does its own resizing
PRIOR_SCENES = 20_000  # of the training, for what is common and what stands together
POPE = {"en": "Is there {a} {name} in the image?", "zh": "图片中有{name}吗？"}


# ---- POPE -------------------------------------------------------------------------------------


def co_occurrence(n: int = PRIOR_SCENES) -> np.ndarray:
    """int64 [K, K] over training scenes: how many show both kinds; the diagonal: how many one."""
    rng, together = np.random.default_rng(0), np.zeros((len(THINGS),) * 2, np.int64)
    for _ in range(n):
        kinds = list(sample_scene(rng, "train").counts)
        together[np.ix_(kinds, kinds)] += 1
    return together


def absent_kinds(
    scene: Scene, together: np.ndarray, rng: np.random.Generator
) -> dict[str, list[int]]:
    """For POPE's three settings: as many kinds that are not there as there are kinds that are."""
    present = list(scene.counts)

    def commonest(numbers: np.ndarray) -> list[int]:
        ranked = np.argsort(-numbers, kind="stable").tolist()
        return [kind for kind in ranked if kind not in scene.counts][: len(present)]

    return {
        "random": commonest(rng.random(len(THINGS))),
        "popular": commonest(together.diagonal()),
        "adversarial": commonest(together[present].sum(0)),
    }


def _pope_lines(pictures: list[tuple[str, list[int], list[int]]], language: str) -> Iterable[dict]:
    """POPE's records for pictures with their present and absent kinds, a yes and a no in turn."""
    number = 0
    for image, present, absent in pictures:
        for both in zip(present, absent, strict=True):
            for kind, label in zip(both, ("yes", "no"), strict=True):
                thing = THINGS[kind]
                text = POPE[language].format(a=thing.article, name=thing.names(language)[0])
                number += 1
                yield {"question_id": number, "image": image, "text": text, "label": label}


# ---- the test set -----------------------------------------------------------------------------


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def things_record() -> dict[str, dict]:
    """What objects.json says of each kind: its names, and it counted from one on, by language."""
    return {
        thing.one: {
            "names": {language: thing.names(language) for language in POPE},
            "counted": {
                language: [thing.counted(count, language) for count in range(1, 10)]
                for language in POPE
            },
        }
        for thing in THINGS
    }


def write_testset(
    folder: Path, split: str, n: int, style: str, seed: int, progress: Callable = lambda x: x
) -> None:
    """Write the test set of `n` scenes into an existing empty folder.

    The same seed draws the same scenes and questions in another style.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    together = co_occurrence()
    (folder / "images").mkdir()
    (folder / "zh").mkdir()
    scene_records, question_records = [], []
    pope: dict[str, list[tuple[str, list[int], list[int]]]] = {}
    for number in progress(range(n)):
        scene = sample_scene(rng, split)
        name = f"{number:06}.png"
        render(scene, SIZE, style).save(folder / "images" / name)
        image = f"images/{name}"
        objects = {THINGS[kind].one: count for kind, count in scene.counts.items()}
        scene_records.append(
            {"image": image, "objects": objects, "setting": scene.setting, "style": style}
        )
        for language in POPE:
            for asked in questions(scene, rng, language):
                question_records.append(
                    {
                        "id": len(question_records),
                        "image": image,
                        "kind": asked.kind,
                        "language": language,
                        "question": asked.question,
                        "answer": asked.answer,
                    }
                )
        for way, absent in absent_kinds(scene, together, rng).items():
            pope.setdefault(way, []).append((name, list(scene.counts), absent))
    _write_lines(folder / "scenes.jsonl", scene_records)
    _write_lines(folder / "questions.jsonl", question_records)
    text = json.dumps(things_record(), ensure_ascii=False, indent=1)
    (folder / "objects.json").write_text(text + "\n", encoding="utf-8")
    for way, pictures in pope.items():
        _write_lines(folder / f"pope_{way}.json", _pope_lines(pictures, "en"))
        _write_lines(folder / "zh" / f"pope_{way}.json", _pope_lines(pictures, "zh"))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("-n", "--scenes", type=int, default=500)
    parser.add_argument("--style", choices=STYLES, default="noto")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise SystemExit(f"{args.folder}: is there already; remove it, or name another folder")
    try:
        fetch(args.style)
    except TrainError as error:
        raise SystemExit(f"error: {error}") from None
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=args.folder.name, dir=args.folder.parent))
    try:
        write_testset(unfinished, args.split, args.scenes, args.style, args.seed, tqdm)
        unfinished.chmod(0o755)
        unfinished.rename(args.folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    main()
