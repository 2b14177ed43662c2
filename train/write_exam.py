"""Write held-out scenes and their questions for `omnivlm-edge compare --questions`.

python train/write_exam.py exam && omnivlm-edge compare demo … --questions exam/questions.jsonl

The scenes are those of evaluate.py. Answers count only word by word here, which is stricter than
its marks: "Yes, there are two eggs." is wrong for three. Descriptions are among the questions,
because the training knows one right text for each scene.
"""

import argparse
import json
from pathlib import Path

from evaluate import exam


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", "--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    names: dict[int, str] = {}  # of the picture files, by the scene's identity
    lines = []
    for item in exam(args.scenes, args.seed):
        if id(item.scene) not in names:
            name = names[id(item.scene)] = f"{len(names):04}.png"
            item.image.save(args.folder / name)
        fields = {
            "image": names[id(item.scene)],
            "prompt": item.asked.question,
            "answer": item.asked.answer,
        }
        lines.append(json.dumps(fields) + "\n")
    (args.folder / "questions.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
