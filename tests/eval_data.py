"""Small data sets in the published layouts of the benchmarks, of pictures that the demo knows."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
HORSES, SHOPPING = EXAMPLES / "horses.png", EXAMPLES / "shopping.png"

CAPTION = "The image shows three horses and one duck near the water."

OBJECTS = {
    "horse": {
        "names": {"en": ["horse", "horses"], "zh": ["马"]},
        "counted": {
            "en": ["one horse", "two horses", "three horses"],
            "zh": ["一匹马", "两匹马", "三匹马"],
        },
    },
    "duck": {
        "names": {"en": ["duck", "ducks"], "zh": ["鸭子"]},
        "counted": {"en": ["one duck", "two ducks"], "zh": ["一只鸭子", "两只鸭子"]},
    },
    "egg": {
        "names": {"en": ["egg", "eggs"], "zh": ["鸡蛋"]},
        "counted": {
            "en": ["one egg", "two eggs", "three eggs"],
            "zh": ["一个鸡蛋", "两个鸡蛋", "三个鸡蛋"],
        },
    },
    "sandwich": {
        "names": {"en": ["sandwich", "sandwiches"], "zh": ["三明治"]},
        "counted": {
            "en": ["one sandwich", "two sandwiches"],
            "zh": ["一个三明治", "两个三明治"],
        },
    },
    "seahorse": {
        "names": {"en": ["sea horse", "sea horses"], "zh": ["海马"]},
        "counted": {"en": ["one sea horse", "two sea horses"], "zh": ["一只海马", "两只海马"]},
    },
}


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return path


def copy_picture(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_pope(folder: Path, prefix: str = "coco_") -> Path:
    """Four questions for each sampling: about a horse and a duck, an egg and a cat."""
    asked = (("horse", "a", "yes"), ("egg", "an", "no"), ("duck", "a", "yes"), ("car", "a", "no"))
    for sampling in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": number,
                "image": "000000.png",
                "text": f"Is there {article} {thing} in the image?",
                "label": label,
            }
            for number, (thing, article, label) in enumerate(asked, 1)
        ]
        write_lines(folder / f"{prefix}pope_{sampling}.json", rows)
    copy_picture(HORSES, folder / "images" / "000000.png")
    return folder


def write_testset(folder: Path) -> Path:
    """Two scenes; the demo, which speaks English, knows most answers."""
    write_pope(folder, "")
    write_lines(
        folder / "zh" / "pope_random.json",
        [{"question_id": 1, "image": "000000.png", "text": "图中有马吗？", "label": "yes"}],
    )
    copy_picture(SHOPPING, folder / "images" / "000001.png")
    write_json(folder / "objects.json", OBJECTS)
    scenes = (
        {"image": "images/000000.png", "objects": {"horse": 3, "duck": 1}, "setting": "water"},
        {"image": "images/000001.png", "objects": {"egg": 3}, "setting": "cart"},
    )
    write_lines(folder / "scenes.jsonl", ({**scene, "style": "noto"} for scene in scenes))
    asked = (
        (0, "caption", "en", "Describe the image", CAPTION),
        (0, "description", "en", "Describe the image in detail", "Three horses stand there."),
        (0, "count", "en", "How many horses are there?", "There are three horses."),
        (0, "yesno", "en", "Is there a duck?", "Yes, there is one duck."),
        (1, "yesno", "en", "Is there a horse?", "No, there is no horse."),
        (1, "list", "en", "List everything", "Eggs."),
        (0, "where", "en", "Where is the duck?", "The duck is on the moon."),
        (0, "unanswerable", "en", "Where is the egg?", "There is no egg in the image."),
        (0, "caption", "zh", "描述这张图片", "图中有三匹马和一只鸭子，在水边。"),
    )
    rows = [
        {
            "id": number,
            "image": scenes[scene]["image"],
            "kind": kind,
            "language": language,
            "question": question,
            "answer": answer,
        }
        for number, (scene, kind, language, question, answer) in enumerate(asked)
    ]
    write_lines(folder / "questions.jsonl", rows)
    return folder


def scienceqa_problem(**changed: Any) -> dict[str, Any]:
    return {
        "question": "Which animal is it?",
        "choices": ["a horse", "a fish"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "biology",
        "category": "",
        "skill": "",
        "lecture": "",
        "solution": "",
        "split": "test",
        **changed,
    }


def write_scienceqa(folder: Path) -> Path:
    """Two questions of the test split, one of them without a picture, and one of another."""
    problems = {
        "4": scienceqa_problem(),
        "7": scienceqa_problem(
            image=None,
            hint="Ice is cold.",
            subject="language science",
            grade="grade9",
            choices=["a", "b", "c"],
            answer=2,
        ),
        "9": scienceqa_problem(split="val"),
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": ["4", "7"], "val": ["9"], "train": []})
    copy_picture(HORSES, folder / "images" / "test" / "4" / "image.png")
    return folder


def mmmu_row(subject: str, number: int, split: str = "validation", **changed: Any) -> Any:
    picture = {"bytes": HORSES.read_bytes(), "path": "horses.png"}
    return {
        "id": f"{split}_{subject}_{number}",
        "question": "What do you see in <image 1>?",
        "options": "['horses', 'cars', 'ships', \"a king's crown\"]",
        "explanation": "",
        **{f"image_{n}": picture if n == 1 else None for n in range(1, 8)},
        "img_type": "['Photographs']",
        "answer": "A",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Riding",
        **changed,
    }


def write_mmmu(folder: Path) -> Path:
    """Two subjects with two questions each; one shows two pictures, one is open."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    second = {"bytes": buffer.getvalue(), "path": None}
    rows = {
        "Art_Theory": [
            mmmu_row("Art_Theory", 1),
            mmmu_row("Art_Theory", 2, image_2=second, answer="B"),
        ],
        "Math": [
            mmmu_row("Math", 1, question_type="open", options="[]", answer="['three', '3']"),
            mmmu_row("Math", 2, answer="D"),
        ],
    }
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for subject, some in rows.items():
        names = {name: image if name.startswith("image_") else pa.string() for name in some[0]}
        (folder / subject).mkdir(parents=True)
        table = pa.Table.from_pylist(some, schema=pa.schema(names))
        pq.write_table(
            table, folder / subject / "validation-00000-of-00001.parquet", row_group_size=1
        )
    return folder


def write_mmvet(folder: Path) -> Path:
    copy_picture(HORSES, folder / "images" / "v1_0.png")
    entries = {
        f"v1_{number}": {
            "imagename": "v1_0.png",
            "question": question,
            "answer": "three<OR>3",
            "imagesource": "",
            "capability": capability,
        }
        for number, (question, capability) in enumerate(
            (("How many horses are there?", ["rec", "math"]), ("Is there a duck?", ["rec"]))
        )
    }
    write_json(folder / "mm-vet.json", entries)
    return folder


def write_chartqa(folder: Path) -> Path:
    """The whole data set's directory, with one of its splits."""
    test = folder / "test"
    asked = {
        "human": [("How many horses are there?", "3"), ("Is there a duck?", "Yes")],
        "augmented": [("Describe the image", CAPTION.upper())],
    }
    for part, pairs in asked.items():
        rows = [{"imgname": "1.png", "query": query, "label": label} for query, label in pairs]
        write_json(test / f"test_{part}.json", rows)
    copy_picture(HORSES, test / "png" / "1.png")
    return folder
