"""`omnivlm-edge eval` as a process, with the demo model, on a small data set of every benchmark."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batch_inputs import PLACE, read_rows
from command import run
from eval_data import (
    CAPTION,
    write_chartqa,
    write_lines,
    write_mmmu,
    write_mmvet,
    write_pope,
    write_scienceqa,
    write_testset,
)


def evaluate(
    name: str, data: Path, out: Path, *options: object
) -> subprocess.CompletedProcess[str]:
    return run("eval", "demo", name, data, "-o", out, *PLACE, *options)


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


@pytest.mark.parametrize(
    ("name", "write", "n_questions", "table", "others"),
    [
        ("testset", write_testset, 22, "questions", {"failures.png"}),
        ("pope", write_pope, 12, "POPE", set()),
        ("scienceqa", write_scienceqa, 2, "accuracy", set()),
        ("mmmu", write_mmmu, 4, "accuracy", {"failures.png", "mmmu_predictions.json"}),
        ("mmvet", write_mmvet, 2, "answered", {"mm-vet_predictions.json"}),
        ("chartqa", write_chartqa, 3, "relaxed accuracy", {"failures.png"}),
    ],
)
def test_every_benchmark(
    name: str,
    write: Callable[[Path], Path],
    n_questions: int,
    table: str,
    others: set[str],
    tmp_path: Path,
) -> None:
    data, out = write(tmp_path / "data"), tmp_path / "out"
    done = evaluate(name, data, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "result.md").read_text()
    common = {"answers.jsonl", "answers.jsonl.run", "result.json", "result.md"}
    assert {path.name for path in out.iterdir()} == common | others
    result = result_of(out)
    assert (result["benchmark"], result["questions"], result["failed"]) == (name, n_questions, 0)
    assert table in result["scores"]
    assert f"**{table}**" in done.stdout
    assert all(len(result["model"][part]["sha256"]) == 64 for part in ("text", "mmproj"))
    assert result["ran"]["device"] == "CPU"
    assert {"version", "commit", "machine", "vision_precision", "threads"} < set(result["ran"])
    if "failures.png" in others:
        with Image.open(out / "failures.png") as sheet:
            assert sheet.width > 100


def test_a_question_may_show_several_pictures_or_none(tmp_path: Path) -> None:
    for name, write in (("mmmu", write_mmmu), ("scienceqa", write_scienceqa)):
        assert evaluate(name, write(tmp_path / name), tmp_path / f"{name}-out").returncode == 0
    rows = [*read_rows(tmp_path / "mmmu-out" / "answers.jsonl")]
    rows += read_rows(tmp_path / "scienceqa-out" / "answers.jsonl")
    shown = {row["key"]: row["usage"]["image_tokens"] // 9 for row in rows}
    assert shown["validation_Art_Theory_1"] == 1
    assert shown["validation_Art_Theory_2"] == 2
    assert (shown["4"], shown["7"]) == (1, 0)


def test_the_demo_scores_as_it_answers(tmp_path: Path) -> None:
    """It knows the examples; of an egg that is not there it may be wrong."""
    out = tmp_path / "out"
    assert evaluate("testset", write_testset(tmp_path / "data"), out).returncode == 0
    answers = {
        (row["key"], row["prompt"]): row["answer"] for row in read_rows(out / "answers.jsonl")
    }
    assert answers["images/000000.png", "Describe the image"] == CAPTION
    scores = result_of(out)["scores"]
    right = {name: row["accuracy"]["value"] for name, row in scores["questions"].items()}
    for kind in ("caption", "count", "yesno", "list"):
        assert right[f"{kind}, en"] == 1, kind
    denied = "no egg" in answers["images/000000.png", "Where is the egg?"]
    assert right["unanswerable, en"] == denied
    assert right["where, en"] == 0  # the test set claims that the duck is on the moon
    for sampling in ("random", "popular", "adversarial"):
        assert scores["POPE"][sampling]["F1"] == 1


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    data, out = write_testset(tmp_path / "data"), tmp_path / "out"
    some = evaluate("testset", data, out, "--limit", 5)
    assert some.returncode == 0, some.stderr
    assert result_of(out)["questions"] == 5
    assert "5 questions drawn from more" in some.stdout
    asked_before = len(read_rows(out / "answers.jsonl"))

    whole = evaluate("testset", data, out)
    assert whole.returncode == 0, whole.stderr
    assert f"{14 - asked_before} rows in" in whole.stderr
    before = result_of(out)

    answers = out / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-40])  # as after a power cut
    again = evaluate("testset", data, out)
    assert "1 rows in" in again.stderr
    assert result_of(out)["scores"] == before["scores"]

    # Nothing is asked any more, and what answered is still known.
    last = evaluate("testset", data, out)
    assert "0 rows in" in last.stderr
    assert result_of(out)["ran"] == result_of(out)["ran"] | {"device": "CPU"}
    assert last.stdout == again.stdout


def test_other_questions_or_options_need_another_directory(tmp_path: Path) -> None:
    data, out = write_pope(tmp_path / "data"), tmp_path / "out"
    assert evaluate("pope", data, out, "--limit", 1).returncode == 0
    shorter = evaluate("pope", data, out, "-n", 3)
    assert shorter.returncode == 1
    assert "was begun with another options" in shorter.stderr
    rows = [{"image": "000000.png", "text": "Is there a fish in the image?", "label": "no"}]
    write_lines(data / "coco_pope_random.json", rows)
    other = evaluate("pope", data, out)
    assert other.returncode == 1
    assert "was begun with another data" in other.stderr
    fresh = evaluate("pope", data, out, "--overwrite", "--limit", 1)
    assert fresh.returncode == 0, fresh.stderr


def test_failed_questions_count_as_wrong_until_they_are_asked_again(tmp_path: Path) -> None:
    data, out = write_chartqa(tmp_path / "data"), tmp_path / "out"
    picture = data / "test" / "png" / "1.png"
    good = picture.read_bytes()
    picture.write_bytes(good[:100])
    failed = evaluate("chartqa", data, out)
    assert failed.returncode == 3
    assert "3 of 3 questions failed, and count as wrong: --retry-errors" in failed.stdout
    assert result_of(out)["failed"] == 3
    picture.write_bytes(good)
    assert evaluate("chartqa", data, out).returncode == 3
    again = evaluate("chartqa", data, out, "--retry-errors")
    assert again.returncode == 0, again.stderr
    assert result_of(out)["failed"] == 0


def test_wrong_use_is_told_in_one_sentence(tmp_path: Path) -> None:
    data = write_pope(tmp_path / "data")
    out = tmp_path / "out"
    for arguments, code, message in (
        (("pope", tmp_path / "absent", out), 1, "absent: there is no such directory"),
        (("pope", tmp_path, out), 1, "holds no POPE files, such as coco_pope_random.json"),
        (("mmmu", data, out), 1, "holds no validation-*.parquet"),
        (("mmmu", data, out, "--split", "val"), 2, "mmmu has validation, dev, test"),
        (("pope", data, out, "--split", "random"), 2, "'random': pope has none"),
        (("pope", data, out, "--images", tmp_path), 1, "000000.png: is not there, the picture of"),
        (("gqa", data, out), 2, "'gqa' is not one of 'testset', 'pope'"),
        (("pope", data, data / "coco_pope_random.json"), 1, "cannot be written"),
    ):
        done = evaluate(*arguments)  # type: ignore[arg-type]
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert done.stdout == ""
    assert not out.exists()
