"""The drawn scenes of the training, what is asked of them, the teacher that mends answers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

import draw_examples  # noqa: E402
import drawings  # noqa: E402
import questions  # noqa: E402
import scenes  # noqa: E402
import testset  # noqa: E402
from correction import correct  # noqa: E402
from errors import TrainError  # noqa: E402
from phrases import LANGUAGES, English  # noqa: E402
from questions import caption, description  # noqa: E402
from scenes import SPLITS, Scene, held_out, patch_labels, put, render, sample_scene  # noqa: E402
from things import COLOURS, KINDS, NUMBERS, SETTINGS, THINGS  # noqa: E402


def scene_of(setting: str, cells: dict[int, str]) -> Scene:
    """A scene of named things by cell (0..8); "red car" is tinted, "small egg" and "large egg"."""
    placed = []
    for cell, name in sorted(cells.items()):
        words = name.split()
        tint = words.pop(0) if words[0] in COLOURS else ""
        sizes = {"small": 0.2, "large": 0.4}
        size = sizes[words.pop(0)] if words[0] in sizes else 0.28
        placed.append(put(KINDS[" ".join(words)], cell, (0, 0), size, False, tint=tint))
    return Scene(setting, tuple(placed), seed=1)


def sample(n: int, split: str, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]


# --- things ---------------------------------------------------------------------------------------


def test_there_are_many_kinds_and_the_old_ones_keep_their_numbers() -> None:
    assert len(THINGS) == len(KINDS) == len({thing.emoji for thing in THINGS}) >= 84
    assert len(THINGS) + 1 == questions.LABELS
    old = ["horse", "cow", "sheep", "pig", "dog", "cat", "duck", "rooster", "rabbit", "elephant"]
    assert [thing.one for thing in THINGS[:10]] == old
    assert (KINDS["egg"], KINDS["ball"]) == (11, 33)


def test_no_name_hides_in_another_or_in_a_setting() -> None:
    for language, whole in (("en", r"\b{}\b"), ("zh", "{}")):
        names = {name: kind for kind, t in enumerate(THINGS) for name in t.names(language)}
        phrases = [getattr(setting, language) for setting in SETTINGS.values()]
        for name, kind in names.items():
            pattern = re.compile(whole.format(name))
            others = [other for other, of in names.items() if of != kind]
            hiding = [text for text in [*others, *phrases] if pattern.search(text)]
            assert not hiding, f"{name} in {hiding}"


def test_counted_things() -> None:
    egg, sheep, bread = (THINGS[KINDS[name]] for name in ("egg", "sheep", "loaf of bread"))
    assert [egg.counted(n, "en") for n in range(4)] == "no eggs|one egg|two eggs|three eggs".split(
        "|"
    )
    assert [egg.counted(n, "zh") for n in range(4)] == [
        "没有鸡蛋",
        "一个鸡蛋",
        "两个鸡蛋",
        "三个鸡蛋",
    ]
    assert sheep.counted(2, "en") == "two sheep"
    assert bread.counted(2, "en") == "two loaves of bread"
    assert THINGS[KINDS["horse"]].counted(3, "zh") == "三匹马"


def test_every_home_is_of_known_things_and_every_thing_has_one() -> None:
    at_home = {name for setting in SETTINGS.values() for name in setting.home}
    assert at_home == set(KINDS)
    for name, setting in SETTINGS.items():
        kinds = [KINDS[one] for one in setting.home]
        for couple in zip(kinds[::2], kinds[1::2], strict=True):
            assert not held_out(dict.fromkeys(couple, 1), name), f"{name}: {couple}"


# --- sampling -------------------------------------------------------------------------------------


def test_habits_can_be_left_out() -> None:
    shares = {}
    for home_share in (scenes.HOME_SHARE, 0.0):
        rng = np.random.default_rng(1)
        drawn = [sample_scene(rng, "train", home_share=home_share) for _ in range(1500)]
        assert not any(held_out(scene.counts, scene.setting) for scene in drawn)
        at_home = [
            THINGS[kind].one in SETTINGS[scene.setting].home
            for scene in drawn
            for kind in scene.counts
        ]
        shares[home_share] = sum(at_home) / len(at_home)
    homes = [len(setting.home) for setting in SETTINGS.values()]
    by_chance = sum(homes) / len(homes) / len(THINGS)
    assert shares[0.0] == pytest.approx(by_chance, abs=0.03)
    assert shares[scenes.HOME_SHARE] > 0.7


def test_splits_differ_in_composition() -> None:
    pairs: dict[str, set] = {split: set() for split in SPLITS}
    numbers: dict[str, set] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for scene in sample(1500, split):
            assert held_out(scene.counts, scene.setting) == ({split} - {"train"})
            pairs[split] |= set(combinations(sorted(scene.counts), 2))
            items = sorted(scene.counts.items())
            numbers[split] |= set(combinations(items, 2)) or {(items[0], scene.setting)}
    for split in ("validation", "test"):
        own = [pair for pair in pairs[split] if held_out(dict.fromkeys(pair, 1), "sky")]
        assert len(own) > 50
        assert not set(own) & (
            pairs["train"] | pairs[{"validation", "test"}.difference({split}).pop()]
        )
        alone = {(kind, there) for kind, there in numbers[split] if isinstance(there, str)}
        assert len(alone) > 50
        assert not alone & numbers["train"]
        # each number of each kind is known from the training, elsewhere or in other company
    known = {item for pair in numbers["train"] for item in pair if isinstance(item, tuple)}
    assert len(known) > 0.85 * len(THINGS) * 4
    with pytest.raises(ValueError, match="split is 'dev'.*train, validation, test"):
        sample_scene(np.random.default_rng(0), "dev")


def test_scenes_are_reproducible_and_hold_one_to_nine_things() -> None:
    assert sample(50, "train") == sample(50, "train")
    for scene in sample(400, "train"):
        assert 1 <= len(scene.counts) <= 3
        assert len(scene.placed) <= 9 and max(scene.counts.values()) <= scenes.MAX_COUNT
        cells = [(thing.row, thing.column) for thing in scene.placed]
        assert cells == sorted(set(cells))
        for kind in scene.counts:
            assert bool(scene.of(kind)[0].tint) == THINGS[kind].tintable
            assert len({(thing.tint, scene.size(kind)) for thing in scene.of(kind)}) == 1


def test_the_training_has_habits() -> None:
    together = testset.co_occurrence(4000)
    horse, sheep, milk = KINDS["horse"], KINDS["sheep"], KINDS["glass of milk"]
    assert together[horse, sheep] > 0.15 * together[horse, horse]
    assert together[horse, sheep] > 10 * together[horse, milk]
    assert together.diagonal().min() > 0


def test_things_above_a_support_touch_it() -> None:
    seated = 0
    for scene in sample(1500, "train"):
        for thing in scene.placed:
            if support := scene.seat(thing):
                seated += 1
                assert 0 < support.y - thing.y < 0.32
    assert seated > 20


# --- pictures -------------------------------------------------------------------------------------


def test_every_kind_and_setting_is_drawn() -> None:
    for setting in SETTINGS:
        empty = np.asarray(render(Scene(setting, (), 5), 126)).astype(int)
        assert empty.std() > 3
        for other in SETTINGS.keys() - {setting}:
            assert np.abs(empty - np.asarray(render(Scene(other, (), 5), 126))).mean() > 4
    plain = np.asarray(render(Scene("sky", (), 5), 63)).astype(int)
    drawn = {}
    for name in KINDS:
        drawn[name] = np.asarray(render(scene_of("sky", {4: name}), 63)).astype(int)
        assert (np.abs(drawn[name] - plain).sum(-1) > 30).sum() > 40, name
    for a, b in combinations(drawn, 2):
        assert np.abs(drawn[a] - drawn[b]).mean() > 0.3, (a, b)


def test_pictures_are_reproducible_at_every_size() -> None:
    for scene in sample(20, "train"):
        for size in (126, 160):
            assert render(scene, size).size == (size, size)
            assert np.array_equal(render(scene, size), render(scene, size))


@pytest.mark.parametrize("colour", scenes.TINTS)
def test_tinted_things_have_their_colour(colour: str) -> None:
    picture = np.asarray(render(scene_of("road", {4: f"{colour} large car"}), 126)).astype(int)
    plain = np.asarray(render(Scene("road", (), 1), 126))
    car = picture[np.abs(picture - plain).sum(-1) > 60]
    distances = {
        name: np.abs(np.median(car, 0) - shades[1]).sum() for name, shades in scenes._SHADES.items()
    }
    assert min(distances, key=distances.__getitem__) == colour


def test_the_styles_that_are_not_there_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scenes._emoji.cache_clear()
    scenes._sprite.cache_clear()
    scene = scene_of("road", {4: "car"})
    monkeypatch.setattr(drawings, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match="1f697.png.*train/drawings.py twemoji"):
        render(scene, 63, "twemoji")
    with pytest.raises(ValueError, match="style is 'oil'.*noto, twemoji, fluent"):
        render(scene, 63, "oil")
    monkeypatch.setattr(drawings, "FONT", tmp_path / "font.ttf")
    with pytest.raises(FileNotFoundError, match="font.ttf.*fonts-noto-color-emoji"):
        render(scene, 63)


@pytest.mark.parametrize("name", draw_examples.EXAMPLES)
def test_the_example_pictures_are_those_of_the_repository(name: str) -> None:
    drawn = render(draw_examples.example(name), draw_examples.SIZE)
    with Image.open(ROOT / "examples" / name) as committed:
        assert np.array_equal(drawn, committed)
    example = draw_examples.example(name)
    assert not held_out(example.counts, example.setting)


def test_example_captions() -> None:
    horses, shopping = (draw_examples.example(name) for name in ("horses.png", "shopping.png"))
    assert caption(horses, "en") == "The image shows three horses and one duck near the water."
    assert caption(horses, "zh") == "图中有三匹马和一只鸭子，在水边。"
    assert "three eggs" in caption(shopping, "en") and "三个鸡蛋" in caption(shopping, "zh")


# --- labels ---------------------------------------------------------------------------------------


def test_patch_labels() -> None:
    scene = scene_of("grass", {0: "large box", 4: "large box", 8: "egg"})
    labels = patch_labels(scene, 126, 14)
    assert labels.shape == (3, 81) and labels.dtype == np.int64
    covered, centres, numbers = labels.reshape(3, 9, 9)
    box, egg = KINDS["box"] + 1, KINDS["egg"] + 1
    assert covered[1, 1] == covered[4, 4] == box and covered[7, 7] == egg
    assert covered[0, 8] == covered[8, 0] == 0
    assert np.argwhere(centres).tolist() == [[1, 1], [4, 4], [7, 7]]
    assert (centres[1, 1], centres[7, 7]) == (box, egg)
    assert set(numbers[covered == box]) == {2} and set(numbers[covered == egg]) == {1}
    assert np.array_equal(numbers == -100, covered == -100) and (covered == -100).any()


def test_patch_labels_of_a_size_that_is_no_multiple() -> None:
    labels = patch_labels(scene_of("grass", {8: "egg"}), 384, 14)
    assert labels.shape == (3, 27 * 27)
    assert (labels[1] > 0).sum() == 1


# --- relations ------------------------------------------------------------------------------------


def test_relations() -> None:
    scene = scene_of("room", {0: "cat", 1: "dog", 3: "chair", 8: "key"})
    cat, dog, chair, key = (KINDS[name] for name in ("cat", "dog", "chair", "key"))
    assert scene.relations(cat, dog) == ["left", "next"]
    assert scene.relations(dog, cat) == ["right", "next"]
    assert scene.relations(cat, chair) == ["on"]
    assert scene.relations(chair, cat) == ["below"]
    assert scene.relations(cat, key) == []
    assert scene.holds("left", cat, key) and scene.holds("above", cat, key)


# --- questions ------------------------------------------------------------------------------------


def asked(language: str, n: int = 600) -> list[tuple[Scene, questions.Question]]:
    rng = np.random.default_rng(7)
    return [
        (scene, question)
        for scene in sample(n, "train")
        for question in questions.questions(scene, rng, language)
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_are_of_all_kinds_and_balanced(language: str) -> None:
    pairs = asked(language, 8000)
    kinds = Counter(question.kind for _, question in pairs)
    assert set(kinds) == set(questions.QUESTION_KINDS)
    yes = LANGUAGES[language].yes
    existence = [question.answer for _, question in pairs if question.kind == "yesno"]
    assert sum(answer.startswith(yes) for answer in existence) * 2 == len(existence)
    words = LANGUAGES[language]
    for kind in ("colour", "relation"):
        answers = [question.answer for _, question in pairs if question.kind == kind]
        right = sum(answer.startswith(words.true) for answer in answers)
        wrong = sum(answer.startswith(words.false) for answer in answers)
        assert right + wrong > 200 and 0.8 < right / wrong < 1.25


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_drill_is_of_a_caption_and_relations(language: str) -> None:
    rng, words, asked = np.random.default_rng(3), LANGUAGES[language], []
    for scene in filter(questions.can_drill, sample(2000, "train")):
        caption, *relations = questions.drill(scene, rng, language)
        assert (caption.kind, {q.kind for q in relations}) == ("caption", {"relation"})
        assert len(set(relations)) == len(relations)
        assert all(correct(scene, q.answer, language) == q.answer for q in relations)
        asked += relations
    right = sum(q.answer.startswith(words.true) for q in asked)
    wrong = sum(q.answer.startswith(words.false) for q in asked)
    assert wrong > 200 and 0.8 < right / wrong < 1.25
    for form in ("larger", "smaller", "size"):
        ends = {text.rsplit("}")[-1] for text in questions.ASK[language][form]}
        starts = {text.split("{")[0] for text in questions.ASK[language][form]}
        assert any(
            q.question.startswith(a) and q.question.endswith(b)
            for q in asked
            for a in starts
            for b in ends
        )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_half_of_the_absent_things_are_of_a_present_category(language: str) -> None:
    similar = total = 0
    for scene, question in asked(language):
        if question.kind == "yesno" and question.answer.startswith(LANGUAGES[language].no):
            (kind,) = LANGUAGES[language].mentions(question.answer)
            assert kind not in scene.counts
            similar += THINGS[kind].category in {THINGS[k].category for k in scene.counts}
            total += 1
    assert similar / total > 0.5


def test_questions_of_the_original_and_their_answers() -> None:
    with_eggs, without = scene_of("cart", {0: "egg", 4: "egg"}), scene_of("cart", {0: "apple"})
    seen = {question.question for _, question in asked("zh")}
    assert any(re.fullmatch("检查我是否有.+？", text) for text in seen)
    rng = np.random.default_rng(0)
    yes = questions._Asker(with_eggs, rng, "zh").yes_no(KINDS["egg"])
    no = questions._Asker(without, rng, "zh").yes_no(KINDS["egg"])
    assert (yes.answer, no.answer) == ("有，有两个鸡蛋。", "没有，没有鸡蛋。")
    absent = questions._Asker(without, rng, "en").unanswerable()
    assert re.fullmatch(r"There is no .+ in the picture\.", absent.answer)


def test_texts_are_well_formed() -> None:
    for _, question in asked("en"):
        for text in (question.question, question.answer):
            assert text[0].isupper() and "  " not in text and not re.search(r"[{}]", text)
            assert not re.search(r"\b(?:a [aeiou]|an [^aeiou])", text), text
            for number, noun in re.findall(r"\b(one|two|three|four) (\w+)", text):
                wanted = "one" if number == "one" else "many"
                assert any(getattr(thing, wanted).split()[0] == noun for thing in THINGS), text
    for _, question in asked("zh"):
        for text in (question.question, question.answer):
            assert re.fullmatch(r"[\u4e00-\u9fff，。、？]+", text) and "二" not in text, text


# --- the teacher ----------------------------------------------------------------------------------

POND = {3: "horse", 4: "horse", 5: "duck", 7: "horse"}
STREET = {0: "blue car", 2: "large cat", 6: "small dog"}
CASES_EN = [
    # what is right stays to the character
    ("water", POND, "The image shows three horses and one duck near the water.", None),
    ("water", POND, "Nice!  There are three horses  near the water", None),
    ("water", POND, "", "The image shows three horses and one duck near the water."),
    ("water", POND, "Yes.", None),
    ("water", POND, "There is three horses on the water near the water.", None),
    ("water", POND, "The image shows one duck near the water.", None),
    # numbers
    (
        "water",
        POND,
        "The image shows two horses and one duck near the water.",
        "The image shows three horses and one duck near the water.",
    ),
    ("water", POND, "There is one horse.", "There are three horses."),
    ("water", POND, "There are two ducks.", "There is one duck."),
    ("water", POND, "Three horses, two ducks.", "Three horses, one duck."),
    ("water", POND, "Two horses, one duck.", "Three horses, one duck."),
    # things that are not there
    (
        "water",
        POND,
        "The image shows three horses, two cows and one duck near the water.",
        "The image shows three horses and one duck near the water.",
    ),
    (
        "water",
        POND,
        "The image shows three horses and one swan near the water.",
        "The image shows three horses and one duck near the water.",
    ),
    (
        "water",
        POND,
        "There is one swan and three horses near the water. The swan is at the top left.",
        "There is one duck and three horses near the water. The duck is at the middle right.",
    ),
    (
        "water",
        POND,
        "There are three horses near the water. The cow is at the top left. Nice.",
        "There are three horses near the water. Nice.",
    ),
    ("water", POND, "Three horses, one horse.", "Three horses, one duck."),
    ("water", POND, "Three horses, one duck, two horses.", "Three horses, one duck."),
    ("water", POND, "There are two eggs.", "There are no eggs."),
    ("water", POND, "The cow is at the top left.", "There is no cow in the picture."),
    ("water", POND, "There is no horse in the picture.", "There are three horses in the picture."),
    ("water", POND, "There is no duck in the picture.", "There is one duck in the picture."),
    # yes and no
    ("water", POND, "Yes, there is one egg.", "No, there is no egg."),
    ("water", POND, "Yes, there are two eggs.", "No, there are no eggs."),
    ("water", POND, "No, there are no horses.", "Yes, there are three horses."),
    ("water", POND, "No, there is no duck.", "Yes, there is one duck."),
    ("water", POND, "Yes, there are two horses.", "Yes, there are three horses."),
    ("road", STREET, "Yes, the car is red.", "No, the car is not red."),
    ("road", STREET, "No, the car is not blue.", "Yes, the car is blue."),
    ("road", STREET, "No, the car is not red.", None),
    (
        "road",
        STREET,
        "Yes, the cat is to the left of the car.",
        "No, the cat is not to the left of the car.",
    ),
    (
        "road",
        STREET,
        "No, the cat is not to the right of the car.",
        "Yes, the cat is to the right of the car.",
    ),
    # colours, places, sizes, relations, settings
    ("road", STREET, "The car is green.", "The car is blue."),
    ("road", STREET, "The cars are blue.", "The car is blue."),
    ("road", STREET, "The car is at the top right.", "The car is at the top left."),
    (
        "water",
        POND,
        "The horse is in the middle.",
        "The horses are at the middle left, in the middle and at the bottom middle.",
    ),
    ("road", STREET, "The dog is large.", "The dog is small."),
    ("road", STREET, "The car is large.", "The car is neither small nor large."),
    (
        "road",
        STREET,
        "There is one car on a road. The car is large.",
        "There is one car on a road. The car is at the top left.",
    ),
    ("road", STREET, "The dog is larger than the cat.", "The dog is smaller than the cat."),
    ("road", STREET, "The car is to the right of the cat.", "The car is to the left of the cat."),
    ("road", STREET, "The car is below the dog.", "The car is above the dog."),
    ("road", STREET, "The bus is to the left of the cat.", "The car is to the left of the cat."),
    ("road", STREET, "The cat is on the bus.", "There is no bus in the picture."),
    ("road", STREET, "It is in the snow.", "It is on a road."),
    (
        "road",
        STREET,
        "The image shows one car, one cat and one dog in a room.",
        "The image shows one car, one cat and one dog on a road.",
    ),
]
CASES_ZH = [
    ("water", POND, "图中有三匹马和一只鸭子，在水边。", None),
    ("water", POND, "图中有两匹马和一只鸭子，在草地上。", "图中有三匹马和一只鸭子，在水边。"),
    ("water", POND, "图中有三匹马和一只天鹅，在水边。", "图中有三匹马和一只鸭子，在水边。"),
    (
        "water",
        POND,
        "图中有三匹马、两头奶牛和一只鸭子，在水边。",
        "图中有三匹马和一只鸭子，在水边。",
    ),
    ("water", POND, "三匹马、两只鸭子。", "三匹马、一只鸭子。"),
    (
        "water",
        POND,
        "在水边有三匹马和一只天鹅。天鹅在左上角。",
        "在水边有三匹马和一只鸭子。鸭子在右边中间。",
    ),
    ("water", POND, "图中有三匹马，在水边。奶牛在左上角。", "图中有三匹马，在水边。"),
    ("water", POND, "有两个鸡蛋。", "没有鸡蛋。"),
    ("water", POND, "没有马。", "有三匹马。"),
    ("water", POND, "有，有两个鸡蛋。", "没有，没有鸡蛋。"),
    ("water", POND, "没有，没有马。", "有，有三匹马。"),
    ("water", POND, "有，有二匹马。", "有，有三匹马。"),
    ("water", POND, "图中没有鸭子。", "图中有一只鸭子。"),
    ("water", POND, "奶牛在左上角。", "图中没有奶牛。"),
    ("water", POND, "鸭子在左上角。", "鸭子在右边中间。"),
    ("water", POND, "马在正中间。", "马在左边中间、正中间和下方中间。"),
    ("road", STREET, "汽车是绿色的。", "汽车是蓝色的。"),
    ("road", STREET, "是的，汽车是红色的。", "不是，汽车不是红色的。"),
    ("road", STREET, "不是，汽车不是红色的。", None),
    ("road", STREET, "不是，汽车不是蓝色的。", "是的，汽车是蓝色的。"),
    ("road", STREET, "是的，猫在汽车的左边。", "不是，猫不在汽车的左边。"),
    ("road", STREET, "汽车在猫的右边。", "汽车在猫的左边。"),
    ("road", STREET, "狗很大。", "狗很小。"),
    ("road", STREET, "狗比猫大。", "狗比猫小。"),
    ("road", STREET, "在公路上有一辆汽车。汽车很大。", "在公路上有一辆汽车。汽车在左上角。"),
    ("road", STREET, "这是在雪地里。", "这是在公路上。"),
]


@pytest.mark.parametrize(("setting", "cells", "answer", "right"), CASES_EN)
def test_the_teacher_mends_english(
    setting: str, cells: dict[int, str], answer: str, right: str | None
) -> None:
    assert correct(scene_of(setting, cells), answer, "en") == (answer if right is None else right)


@pytest.mark.parametrize(("setting", "cells", "answer", "right"), CASES_ZH)
def test_the_teacher_mends_chinese(
    setting: str, cells: dict[int, str], answer: str, right: str | None
) -> None:
    assert correct(scene_of(setting, cells), answer, "zh") == (answer if right is None else right)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_right_answers_stay_as_they_are(language: str) -> None:
    for scene, question in asked(language):
        assert correct(scene, question.answer, language) == question.answer


# An independent reading of the descriptions: every sentence must be one of these claims.

NAMES = {
    language: {name: kind for kind, thing in enumerate(THINGS) for name in thing.names(language)}
    for language in ("en", "zh")
}
NAME = {
    language: "(" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
    for language, names in NAMES.items()
}
SPOTS = {
    "en": {
        f"at the {row} {column}": (i, j)
        for i, row in enumerate(("top", "middle", "bottom"))
        for j, column in enumerate(("left", "middle", "right"))
    }
    | {"in the middle": (1, 1)},
    "zh": {
        word: divmod(cell, 3)
        for cell, word in enumerate(
            "左上角 上方中间 右上角 左边中间 正中间 右边中间 左下角 下方中间 右下角".split()
        )
    },
}
RELATED = {
    "en": {
        "to the left of the": "left",
        "to the right of the": "right",
        "above the": "above",
        "below the": "below",
        "next to the": "next",
        "on the": "on",
    },
    "zh": {
        "的左边": "left",
        "的右边": "right",
        "的上方": "above",
        "的下方": "below",
        "的旁边": "next",
    }
    | {"上": "on"},
}
BIG = {
    "small": -1,
    "large": 1,
    "neither small nor large": 0,
    "很小": -1,
    "很大": 1,
    "不大也不小": 0,
}


def near(relation: str, a: scenes.Placed, b: scenes.Placed) -> bool:
    """Whether the relation is true, from the coordinates."""
    dx, dy = b.x - a.x, b.y - a.y
    return {
        "left": dx > 0.15,
        "right": dx < -0.15,
        "above": dy > 0.12,
        "below": dy < -0.12,
        "next": abs(dy) < 0.25 and 0.2 < abs(dx) < 0.4,
        "on": abs(dx) < 0.1 and 0 < dy < 0.35,
    }[relation]


def false_claim(scene: Scene, sentence: str, language: str) -> str:
    """What is false in a sentence about the scene; "" if nothing. AssertionError if unreadable."""
    names, name = NAMES[language], NAME[language]
    for said in re.findall(rf"\b{name}\b" if language == "en" else name, sentence):
        if names[said] not in scene.counts:
            return f"{said} is not there"
    for key, setting in SETTINGS.items():
        if getattr(setting, language) in sentence:
            if key != scene.setting:
                return f"not {key}"
            digits = {word: n for n, word in enumerate(NUMBERS[language])}
            number = "(" + "|".join(NUMBERS[language][1:]) + ")"
            pattern = rf"\b{number} {name}\b" if language == "en" else rf"{number}.{name}"
            listed = re.findall(pattern, sentence, re.IGNORECASE)
            assert listed, sentence
            kinds = [names[said] for _, said in listed]
            assert len(set(kinds)) == len(kinds), sentence
            for digit, said in listed:
                count = scene.counts[names[said]]
                if digits[digit.lower()] != count:
                    return f"not {digit} {said}"
                assert (
                    language == "zh"
                    or (said == THINGS[names[said]].one) == (count == 1)
                    or (THINGS[names[said]].one == THINGS[names[said]].many)
                ), sentence
            first = scene.counts[kinds[0]]
            verb = re.match(r"There (is|are)", sentence)
            assert not verb or (verb[1] == "is") == (first == 1), sentence
            return ""
    pattern = rf"The {name} (is|are) (.+)\." if language == "en" else rf"{name}()(.+)。"
    found = re.fullmatch(pattern, sentence)
    assert found, sentence
    things, rest = scene.of(names[found[1]]), found[3]
    if language == "en":
        assert (found[2] == "is") == (len(things) == 1), sentence
        assert found[1] == (
            THINGS[things[0].kind].one if len(things) == 1 else THINGS[things[0].kind].many
        )
    if rest in BIG:
        sides = {-1: (0, 0.23), 0: (0.23, 0.34), 1: (0.34, 1)}[BIG[rest]]
        return "" if sides[0] <= things[0].size <= sides[1] else f"not {rest}"
    for colour, chinese in COLOURS.items():
        if rest in (colour, f"是{chinese}的"):
            true = (things[0].tint or THINGS[things[0].kind].colour) == colour
            return "" if true else f"not {colour}"
    for words, relation in RELATED[language].items():
        pattern = rf"{words} {name}" if language == "en" else rf"在{name}{words}"
        if other := re.fullmatch(pattern, rest):
            pairs = [(a, b) for a in things for b in scene.of(names[other[1]])]
            return "" if all(near(relation, a, b) for a, b in pairs) else f"not {relation}"
    places = re.split(", | and " if language == "en" else "[、和]", rest.removeprefix("在"))
    spots = sorted(SPOTS[language][place] for place in places)
    true = sorted((min(int(t.y / 0.35), 2), min(int(t.x / 0.35), 2)) for t in things)
    return "" if spots == true else f"not {places}"


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.。 ][^.。]*[.。]", text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_descriptions_of_other_scenes_become_true(language: str) -> None:
    rng = np.random.default_rng(11)
    theirs, wrong = sample(400, "train", 1), 0
    for scene, other in zip(sample(400, "test", 2), theirs, strict=True):
        own, foreign = (description(s, rng, language) for s in (scene, other))
        assert correct(scene, own, language) == own
        for sentence in sentences(own):
            assert not false_claim(scene, sentence, language), (own, scene)
        wrong += any(false_claim(scene, sentence, language) for sentence in sentences(foreign))
        mended = correct(scene, foreign, language)
        assert sentences(mended)
        for sentence in sentences(mended):
            assert not false_claim(scene, sentence, language), (foreign, mended, scene)
        assert correct(scene, mended, language) == mended
    assert wrong > 350  # the independent reading does find what is false


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_scene_that_differs_a_little_changes_few_words(language: str) -> None:
    rng = np.random.default_rng(5)
    tried = 0
    for scene in sample(300, "train", 3):
        if len(scene.placed) < 2 or max(scene.counts.values()) == 1:
            continue
        kind = max(scene.counts, key=scene.counts.__getitem__)
        gone = scene.of(kind)[-1]
        less = replace(scene, placed=tuple(thing for thing in scene.placed if thing != gone))
        if list(less.counts) != list(scene.counts):
            continue
        before, after = caption(scene, language), caption(less, language)
        assert correct(less, before, language) == after
        other = next(key for key in SETTINGS if key != scene.setting)
        moved = replace(scene, setting=other)
        text = description(scene, rng, language)
        phrases = LANGUAGES[language].settings
        assert correct(moved, text, language) == text.replace(
            phrases[scene.setting], phrases[other]
        )
        tried += 1
    assert tried > 100


@pytest.mark.parametrize("language", ["en", "zh"])
def test_damaged_answers_are_mended_or_left(language: str) -> None:
    """A model's own answers can be anything: no error, and a second correction changes nothing."""
    rng = np.random.default_rng(9)
    gap = " " if language == "en" else ""
    for scene, question in asked(language, 150):
        words = question.answer.split(gap) if gap else list(question.answer)
        order = rng.integers(0, len(words), rng.integers(1, len(words) + 3))
        order = np.sort(order) if rng.random() < 0.7 else order
        mended = correct(scene, gap.join(words[i] for i in order), language)
        assert correct(scene, mended, language) == mended


