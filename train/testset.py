"""Write a test set of held-out scenes, for `omnivlm-edge eval`: pictures, questions, POPE's files.

python train/testset.py testset --split test -n 500
python train/testset.py testset-twemoji --split test -n 500 --style twemoji

The second style's drawings are Twemoji's (CC-BY 4.0), from an npm package of fixed version and
digest, which `npm pack` fetches. Answers to POPE's questions are half yes, half no. The things of
the no's are random ones, the commonest of the training that the picture lacks ("popular"), or
those which in the training most often stand beside what it shows ("adversarial").
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import scenes
from questions import questions
from scenes import SPLITS, STYLES, Scene, render, sample_scene, twemoji_name
from things import THINGS

SIZE = 252  # pixels; the model under test does its own resizing
PRIOR_SCENES = 20_000  # of the training, for what is common and what stands together
PACKAGE = "emoji-datasource-twitter@16.0.0"
SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
POPE = {
    "en": ("Is there {a} {name} in the image?", "yes", "no"),
    "zh": ("图片中有{name}吗？", "yes", "no"),
}


# ---- the second style -------------------------------------------------------------------------


def fetch_drawings(archive: Path | None) -> None:
    """Put the drawings of the second style where scenes.py looks for them, unless they are there.

    Takes them from `archive`, or from the npm registry. SystemExit says what to do if it cannot.
    """
    if scenes.TWEMOJI.exists():
        return
    scenes.TWEMOJI.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scenes.TWEMOJI.parent) as name:
        folder = Path(name)
        archive = archive or _npm_pack(folder)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise SystemExit(
                f"{archive}: is not npm's {PACKAGE} (its sha256 is {digest}, not {SHA256}); "
                "get it with `npm pack`"
            )
        (folder / "drawings").mkdir()
        unpack_drawings(archive, folder / "drawings")
        (folder / "drawings").rename(scenes.TWEMOJI)


def _npm_pack(folder: Path) -> Path:
    """The package's archive, fetched into the folder."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{PACKAGE} cannot be fetched ({error}): run `npm pack {PACKAGE}` where npm works "
            "and give the file to --archive"
        ) from error
    return next(folder.glob("*.tgz"))


def unpack_drawings(archive: Path, folder: Path) -> None:
    """Write the drawing of every thing from the package's archive; SystemExit if one lacks."""
    wanted = {twemoji_name(thing.emoji) for thing in THINGS}
    with tarfile.open(archive) as package:
        for member in package:
            # "2602-fe0f.png": the variation selector asks for the coloured picture of ☂
            name = Path(member.name).name.replace("-fe0f", "")
            if Path(member.name).parent.name == "64" and name in wanted:
                file = package.extractfile(member)
                assert file is not None  # a picture is a regular file
                (folder / name).write_bytes(file.read())
                wanted.remove(name)
    if wanted:
        raise SystemExit(f"{archive}: has no drawing {', '.join(sorted(wanted))}")


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
    template, yes, no = POPE[language]
    number = 0
    for image, present, absent in pictures:
        for both in zip(present, absent, strict=True):
            for kind, label in zip(both, (yes, no), strict=True):
                name = THINGS[kind].names(language)[0]
                text = template.format(a="an" if name[0] in "aeiou" else "a", name=name)
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
    parser.add_argument("--archive", type=Path, help=f"npm's {PACKAGE}, if it is there already")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise SystemExit(f"{args.folder}: is there already; remove it, or name another folder")
    if args.style == "twemoji":
        fetch_drawings(args.archive)
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
