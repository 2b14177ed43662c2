"""How benchmarks are read and scored: every rule on examples that were worked out by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval_data import (
    HORSES,
    OBJECTS,
    mmmu_row,
    scienceqa_problem,
    write_chartqa,
    write_json,
    write_lines,
    write_mmmu,
    write_mmvet,
    write_pope,
    write_scienceqa,
    write_testset,
)
from omnivlm_edge import OmniVLMError, OptionError
from omnivlm_edge.compare import read_questions
from omnivlm_edge.evaluation import (
    BENCHMARKS,
    chartqa,
    find_benchmark,
    mmmu,
    mmvet,
    pope,
    scienceqa,
    testset,
)
from omnivlm_edge.evaluation.benchmark import Question, Share, guessed, opened, tally
from omnivlm_edge.evaluation.failures import SIDE, draw_sheet
from omnivlm_edge.evaluation.run import check_pictures, choose, count, pending, report


def values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: v.value if isinstance(v, Share) else v for name, v in row.items()}


def read(name: str, data: Path, images: Path | None = None, split: str = "") -> list[Question]:
    benchmark = find_benchmark(name)
    return benchmark.read(data, images, split or (benchmark.splits or ("",))[0])


# ---- shares -------------------------------------------------------------------------------------


def test_wilson_intervals() -> None:
    """Checked with the formula by hand; 5 and 1 of 10 stand in many textbooks."""
    for share, low, high in (
        (Share(5, 10), 0.2366, 0.7634),
        (Share(1, 10), 0.0179, 0.4042),
        (Share(0, 1), 0.0, 0.7935),  # z^2 / (1 + z^2) with z^2 = 3.8415
        (Share(1, 1), 0.2065, 1.0),
        (Share(950, 1000), 0.9347, 0.9618),
    ):
        assert share.interval == pytest.approx((low, high), abs=1e-4)
    assert Share(0, 0).value is None
    assert Share(0, 0).interval is None


def test_tally_counts_a_mark_in_each_of_its_groups() -> None:
    table = tally([(["b", "all"], True), (["a", "all"], False), (["b", "all"], False)], ["all"])
    assert list(table) == ["all", "b", "a"]
    assert table["all"]["accuracy"] == Share(1, 3)
    assert table["b"]["accuracy"] == Share(1, 2)


# ---- POPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "language", "yes"),
    [
        ("Yes, there is one duck.", "en", True),
        ("No.", "en", False),
        ("no, nothing of that kind", "en", False),
        ("There is not a dog.", "en", False),
        ("Yes. There is no doubt.", "en", True),  # the first sentence decides
        ("Nothing", "en", True),  # the original knows three words only
        ("", "en", True),
        ("是的，没错，有一匹马。", "zh", True),
        ("没错。", "zh", True),
        ("有，图中没有别的。", "zh", True),
        ("没有，图中没有马。", "zh", False),
        ("图片中，没有马。", "zh", False),
        ("不，那是鸭子。", "zh", False),
        ("No, there is none.", "zh", False),  # a Chinese question, answered in English
    ],
)
def test_yes_and_no(answer: str, language: str, yes: bool) -> None:
    assert pope.says_yes(answer, language) is yes


def ask_pope(labels: str, group: str = "random", language: str = "en") -> list[Question]:
    facts = {"group": group, "language": language}
    words = {"y": "yes", "n": "no"}
    return [Question(str(i), "k", (), "?", words[c], facts) for i, c in enumerate(labels)]


def test_pope_scores() -> None:
    """Two hits, one miss, one false alarm, one rightly denied; then all that failed is wrong."""
    answers = ["Yes", "Yes.", "No", "Yes", "no"]
    scores = pope.score(ask_pope("yyynn"), answers)
    assert values(scores.tables["POPE"]["random"]) == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes rate": 3 / 5}
    )
    assert scores.wrong == [2, 3]
    failed = pope.score(ask_pope("yn"), [None, None])
    assert values(failed.tables["POPE"]["random"]) == {
        "accuracy": 0,
        "precision": 0,
        "recall": 0,
        "F1": 0,
        "yes rate": 0.5,
    }
    never = pope.score(ask_pope("yn"), ["No", "No"]).tables["POPE"]["random"]
    assert values(never) == {
        "accuracy": 0.5,
        "precision": None,
        "recall": 0,
        "F1": 0,
        "yes rate": 0,
    }


def test_pope_means_the_three_samplings() -> None:
    """F1 of 1, 2/3 (one hit, one false alarm) and 0."""
    questions = [q for name in pope.SAMPLINGS for q in ask_pope("yn", name)]
    answers = ["Yes", "No", "Yes", "Yes", "No", "No"]
    table = pope.score(questions, answers).tables["POPE"]
    assert values(table["mean of the three"]) == pytest.approx({"F1": (1 + 2 / 3 + 0) / 3})


def test_pope_files(tmp_path: Path) -> None:
    write_pope(tmp_path / "pope")
    questions = read("pope", tmp_path / "pope")
    assert [q.facts["group"] for q in questions] == [s for s in pope.SAMPLINGS for _ in range(4)]
    assert questions[0].prompt == "Is there a horse in the image?"
    assert questions[0].pictures == (tmp_path / "pope" / "images" / "000000.png",)
    assert count(questions) == 4  # the same for all three samplings
    chinese = tmp_path / "pope" / "zh"
    row = {"image": "000000.png", "text": "图中有马吗？", "label": "yes"}
    write_lines(chinese / "pope_random.json", [row])
    (found,) = read("pope", chinese, tmp_path / "pope" / "images")
    assert (found.facts["group"], found.facts["language"]) == ("random, zh", "zh")
    assert len(read("pope", tmp_path / "pope")) == 13
    elsewhere = read("pope", tmp_path / "pope", tmp_path)
    with pytest.raises(OptionError, match=r"000000.png: is not there, .*--images"):
        check_pictures(elsewhere)
    write_pope(tmp_path / "pope", "gqa_")
    with pytest.raises(OptionError, match=r"holds coco_pope_random.json and gqa_pope_random.json"):
        read("pope", tmp_path / "pope")


# ---- ChartQA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("14", "14.6", True),  # 4.1 % off
        ("13.8", "14.6", False),  # 5.5 % off
        ("95", "100", True),
        ("105", "100", True),
        ("105.1", "100", False),
        ("-5", "5", False),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("yes", "Yes", True),
        (" Yes ", "Yes", True),
        ("Yes.", "Yes", False),
        ("0", "0", True),
        ("0.01", "0", False),  # of zero nothing is a share
        ("about 14", "14", False),
        ("light blue", "Light Blue", True),
    ],
)
def test_relaxed_accuracy(answer: str, truth: str, right: bool) -> None:
    assert chartqa.is_right(answer, truth) is right


def test_chartqa_files(tmp_path: Path) -> None:
    data = write_chartqa(tmp_path / "ChartQA Dataset")
    questions = read("chartqa", data)
    assert questions == read("chartqa", data / "test")
    assert [q.facts["part"] for q in questions] == ["human", "human", "augmented"]
    assert questions[0].prompt == f"How many horses are there?\n{chartqa.SHORT_ANSWER}"
    scores = chartqa.score(questions, ["3.1", "No", None])
    assert {name: values(row) for name, row in scores.tables["relaxed accuracy"].items()} == {
        "human": {"accuracy": 1 / 2},
        "augmented": {"accuracy": 0},
        "all": {"accuracy": 1 / 3},
    }
    assert scores.wrong == [1, 2]


# ---- ScienceQA ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "n_choices", "choice"),
    [
        ("A", 2, 0),
        ("B.", 2, 1),
        ("(B) a fish", 2, 1),
        ("B: a fish", 2, 1),
        ("C", 2, None),  # there are two choices
        ("The answer is B.", 2, 1),
        ("I think that the answer is (A), for it swims", 2, 0),
        ("A horse", 2, None),  # an article
        ("a horse", 2, None),
        ("", 2, None),
    ],
)
def test_choices_of_scienceqa(answer: str, n_choices: int, choice: int | None) -> None:
    assert scienceqa.chosen(answer, n_choices) == choice


def test_scienceqa_files_and_breakdown(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    first, second = read("scienceqa", tmp_path)
    assert first.pictures == (tmp_path / "images" / "test" / "4" / "image.png",)
    assert first.prompt == (
        "Context: N/A\nQuestion: Which animal is it?\nOptions: (A) a horse (B) a fish\n"
        f"{scienceqa.LETTER_ANSWER}"
    )
    assert second.pictures == ()
    assert second.prompt.startswith("Context: Ice is cold.\n")
    assert [q.id for q in read("scienceqa", tmp_path, split="val")] == ["9"]
    scores = scienceqa.score([first, second], ["A", "What?"])
    drawn = guessed("7", range(second.facts["choices"])) == second.facts["answer"]
    assert {name: values(row)["accuracy"] for name, row in scores.tables["accuracy"].items()} == {
        "natural science": 1,
        "language science": drawn,
        "text context": drawn,
        "image context": 1,
        "grades 1-6": 1,
        "grades 7-12": drawn,
        "all": (1 + drawn) / 2,
    }
    assert scores.notes == [
        "1 of 2 answers name no choice: one was drawn for them, as the benchmark's rules say"
    ]
    assert scienceqa.score([first, second], ["A", None]).notes == []


def test_no_context_is_neither_text_nor_picture(tmp_path: Path) -> None:
    write_json(tmp_path / "problems.json", {"1": scienceqa_problem(image=None)})
    write_json(tmp_path / "pid_splits.json", {"test": ["1"]})
    (question,) = read("scienceqa", tmp_path)
    assert question.facts["groups"] == ["natural science", "no context", "grades 1-6", "all"]


# ---- MMMU ---------------------------------------------------------------------------------------

CHOICES = {"A": "horses", "B": "cars", "C": "ships", "D": "a king's crown"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("The answer is (B).", "B"),
        ("A or B", "B"),  # the last one
        ("(A) is wrong, so C", "A"),  # brackets count first
        ("(C), not (A), no, (B)", "B"),
        ("It must be the ships that sail on", "C"),  # more than five words
        ("not the cars, but rather a King's crown", "D"),
        ("ships", None),  # too short for that
        ("a horse", None),
        ("", None),
    ],
)
def test_choices_of_mmmu(answer: str, letter: str | None) -> None:
    assert mmmu.chosen(answer, CHOICES) == letter


@pytest.mark.parametrize(
    ("answer", "truths", "right"),
    [
        ("3,500", ["3500"], True),
        ("The answer is 3,500.00 dollars.", ["3500"], True),
        ("So x = 12.344", ["12.34"], True),  # numbers count to two decimals
        ("So x = 12.346", ["12.34"], False),
        ("It is three horses", ["three", "3"], True),
        ("5", ["three", "3"], False),
        ("about 1e3 of them", ["1000"], True),
        ("c", ["C"], True),
        ("cat", ["c"], False),  # a letter alone is no part of a word
        ("The result is Paris", ["paris"], True),
        ("First 7.\nthus it is 8", ["7"], False),  # what a sentence leads to counts
        ("First 7.\nthus it is 8", ["8"], True),
        ("", ["8"], False),
    ],
)
def test_open_answers_of_mmmu(answer: str, truths: list[str], right: bool) -> None:
    assert mmmu.is_right_open(answer, truths) is right


def test_mmmu_files_and_scores(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    questions = read("mmmu", tmp_path)
    assert [q.id for q in questions] == [
        "validation_Art_Theory_1",
        "validation_Art_Theory_2",
        "validation_Math_1",
        "validation_Math_2",
    ]
    assert [len(q.pictures) for q in questions] == [1, 2, 1, 1]
    first, second = map(opened, questions[1].pictures)
    assert first == HORSES.read_bytes()
    assert isinstance(second, bytes)
    assert Image.open(io.BytesIO(second)).size == (30, 20)
    assert questions[0].prompt == (
        "What do you see in <image 1>?\n\n(A) horses\n(B) cars\n(C) ships\n(D) a king's crown\n\n"
        f"{scienceqa.LETTER_ANSWER}"
    )
    assert questions[2].prompt == f"What do you see in <image 1>?\n\n{chartqa.SHORT_ANSWER}"
    assert questions[2].truth == "three or 3"

    scores = mmmu.score(questions, ["A", "(A)", "I see 3 of them", None])
    assert {name: values(row)["accuracy"] for name, row in scores.tables["accuracy"].items()} == {
        "all": 0.5,
        "Art and Design": 0.5,
        "Art_Theory": 0.5,
        "Science": 0.5,
        "Math": 0.5,
    }
    assert scores.wrong == [1, 3]
    assert scores.files[mmmu.PREDICTIONS] == {
        "validation_Art_Theory_1": "A",
        "validation_Art_Theory_2": "A",
        "validation_Math_1": "I see 3 of them",
        "validation_Math_2": "",
    }


def test_what_chooses_nothing_is_guessed_and_told(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    questions = read("mmmu", tmp_path)[:2]
    scores = mmmu.score(questions, ["?", "?"])
    assert scores.files == mmmu.score(questions, ["?", "?"]).files
    assert set(scores.files[mmmu.PREDICTIONS].values()) <= set(CHOICES)
    assert scores.notes[0].startswith("2 of 2 answers choose nothing")


def test_mmmu_as_json_and_without_public_answers(tmp_path: Path) -> None:
    row = mmmu_row("Music", 1, "test", image_1="a.png", answer="?")
    write_json(tmp_path / "Music" / "test.json", [row])
    (question,) = read("mmmu", tmp_path, split="test")
    assert question.pictures == (tmp_path / "Music" / "a.png",)
    scores = mmmu.score([question], ["(C)"])
    assert scores.tables == {}
    assert "not public" in scores.notes[0]
    assert scores.files[mmmu.PREDICTIONS] == {"test_Music_1": "C"}


# ---- MM-Vet -------------------------------------------------------------------------------------


def test_mmvet_writes_what_its_judge_takes(tmp_path: Path) -> None:
    write_mmvet(tmp_path)
    questions = read("mmvet", tmp_path)
    assert questions[0].pictures == (tmp_path / "images" / "v1_0.png",)
    scores = mmvet.score(questions, ["Three.", None])
    assert scores.files == {mmvet.PREDICTIONS: {"v1_0": "Three.", "v1_1": ""}}
    assert scores.tables["answered"] == {
        "all": {"questions": 2, "answered": 1},
        "rec": {"questions": 2, "answered": 1},
        "math": {"questions": 1, "answered": 1},
    }
    assert "judge" in scores.notes[0]


# ---- the generated test set ---------------------------------------------------------------------

ENGLISH, CHINESE = (testset.Vocabulary(OBJECTS, language) for language in ("en", "zh"))


def test_names_in_texts() -> None:
    assert ENGLISH.mentions("A sea horse and Three horses.") == [("seahorse", 1), ("horse", 3)]
    assert ENGLISH.mentions("horsepower, one horseshoe") == []
    assert CHINESE.mentions("海马和一匹马。") == [("seahorse", None), ("horse", 1)]
    assert ENGLISH.counts("two eggs, two eggs and a duck") == {"egg": 2, "duck": 1}
    assert ENGLISH.counts("two eggs, one egg") == {"egg": -1}
    assert CHINESE.numbers("一个三明治") == {1}
    assert ENGLISH.numbers("There are 12 ducks, and no eggs.") == {12, 0}


@pytest.mark.parametrize(
    ("rule", "words", "truth", "answer", "right"),
    [
        ("caption", ENGLISH, "", "The image shows one duck and three horses.", True),
        ("caption", ENGLISH, "", "The image shows two ducks and three horses.", False),
        ("caption", ENGLISH, "", "3 horses and a duck.", True),
        ("caption", ENGLISH, "", "2 horses and a duck.", False),
        ("caption", ENGLISH, "", "The image shows three horses.", False),
        ("caption", ENGLISH, "", "Three horses, one duck and one egg.", False),
        ("caption", ENGLISH, "", "Three horses, one duck and an egg.", False),
        ("caption", CHINESE, "", "图中有一只鸭子和三匹马。", True),
        ("count", ENGLISH, "There are three horses.", "3", True),
        ("count", ENGLISH, "There are three horses.", "There are three ducks.", False),
        ("count", ENGLISH, "There are three horses.", "Two.", False),
        ("count", ENGLISH, "There are no eggs.", "None.", True),
        ("count", ENGLISH, "There is one duck.", "Lots.", False),
        ("count", CHINESE, "有三匹马。", "三匹", True),
        ("count", CHINESE, "没有三明治。", "有一个三明治。", False),
        ("yesno", ENGLISH, "No, there is no egg.", "No, there are two.", True),
        ("yesno", ENGLISH, "No, there is no egg.", "Yes.", False),
        ("yesno", CHINESE, "没有，图中没有鸡蛋。", "没有。", True),
        ("where", ENGLISH, "At the top left.", "at the  top left", True),
        ("where", ENGLISH, "At the top left.", "at the top right", False),
        ("colour", CHINESE, "红色。", "红色", True),
        ("list", ENGLISH, "", "Ducks and horses.", True),
        ("list", ENGLISH, "", "Ducks, horses and eggs.", False),
        ("unanswerable", ENGLISH, "There is no egg.", "I cannot tell: no egg.", True),
        ("unanswerable", ENGLISH, "There is no egg.", "There isn't one.", True),
        ("unanswerable", ENGLISH, "There is no egg.", "At the top left.", False),
        ("unanswerable", ENGLISH, "There is no egg.", "The horse is not on the left.", False),
        ("unanswerable", CHINESE, "图中没有鸡蛋。", "图里没有。", True),
    ],
)
def test_rules_of_the_test_set(
    rule: str, words: testset.Vocabulary, truth: str, answer: str, right: bool
) -> None:
    asked = testset.Asked(words, {"horse": 3, "duck": 1}, truth)
    assert testset.RULES[rule](asked, answer) is right


def test_chair() -> None:
    """Three kinds named, one of them not there, in one of two descriptions; two of four seen."""
    found = testset.chair([({"horse", "duck"}, {"horse", "egg"}), ({"egg"}, {"egg", "duck"})])
    assert values(found) == pytest.approx(
        {"CHAIR_s": 1 / 2, "CHAIR_i": 1 / 3, "recall": 2 / 4, "objects": 1.5, "hallucinated": 0.5}
    )


def test_test_set_files_and_scores(tmp_path: Path) -> None:
    write_testset(tmp_path)
    questions = read("testset", tmp_path)
    assert len(questions) == 9 + 3 * 4 + 1
    compared = read_questions(tmp_path / "questions.jsonl")  # as `compare --questions` does
    assert [(q.image, q.prompt) for q in compared] == [
        (q.pictures[0], q.prompt) for q in questions[:9]
    ]
    check_pictures(questions)
    assert {q.key for q in questions} == {"images/000000.png", "images/000001.png"}
    scores = testset.score(questions, [question.truth for question in questions])
    for name, group, measure in (
        ("questions", "caption, en", "accuracy"),
        ("questions", "caption, zh", "word by word"),
        ("questions", "unanswerable, en", "accuracy"),
        ("descriptions", "description, en", "CHAIR_s"),
        ("POPE", "adversarial", "accuracy"),
        ("POPE", "random, zh", "accuracy"),
    ):
        wanted = 0 if measure == "CHAIR_s" else 1
        assert values(scores.tables[name][group])[measure] == wanted, (name, group)
    assert values(scores.tables["descriptions"]["description, en"])["recall"] == 1 / 2
    assert scores.wrong == []
    assert scores.tables["questions"]["all, en"]["accuracy"] == Share(7, 7)
    assert scores.tables["questions"]["all, zh"]["accuracy"] == Share(1, 1)
    failed = testset.score(questions, [None] * len(questions))
    assert failed.wrong == list(range(len(questions)))


# ---- what is wrong with a directory -------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_directory_is_told_apart(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"^{tmp_path}: holds n"):
        read(name, tmp_path)


WRITERS = {
    "testset": write_testset,
    "pope": write_pope,
    "scienceqa": write_scienceqa,
    "mmmu": write_mmmu,
    "mmvet": write_mmvet,
    "chartqa": write_chartqa,
}
POPE, PROBLEMS, QUESTIONS = "coco_pope_random.json", "problems.json", "questions.jsonl"
PARQUET, HUMAN = "Math/validation-00000-of-00001.parquet", "test/test_human.json"
WHY = {"kind": "why", "language": "en", "question": "?", "answer": ""}


def put(content: Any) -> Callable[[Path], Any]:
    """A list of lines, or another JSON."""
    return lambda path: (
        write_lines(path, content) if path.suffix == ".jsonl" else write_json(path, content)
    )


def put_text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def put_pope(**changed: str) -> Callable[[Path], Any]:
    row = {"image": "a", "text": "?", "label": "yes"} | changed
    return lambda path: write_lines(path, [{name: v for name, v in row.items() if v}])


def put_problem(**changed: Any) -> Callable[[Path], Any]:
    return put({"4": scienceqa_problem(**changed), "7": scienceqa_problem()})


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("pope", POPE, put_text(""), "is empty"),
        ("pope", POPE, put_text("{torn"), "coco_pope_random.json: line 1 is not JSON"),
        ("pope", POPE, put_text("[]"), "line 1 is not a JSON object"),
        ("pope", POPE, put_pope(label=""), "line 1 has no text in 'label'"),
        ("pope", POPE, put_pope(label="maybe"), "question 1 has the label 'maybe'"),
        ("scienceqa", "pid_splits.json", put({}), "has no questions in 'test'"),
        ("scienceqa", "pid_splits.json", put({"test": ["77"]}), "lacks question 77"),
        ("scienceqa", PROBLEMS, put([]), "is not a JSON object"),
        ("scienceqa", PROBLEMS, put({}), "is empty"),
        ("scienceqa", PROBLEMS, put_problem(answer=5), "entry 4 has no answer from 0 to 1"),
        ("scienceqa", PROBLEMS, put_problem(choices="ab"), "entry 4 has no 2 to 5 'choices'"),
        ("scienceqa", PROBLEMS, put_problem(grade="x"), "entry 4 has the grade 'x'"),
        ("mmmu", PARQUET, put_text("PAR?"), "cannot be read as Parquet"),
        ("mmmu", PARQUET, lambda path: pq.write_table(pa.table({"id": ["x"]}), path), "no column"),
        ("mmvet", "mm-vet.json", put_text("["), "is not JSON"),
        ("mmvet", "mm-vet.json", put({"v1_0": {"question": "?"}}), "no text in 'imagename'"),
        ("chartqa", HUMAN, put({}), "is not a JSON list"),
        ("chartqa", HUMAN, put([]), "is empty"),
        ("testset", "objects.json", put({"a": {}}), "entry a has no texts in names.en"),
        ("testset", QUESTIONS, put_text(""), "questions.jsonl: is empty"),
        ("testset", QUESTIONS, put([{"image": "images/000000.png", **WHY}]), "the kind 'why'"),
        ("testset", "scenes.jsonl", put([{"image": "x", "objects": {}}]), "scenes.jsonl lacks"),
        ("testset", "scenes.jsonl", put([{"image": "x"}]), "line 1 has no numbers in 'objects'"),
    ],
)
def test_damaged_files_are_named(
    name: str,
    file: str,
    damage: Callable[[Path], Any],
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("d")  # messages shorten long paths
    WRITERS[name](folder)
    damage(folder / file)
    with pytest.raises(OmniVLMError, match=message) as caught:
        read(name, folder)
    assert str(caught.value).startswith(str(folder))


# ---- which questions ----------------------------------------------------------------------------


def numbered(n: int) -> list[Question]:
    return [Question(str(i), f"{i}.png", (), "?", "") for i in range(n)]


def test_a_limit_draws_alike_and_a_larger_one_has_the_same() -> None:
    everything = numbered(100)
    some = choose(everything, 10)
    assert len(some) == 10
    assert some == choose(everything, 10)
    assert some == sorted(some, key=lambda question: int(question.id))
    assert {q.id for q in some} < {q.id for q in choose(everything, 30)}
    assert [int(q.id) for q in some] != list(range(10))
    assert choose(everything, 100) == choose(everything, None) == everything


def test_a_picture_is_read_once_for_all_its_prompts() -> None:
    reads = []

    def open_picture() -> bytes:
        reads.append(1)
        return b"png"

    asked = [("a", "1"), ("b", "1"), ("a", "2"), ("a", "1")]
    questions = [Question("", key, (open_picture,), prompt, "") for key, prompt in asked]
    seen: set[tuple[str, str]] = {("a", "2")}
    skipped: list[int] = []
    work = list(pending(questions, lambda *row: row not in seen, skipped.append))
    assert [(each.item.key, each.item.source, each.prompts) for each in work] == [
        ("a", (b"png",), ("1",)),
        ("b", (b"png",), ("1",)),
    ]
    assert len(reads) == 2
    assert skipped == [1]
    assert count(questions) == 3


# ---- what is written ----------------------------------------------------------------------------


def test_a_sheet_shows_pictures_of_every_kind(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    long = "word " * 100 + "x" * 200 + "图" * 200
    sources: Sequence[tuple[Any, ...]] = [(HORSES,), (), (damaged,), (HORSES.read_bytes,)]
    examples = [(Question("", "", pictures, long, "真"), None) for pictures in sources]
    sheet = draw_sheet([*examples, *[(Question("", "", (HORSES,), "?", "no"), "yes")] * 20])
    assert sheet is not None
    image = Image.open(io.BytesIO(sheet)).convert("RGB")
    assert image.width > 4 * SIDE
    assert image.height > 3 * SIDE
    assert image.getpixel((image.width * 3 // 8, SIDE // 2)) == (242, 242, 242)  # no picture
    assert draw_sheet([]) is None


def test_an_old_sheet_goes_when_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "failures.png").write_bytes(b"")
    about = {
        "model": {"name": "m", **dict.fromkeys(("text", "mmproj"), {"file": "f", "sha256": None})},
        "limit": None,
        "split": None,
        "options": {"max_tokens": 1},
        "ran": None,
    }
    rows = [{"answer": "Yes", "error": None}]
    text = report(tmp_path, pope.BENCHMARK, ask_pope("y"), rows, about)
    assert not (tmp_path / "failures.png").exists()
    assert "| random |   1 | 100.0% (20.7% to 100.0%) |" in text
    assert (tmp_path / "result.md").read_text() == text
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scores"]["POPE"]["random"]["accuracy"] == {
        "value": 1.0,
        "low": 0.206549,
        "high": 1.0,
        "part": 1,
        "n": 1,
    }