def test_the_languages_have_the_same_form() -> None:
    public = {name for name in dir(English) if not name.startswith("_")}
    for language in LANGUAGES.values():
        assert {name for name in dir(language) if not name.startswith("_")} == public


# --- the test set ---------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_test_set_is_written_in_its_format(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    testset.main([str(folder), "-n", "12"])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    objects = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    assert objects["horse"]["names"] == {"en": ["horse", "horses"], "zh": ["马"]}
    assert objects["horse"]["counted"]["en"][2] == "three horses"
    assert objects["horse"]["counted"]["zh"][1] == "两匹马"
    records = lines(folder / "scenes.jsonl")
    assert len(records) == 12 and set(records[0]) == {"image", "objects", "setting", "style"}
    shown = {record["image"]: record["objects"] for record in records}
    for image, things in shown.items():
        with Image.open(folder / image) as picture:
            assert (picture.size, picture.mode) == ((252, 252), "RGB")
        assert things.keys() <= objects.keys()
    asked = lines(folder / "questions.jsonl")
    assert [question["id"] for question in asked] == list(range(len(asked)))
    assert {question["kind"] for question in asked} == set(questions.QUESTION_KINDS)
    assert {question["language"] for question in asked} == {"en", "zh"}
    assert {question["image"] for question in asked} == shown.keys()
    for way in ("random", "popular", "adversarial"):
        english = lines(folder / f"pope_{way}.json")
        chinese = lines(folder / "zh" / f"pope_{way}.json")
        assert [line["question_id"] for line in english] == list(range(1, len(english) + 1))
        for one, other in zip(english, chinese, strict=True):
            assert (one["image"], one["label"]) == (other["image"], other["label"])
            name = re.fullmatch(r"Is there an? (.+) in the image\?", one["text"])[1]
            assert other["text"] == f"图片中有{objects[name]['names']['zh'][0]}吗？"
            there = name in shown[f"images/{one['image']}"]
            assert one["label"] == ("yes" if there else "no")
        assert Counter(line["label"] for line in english) == dict.fromkeys(
            ("yes", "no"), len(english) // 2
        )


