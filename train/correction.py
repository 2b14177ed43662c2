"""The teacher of the preference training: what is wrong in an answer, mended in the fewest words.

It knows the scene and the forms of the training's answers. What it cannot read it leaves alone, and
so it does what an answer leaves out: that is not wrong.
"""

from dataclasses import replace

from phrases import (
    LANGUAGES,
    Chinese,
    Colour,
    Compared,
    English,
    Item,
    Places,
    Predicate,
    Relation,
    Size,
    Statement,
)
from scenes import OPPOSITE, Scene
from things import THINGS


def cells(scene: Scene, kind: int) -> tuple[int, ...]:
    """The cells of the grid (0..8) with things of a kind, in reading order."""
    return tuple(3 * thing.row + thing.column for thing in scene.of(kind))


def truth(scene: Scene, kind: int, claimed: Predicate) -> Predicate | None:
    """What is true of all things of a kind that is there, as near to the claim as can be.

    The claim itself if it is true (in the right number); None if nothing alike is true or known.
    """
    if isinstance(claimed, Places):
        right = cells(scene, kind)
        return claimed if set(claimed.cells) == set(right) else Places(right)
    if isinstance(claimed, Colour):
        return Colour(scene.colour(kind)) if scene.colour(kind) else None
    if isinstance(claimed, Size):
        return Size(scene.size(kind))
    other, count = claimed.other, scene.counts.get(claimed.other, 0)
    if other == kind or not count:
        return None
    plural = claimed.plural if THINGS[other].one == THINGS[other].many else count > 1
    if isinstance(claimed, Compared):
        difference = scene.size(kind) - scene.size(other)
        return Compared((difference > 0) - (difference < 0), other, plural)
    for relation in (claimed.relation, OPPOSITE.get(claimed.relation), *OPPOSITE):
        if relation and scene.holds(relation, kind, other):
            return Relation(relation, other, plural)
    return None


def _singular(predicate: Predicate) -> Predicate:
    """The same claim without the grammatical number of the other thing; places in order."""
    if isinstance(predicate, Relation | Compared):
        return replace(predicate, plural=False)
    return Places(tuple(sorted(predicate.cells))) if isinstance(predicate, Places) else predicate


def correct(scene: Scene, answer: str, language: str) -> str:
    """The answer with only those words changed that are wrong about the scene.

    Things that are listed but not there give way to unmentioned ones that are, or are left out;
    so are sentences about absent things, unless the whole answer is one: then it says that they
    are absent. Numbers, colours, sizes, places, relations, settings, yes and no become right; of a
    thing that is neither small nor large a longer answer tells the place.
    """
    return _Correction(scene, answer, LANGUAGES[language]).mended()


