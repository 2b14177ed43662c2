"""Captions, descriptions, and questions about scenes with their answers, in English and Chinese.

Answers repeat what was asked ("No, the car is not red."), so that `correction.correct` can mend an
answer without its question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from correction import cells
from phrases import LANGUAGES, Colour, Compared, Places, Relation, Size, Statement
from scenes import OPPOSITE, Scene
from things import COLOURS, KINDS, SETTINGS, THINGS

T = TypeVar("T")
LABELS = len(THINGS) + 1  # classes of a patch: the things and "nothing"
QUESTION_KINDS = (
    *("caption", "description", "count", "yesno", "where", "colour", "relation", "setting", "list"),
    "unanswerable",
)


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is one of QUESTION_KINDS, `language` "en" or "zh"."""

    kind: str
    question: str
    answer: str
    language: str


# Templates: {one}, {many}, {some}, {a} of a thing; {is_name} is "is the horse" or "are the horses";
# {n} and {m} are its Chinese name and measure word.
ASK = {
    "en": {
        "caption": (
            "Describe the image",
            "Describe the image.",
            "Describe this image for me",
            "Describe this picture.",
            "What is in the picture?",
            "What is in the image?",
            "What do you see?",
            "What can you see in this picture?",
        ),
        "description": (
            "Describe the image in detail.",
            "Describe this picture in detail.",
            "Give a detailed description of the image.",
            "Tell me all about this picture.",
        ),
        "list": (
            "List everything in the picture.",
            "List all things in the image.",
            "Name everything that you see.",
        ),
        "setting": ("Where is this?", "Where was this picture taken?", "What is the setting?"),
        "count": (
            "How many {many} are there?",
            "How many {many} are in the picture?",
            "How many {many} do you see?",
            "How many {many} do I have?",
            "Count the {many}.",
        ),
        "is there": (
            "Is there {a} {one}?",
            "Is there {a} {one} in the picture?",
            "Is there {a} {one} in the image?",
            "Do you see {a} {one}?",
        ),
        "are there": (
            "Are there any {many}?",
            "Are there any {many} in the picture?",
            "Do I have {some}?",
            "Do I have any {some}?",
            "Do you see any {some}?",
            "Check whether I have {some}.",
        ),
        "where": ("Where {is_name}?", "Where {is_name} in the picture?"),
        "colour": ("What colour {is_name}?", "What color {is_name}?"),
        "is colour": ("{Is_name} {colour}?",),
        "relation": ("What is {relation}?",),
        "is relation": ("{Is_name} {relation}?",),
        "size": ("{Is_name} small or large?",),
        "larger": ("Which is larger, the {one} or the {other}?",),
        "smaller": ("Which is smaller, the {one} or the {other}?",),
    },
    "zh": {
        "caption": (
            "描述这张图片",
            "描述这张图片。",
            "描述一下这张图。",
            "请描述图片内容。",
            "图中有什么？",
            "图片里有什么？",
            "你看到了什么？",
            "这张图片里有什么？",
        ),
        "description": (
            "详细描述这张图片。",
            "请详细描述一下图片内容。",
            "给出这张图片的详细描述。",
            "详细说说这张图。",
        ),
        "list": ("列出图中所有的东西。", "把图中的东西都列出来。", "列出你看到的所有东西。"),
        "setting": ("这是在哪里？", "这张图片是在哪里拍的？", "这是什么地方？"),
        "count": (
            "有几{m}{n}？",
            "图中有几{m}{n}？",
            "图片里有多少{m}{n}？",
            "我有几{m}{n}？",
            "数一数有几{m}{n}。",
        ),
        "is there": (
            "检查我是否有{n}？",
            "检查我是否有{n}。",
            "我有{n}吗？",
            "我有没有{n}？",
            "图中有{n}吗？",
        ),
        "are there": (
            "图中有没有{n}？",
            "图片中有{n}吗？",
            "图片里有{n}吗？",
            "这里有{n}吗？",
            "你看到{n}了吗？",
        ),
        "where": ("{n}在哪里？", "{n}在图中的什么位置？"),
        "colour": ("{n}是什么颜色的？", "{n}是什么颜色？"),
        "is colour": ("{n}是{colour}的吗？",),
        "relation": ("{relation}有什么？",),
        "is relation": ("{n}在{relation}吗？",),
        "size": ("{n}是大还是小？",),
        "larger": ("{n}和{other}哪个大？",),
        "smaller": ("{n}和{other}哪个小？",),
    },
}
OPENINGS = {
    "en": ("The image shows {} {}.", "The picture shows {} {}.", "There {verb} {} {}."),
    "zh": ("图中有{}，{}。", "图片里有{}，{}。", "{1}有{0}。"),
}
SETTING_ANSWER = {"en": "It is {}.", "zh": "这是{}。"}
_HOME = {key: [KINDS[name] for name in setting.home] for key, setting in SETTINGS.items()}


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def caption(scene: Scene, language: str) -> str:
    """As in "The image shows three horses and one duck near the water.", in reading order."""
    return LANGUAGES[language].caption(list(scene.counts.items()), scene.setting)