def test_a_test_set_is_never_overwritten_nor_left_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="is there already"):
        testset.main([str(tmp_path), "-n", "1"])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(testset, "_write_lines", fail)
    with pytest.raises(KeyboardInterrupt):
        testset.main([str(tmp_path / "set"), "-n", "1"])
    assert not list(tmp_path.iterdir())


def test_adversarial_things_are_those_that_stand_beside_the_present_ones() -> None:
    together = testset.co_occurrence(2000)
    scene = scene_of("grass", {0: "horse"})
    absent = testset.absent_kinds(scene, together, np.random.default_rng(0))
    assert all(len(kinds) == 1 and kinds[0] not in scene.counts for kinds in absent.values())
    beside = together[KINDS["horse"]].copy()
    beside[KINDS["horse"]] = 0
    assert beside[absent["adversarial"][0]] == beside.max()
    common = together.diagonal().copy()
    common[KINDS["horse"]] = 0
    assert common[absent["popular"][0]] == common.max()


def package(path: Path, names: list[str]) -> Path:
    """An archive with the layout of the second style's package."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), "red").save(file, "PNG")
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    return path


def test_the_second_style_comes_from_a_package_that_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawings, "CACHE", tmp_path / "cache")
    emoji = [f"{ord(thing.emoji):04x}{'-fe0f' * (thing.emoji in '☂✈✂')}" for thing in THINGS]
    names = [f"package/img/twitter/64/{name}.png" for name in emoji]
    good = package(tmp_path / "good.tgz", names)
    with pytest.raises(TrainError, match="good.tgz: is not npm's emoji-datasource-twitter@"):
        drawings.fetch("twemoji", good)
    twemoji = replace(
        drawings.PACKAGES["twemoji"], sha256=hashlib.sha256(good.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(drawings.PACKAGES, "twemoji", twemoji)
    drawings.fetch("twemoji", good)
    folder = drawings.folder("twemoji")
    assert len(list(folder.iterdir())) == len(THINGS)
    assert list(drawings.CACHE.iterdir()) == [folder]
    scenes._sprite.cache_clear()
    scenes._emoji.cache_clear()
    scene = scene_of("snow", {4: "umbrella"})
    assert tuple(np.asarray(render(scene, 126, "twemoji"))[63, 63]) == (255, 0, 0)
    scenes._sprite.cache_clear()
    scenes._emoji.cache_clear()
    lacking = package(tmp_path / "lacking.tgz", names[1:])
    (tmp_path / "other").mkdir()
    with pytest.raises(TrainError, match="lacking.tgz: has no drawing of a horse"):
        drawings.unpack(twemoji, lacking, tmp_path / "other")
    with pytest.raises(TrainError, match="no style 'oil'; known are noto, twemoji, "):
        drawings.fetch("oil")


def test_several_styles_change_the_looks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawings, "CACHE", tmp_path)
    styles = ("noto", "fluent", "emojione")
    looks = Counter()
    for seed in range(300):
        plain = sample_scene(np.random.default_rng(seed), "train")
        styled = sample_scene(np.random.default_rng(seed), "train", styles)
        back = (replace(thing, style="noto", variant=0) for thing in styled.placed)
        assert replace(styled, placed=tuple(back)) == plain
        for kind in styled.counts:
            ((style, variant),) = {(thing.style, thing.variant) for thing in styled.of(kind)}
            assert drawings.has(style, THINGS[kind])
            looks[style, variant > 0] += 1
    assert {style for style, _ in looks} == set(styles)
    assert 0.4 < sum(looks[style, True] for style in styles) / looks.total() < 0.6
    assert 0.45 < (looks["noto", True] + looks["noto", False]) / looks.total() < 0.62


def test_a_changed_drawing_is_another_of_the_same_colour_and_labels_follow_it() -> None:
    whole = scene_of("road", {4: "large apple"})
    (apple,) = whole.placed
    pictures, covered = [], set()
    empty = np.asarray(render(Scene("road", (), 1), 126)).astype(int)
    for variant in range(scenes.VARIANTS + 1):
        scene = replace(whole, placed=(replace(apple, variant=variant),))
        picture = np.asarray(render(scene, 126)).astype(int)
        red, green, blue = np.median(picture[np.abs(picture - empty).sum(-1) > 60], 0)
        assert red > 1.5 * max(green, blue)
        pictures.append(picture)
        covered.add(tuple((patch_labels(scene, 126, 14)[0] > 0).tolist()))
    differences = [np.abs(a - b).max() for a, b in combinations(pictures, 2)]
    assert min(differences) > 40
    assert len(covered) > 3