class _Correction:
    """One answer being mended."""

    def __init__(self, scene: Scene, answer: str, language: English | Chinese) -> None:
        self.scene, self.counts, self.language = scene, scene.counts, language
        self.parts = language.sentences(answer)
        self.alone = len(self.parts) == 1
        mentioned = language.mentions(answer)
        self.unmentioned = [kind for kind in self.counts if kind not in mentioned]
        self.instead: dict[int, int] = {}  # present kinds for absent ones that are listed
        listings = (text for text, _ in self.parts if not language.parse_exists(text))
        for item in (item for text in listings for item in language.items(text)):
            known = item.kind in self.counts or item.kind in self.instead
            if item.count and not known and (kind := self._unmentioned(item)) is not None:
                self.instead[item.kind] = kind

    def _unmentioned(self, item: Item) -> int | None:
        """The kind, if one is left, that was likeliest meant by the item; it is used up."""
        if not self.unmentioned:
            return None
        category = THINGS[item.kind].category
        kind = min(
            self.unmentioned,
            key=lambda kind: (self.counts[kind] != item.count, THINGS[kind].category != category),
        )
        self.unmentioned.remove(kind)
        return kind

    def mended(self) -> str:
        """The whole answer."""
        kept: list[str] = []
        for sentence, space in self.parts:
            new = self._sentence(sentence)
            if new and (new == sentence or new not in kept):
                kept += [new, space]
        if not kept:
            return self.language.caption(list(self.counts.items()), self.scene.setting)
        if not self.parts[-1][1]:
            kept[-1] = ""
        return "".join(kept)

    def _sentence(self, sentence: str) -> str:
        """The sentence, mended; "" where nothing of it can stay."""
        if existence := self.language.parse_exists(sentence):
            return self._existence(sentence, *existence)
        if statement := self.language.parse_statement(sentence):
            return self._statement(sentence, *statement)
        if items := self.language.items(sentence):
            return self._setting(self._listing(sentence, items))
        absent = self.language.mentions(sentence) - set(self.counts)
        return self._setting(sentence) if self.alone or not absent else ""

    def _finish(self, prefix: str, claim: str) -> str:
        """The claim as a sentence, behind its prefix."""
        return prefix + claim + self.language.stop if prefix else self.language.sentence(claim)

    def _existence(
        self, sentence: str, prefix: str, place: str, item: Item, plural: bool, tail: str
    ) -> str:
        """A sentence such as "[Yes, ]there are two eggs[ in the picture]."."""
        language, kind = self.language, item.kind
        if not self.alone:
            kind = self.instead.get(kind, kind)
        count = self.counts.get(kind, 0)
        right = (language.yes if count else language.no) if prefix else ""
        if (kind, count, right) == (item.kind, item.count, prefix):
            return sentence
        if not count and not self.alone:
            return ""
        return self._finish(right + place, language.exists(kind, count, plural, tail))

    def _statement(self, sentence: str, prefix: str, said: Statement) -> str:
        """A sentence such as "[Yes, ]the horse is [not] at the top left."."""
        language, kind = self.language, self.instead.get(said.kind, said.kind)
        claimed = said.predicate
        if isinstance(claimed, Relation | Compared):
            claimed = replace(claimed, other=self.instead.get(claimed.other, claimed.other))
        if kind not in self.counts:
            return self._without_subject(said)
        right = truth(self.scene, kind, claimed)
        if right is None:
            return self._without_truth(sentence, said)
        if right == Size(0) and claimed != right and not self.alone:
            right = Places(cells(self.scene, kind))  # nobody describes a size that is usual
        plural = said.plural if language.code == "zh" else self.counts[kind] > 1
        is_so = _singular(right) == _singular(claimed)
        if isinstance(right, Relation | Compared):
            claimed = replace(claimed, plural=right.plural)
        if prefix:  # "No, the car is not red." keeps the claim, because it is what was asked
            new = Statement(kind, claimed, plural, negated=not is_so)
            right_prefix = language.true if is_so else language.false
        else:
            denied = said.negated and not is_so
            new = Statement(kind, claimed if denied else right, plural, negated=denied)
            right_prefix = ""
        if new == said and prefix == right_prefix:
            return sentence
        return self._finish(right_prefix, language.statement(new))

    def _without_subject(self, said: Statement) -> str:
        """For a statement on an absent thing."""
        if not self.alone:
            return ""
        claimed = said.predicate
        if isinstance(claimed, Relation):
            # the answer to "What is to the left of the duck?": another thing may be there
            for kind, count in self.counts.items():
                if count == 1 and truth(self.scene, kind, claimed) == claimed:
                    return self.language.sentence(
                        self.language.statement(replace(said, kind=kind, plural=False))
                    )
            if claimed.other not in self.counts:
                return self.language.absent(claimed.other)
        return self.language.absent(said.kind)

    def _without_truth(self, sentence: str, said: Statement) -> str:
        """For a statement of which nothing is true or known."""
        if not self.alone:
            return ""
        claimed = said.predicate
        if isinstance(claimed, Relation | Compared):
            if claimed.other not in self.counts:
                return self.language.absent(claimed.other)
            where = Places(cells(self.scene, said.kind))
            plural = self.counts[said.kind] > 1
            return self.language.sentence(
                self.language.statement(Statement(said.kind, where, plural))
            )
        return sentence

    def _listing(self, sentence: str, items: list[Item]) -> str:
        """A sentence that counts things: each present kind once, with its number."""
        pieces, gaps, counts = [], [], []
        seen: set[int] = set()
        end = items[0].start
        for item in items:
            kind: int | None = self.instead.get(item.kind, item.kind)
            if item.count and (kind not in self.counts or kind in seen):
                kind = self._unmentioned(item)
            if kind is not None:
                count = self.counts.get(kind, 0)
                text = sentence[item.start : item.end]
                if (kind, count) != (item.kind, item.count):
                    text = self.language.counted(kind, count)
                pieces.append(text)
                counts.append(count)
                seen.add(kind)
            gaps.append(sentence[end : item.start])
            end = item.end
        if not pieces:
            return ""
        if len(pieces) == len(items):
            listed = "".join(gap + piece for gap, piece in zip(gaps, pieces, strict=True))
        elif self.language.list_separators[1] in gaps:
            listed = self.language.listed(pieces)
        else:
            listed = self.language.list_separators[0].join(pieces)
        if sentence[items[0].start].isupper():
            listed = listed[0].upper() + listed[1:]
        before = sentence[: items[0].start]
        if listed != sentence[len(before) : end]:
            before = self.language.agree(before, counts[0])
        return before + listed + sentence[end:]

    def _setting(self, sentence: str) -> str:
        """The sentence with the right setting, where it names one."""
        right = self.language.settings[self.scene.setting]
        if right not in sentence:
            for wrong in self.language.settings.values():
                sentence = sentence.replace(wrong, right)
        return sentence