def _details(scene: Scene, kind: int) -> list[Statement]:
    """All that is worth saying of a kind: where, what colour, small or large."""
    plural = scene.counts[kind] > 1
    said: list[Places | Colour | Size] = [Places(cells(scene, kind))]
    if scene.colour(kind):
        said.append(Colour(scene.colour(kind)))
    if scene.size(kind):
        said.append(Size(scene.size(kind)))
    return [Statement(kind, predicate, plural) for predicate in said]


def _related(scene: Scene) -> list[Statement]:
    """How single things stand to each other, as a person would say it."""
    lone = [kind for kind, count in scene.counts.items() if count == 1]
    return [
        Statement(kind, Relation(relation, other))
        for kind in lone
        for other in lone
        if kind != other
        for relation in scene.relations(kind, other)
    ]


def _compared(scene: Scene) -> list[tuple[int, int]]:
    """Single things of which the first is larger."""
    lone = [kind for kind, count in scene.counts.items() if count == 1]
    return [(a, b) for a in lone for b in lone if scene.size(a) > scene.size(b)]


def description(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """Two to five sentences: the caption's content, then places, colours, sizes, a relation."""
    words = LANGUAGES[language]
    items = list(scene.counts.items())
    listed = words.listed([words.counted(*item) for item in items])
    verb = "is" if items[0][1] == 1 else "are"
    setting = words.settings[scene.setting]
    sentences = [_pick(rng, OPENINGS[language]).format(listed, setting, verb=verb)]
    said = [_pick(rng, _details(scene, kind)) for kind in scene.counts if rng.random() < 0.85]
    said = said or [_pick(rng, _details(scene, items[0][0]))]
    if (related := _related(scene)) and rng.random() < 0.7:
        said.append(_pick(rng, related))
    sentences += [words.sentence(words.statement(statement)) for statement in said]
    return (" " if language == "en" else "").join(sentences)


class _Asker:
    """Asks about one scene in one language."""

    def __init__(self, scene: Scene, rng: np.random.Generator, language: str) -> None:
        self.scene, self.rng, self.language = scene, rng, language
        self.words, self.counts = LANGUAGES[language], scene.counts
        self.present = list(self.counts)
        self.categories = {THINGS[kind].category for kind in self.present}

    def question(self, kind: str, template: str, answer: str, thing: int = -1, **more) -> Question:
        """The question of a random template about a thing."""
        text = _pick(self.rng, ASK[self.language][template])
        if thing >= 0:
            named = THINGS[thing]
            plural = self.counts.get(thing, 1) > 1
            is_name = f"{'are' if plural else 'is'} the {named.many if plural else named.one}"
            more |= {
                "one": named.one,
                "many": named.many,
                "some": named.some,
                "a": named.article,
                "n": named.chinese,
                "m": named.measure,
                "is_name": is_name,
                "Is_name": is_name.capitalize(),
            }
        return Question(kind, text.format(**more), answer, self.language)

    def say(self, statement: Statement) -> str:
        """The statement as an answer."""
        return self.words.sentence(self.words.statement(statement))

    def missing(self) -> int:
        """A thing that is not there: half of them like one that is, a quarter at home here."""
        way = self.rng.random()
        while True:
            at_home = _HOME[self.scene.setting] if way > 0.75 else range(len(THINGS))
            kind = _pick(self.rng, at_home)
            similar = way > 0.5 or THINGS[kind].category in self.categories
            if kind not in self.counts and similar:
                return kind

    def count(self, kind: int) -> Question:
        """How many there are."""
        answer = self.words.sentence(self.words.exists(kind, self.counts.get(kind, 0)))
        return self.question("count", "count", answer, kind)

    def yes_no(self, kind: int) -> Question:
        """Whether a thing is there."""
        count, plural = self.counts.get(kind, 0), self.rng.random() < 0.5
        claim = self.words.exists(kind, count, plural)
        answer = (self.words.yes if count else self.words.no) + claim + self.words.stop
        return self.question("yesno", "are there" if plural else "is there", answer, kind)

    def verdict(self, asked: Statement, right: bool) -> str:
        """Yes with what was asked, or no with its contrary."""
        said = asked if right else Statement(asked.kind, asked.predicate, asked.plural, True)
        prefix = self.words.true if right else self.words.false
        return prefix + self.words.statement(said) + self.words.stop

    def colours(self) -> list[Question]:
        """What colour a thing has, or whether it has one."""
        coloured = [kind for kind in self.present if self.scene.colour(kind)]
        if not coloured:
            return []
        kind, way = _pick(self.rng, coloured), self.rng.random()
        colour, plural = self.scene.colour(kind), self.counts[kind] > 1
        if way < 0.6:
            answer = self.say(Statement(kind, Colour(colour), plural))
            return [self.question("colour", "colour", answer, kind)]
        others = [name for name in COLOURS if name != colour]
        asked = colour if way < 0.8 else _pick(self.rng, others)
        answer = self.verdict(Statement(kind, Colour(asked), plural), asked == colour)
        name = asked if self.language == "en" else COLOURS[asked]
        return [self.question("colour", "is colour", answer, kind, colour=name)]

    def relation_name(self, relation: str, other: int) -> str:
        """As in "to the left of the horse", "马的左边"."""
        said = self.words.predicate(Relation(relation, other))
        return said if self.language == "en" else said[1:]

    def _only(self, said: Statement) -> bool:
        """Whether nothing else stands so to the other thing, in its row or column."""
        (b,) = self.scene.of(said.predicate.other)
        return all(
            a.kind == said.kind
            for a in self.scene.placed
            if (a.row == b.row or a.column == b.column)
            and self.scene.stands(said.predicate.relation, a, b)
        )

    def relations(self) -> list[Question]:
        """What stands where to a thing, whether it does, and which of two is larger."""
        asked = []
        if related := _related(self.scene):
            said = _pick(self.rng, related)
            relation, other = said.predicate.relation, said.predicate.other
            if self.rng.random() < 0.4 and self._only(said):
                name = self.relation_name(relation, other)
                asked.append(self.question("relation", "relation", self.say(said), relation=name))
            else:
                if not (right := self.rng.random() < 0.5):
                    relation = OPPOSITE.get(relation, "below")
                answer = self.verdict(Statement(said.kind, Relation(relation, other)), right)
                more = {"relation": self.relation_name(relation, other)}
                asked.append(self.question("relation", "is relation", answer, said.kind, **more))
        sized = [kind for kind in self.present if self.scene.size(kind)]
        if sized and self.rng.random() < 0.6:
            kind = _pick(self.rng, sized)
            said = Statement(kind, Size(self.scene.size(kind)), self.counts[kind] > 1)
            asked.append(self.question("relation", "size", self.say(said), kind))
        if (pairs := _compared(self.scene)) and self.rng.random() < 0.6:
            large, small = _pick(self.rng, pairs)
            first, second = (large, small) if self.rng.random() < 0.5 else (small, large)
            if self.rng.random() < 0.5:
                template, said = "larger", Statement(large, Compared(1, small))
            else:
                template, said = "smaller", Statement(small, Compared(-1, large))
            other = self.words.name(second, False)
            asked.append(self.question("relation", template, self.say(said), first, other=other))
        return asked

    def unanswerable(self) -> Question:
        """The place or colour of a thing that is not there, or what stands beside it."""
        kind = self.missing()
        template = _pick(self.rng, ("where", "colour", "relation"))
        relation = self.relation_name(_pick(self.rng, tuple(OPPOSITE)), kind)
        answer = self.words.absent(kind)
        return self.question("unanswerable", template, answer, kind, relation=relation)


def questions(scene: Scene, rng: np.random.Generator, language: str) -> list[Question]:
    """A random set of questions on the scene: as many with yes as with no for an answer.

    Half of the absent things asked for are of the category of a present thing.
    """
    ask, words = _Asker(scene, rng, language), LANGUAGES[language]
    listed = [words.counted(*item) for item in scene.counts.items()]
    placed = _pick(rng, ask.present)
    where = Statement(placed, Places(cells(scene, placed)), scene.counts[placed] > 1)
    setting = SETTING_ANSWER[language].format(words.settings[scene.setting])
    return [
        ask.question("caption", "caption", caption(scene, language)),
        ask.question("description", "description", description(scene, rng, language)),
        *(ask.yes_no(_pick(rng, ask.present)) for _ in range(2)),
        *(ask.yes_no(ask.missing()) for _ in range(2)),
        *(ask.count(_pick(rng, ask.present)) for _ in range(2)),
        *([ask.count(ask.missing())] if rng.random() < 0.5 else []),
        ask.question("where", "where", ask.say(where), placed),
        *ask.colours(),
        *ask.relations(),
        ask.question("setting", "setting", setting),
        ask.question("list", "list", words.sentence(words.list_separators[0].join(listed))),
        ask.unanswerable(),
    ]


def can_drill(scene: Scene) -> bool:
    """Whether single things stand to each other in a way that has a name, or differ in size."""
    return bool(_related(scene) or _compared(scene))


def drill(scene: Scene, rng: np.random.Generator, language: str) -> list[Question]:
    """The caption, and most of what can be asked of how things are to each other."""
    ask = _Asker(scene, rng, language)
    asked = dict.fromkeys(question for _ in range(8) for question in ask.relations())
    return [ask.question("caption", "caption", caption(scene, language)), *asked]
