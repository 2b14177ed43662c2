"""What can be said of a scene, in English and in Chinese: claims to text, and text to claims.

Both languages have the same methods, so that questions and corrections are written once.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from things import COLOURS, NUMBERS, SETTINGS, THINGS

CENTRE = 4  # of the nine cells of the grid


@dataclass(frozen=True)
class Places:
    """In these cells of the grid (0..8)."""

    cells: tuple[int, ...]


@dataclass(frozen=True)
class Colour:
    """Of this colour, a key of COLOURS."""

    name: str


@dataclass(frozen=True)
class Size:
    """Small (-1), large (1), or neither (0)."""

    sign: int


@dataclass(frozen=True)
class Relation:
    """Left of, right of, above, below, on or next to the things of another kind."""

    relation: str
    other: int
    plural: bool = False


@dataclass(frozen=True)
class Compared:
    """Larger (1) or smaller (-1) than the things of another kind, or as large (0)."""

    sign: int
    other: int
    plural: bool = False


Predicate = Places | Colour | Size | Relation | Compared


@dataclass(frozen=True)
class Statement:
    """As in "The horse is [not] at the top left"; `plural` if it speaks of "the horses"."""

    kind: int
    predicate: Predicate
    plural: bool = False
    negated: bool = False


@dataclass(frozen=True)
class Item:
    """A counted thing in a text, "three horses", and where it stands there."""

    kind: int
    count: int
    start: int
    end: int


def _any(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _kinds(language: str) -> dict[str, int]:
    return {name: kind for kind, thing in enumerate(THINGS) for name in thing.names(language)}


class English:
    """English."""

    code, stop = "en", "."
    yes, no = "Yes, ", "No, "  # there is; there is none
    true, false = yes, no  # it is so; it is not
    settings = {key: setting.en for key, setting in SETTINGS.items()}
    list_separators = (", ", " and ")
    _kinds = _kinds("en")
    _many = frozenset(thing.many for thing in THINGS if thing.many != thing.one)
    _places = (
        *("at the top left", "at the top middle", "at the top right"),
        *("at the middle left", "in the middle", "at the middle right"),
        *("at the bottom left", "at the bottom middle", "at the bottom right"),
    )
    _relations = {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
        "on": "on",
        "next": "next to",
    }
    _sizes = {-1: "small", 0: "neither small nor large", 1: "large"}
    _compared = {-1: "smaller than", 0: "as large as", 1: "larger than"}
    _counts = {word: count for count, word in enumerate(NUMBERS["en"])} | {"a": 1, "an": 1}
    _name = _any(_kinds)
    _item = re.compile(rf"\b({_any(_counts)}) ({_name})\b", re.IGNORECASE)
    _exists = re.compile(
        rf"(Yes, |No, )?([Tt])here (?:is|are) ({_any(_counts)}) ({_name})( in the picture)?\."
    )
    _statement = re.compile(rf"(Yes, t|No, t|T)he ({_name}) (is|are)( not)? (.+)\.")
    _related = re.compile(rf"({_any(_relations.values())}) the ({_name})")
    _comparison = re.compile(rf"({_any(_compared.values())}) the ({_name})")
    _mention = re.compile(rf"\b({_name})\b")

    def listed(self, texts: list[str]) -> str:
        """As in "a, b and c"."""
        return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))

    def counted(self, kind: int, count: int) -> str:
        """As in "three horses"."""
        return THINGS[kind].counted(count, "en")

    def name(self, kind: int, plural: bool) -> str:
        """As in "horses"."""
        return THINGS[kind].many if plural else THINGS[kind].one

    def exists(self, kind: int, count: int, plural: bool = True, tail: str = "") -> str:
        """As in "there are two eggs"; `plural` chooses between "no eggs" and "no egg"."""
        if count == 0 and not plural:
            return f"there is no {THINGS[kind].one}{tail}"
        return f"there {'is' if count == 1 else 'are'} {self.counted(kind, count)}{tail}"

    def absent(self, kind: int) -> str:
        """The answer to a question about a thing that is not there."""
        return f"There is no {THINGS[kind].one} in the picture."

    def sentence(self, text: str) -> str:
        """The text with a capital and a full stop."""
        return f"{text[0].upper()}{text[1:]}."

    def predicate(self, predicate: Predicate) -> str:
        """As in "at the top left"."""
        match predicate:
            case Places(cells):
                return self.listed([self._places[cell] for cell in cells])
            case Colour(name):
                return name
            case Size(sign):
                return self._sizes[sign]
            case Relation(relation, other, plural):
                return f"{self._relations[relation]} the {self.name(other, plural)}"
            case Compared(sign, other, plural):
                return f"{self._compared[sign]} the {self.name(other, plural)}"

    def statement(self, said: Statement) -> str:
        """As in "the horse is not at the top left"."""
        verb = ("are" if said.plural else "is") + (" not" if said.negated else "")
        return f"the {self.name(said.kind, said.plural)} {verb} {self.predicate(said.predicate)}"

    def caption(self, items: list[tuple[int, int]], setting: str) -> str:
        """The kinds and their counts, and the setting, in a sentence."""
        listed = self.listed([self.counted(*item) for item in items])
        return f"The image shows {listed} {self.settings[setting]}."

    # --- text to claims ---

    def sentences(self, text: str) -> list[tuple[str, str]]:
        """Every sentence and the space behind it."""
        return re.findall(r"([^.]+\.?)(\s*)", text)

    def items(self, text: str) -> list[Item]:
        """The counted things in a text."""
        return [
            Item(self._kinds[found[2].lower()], self._counts[found[1].lower()], *found.span())
            for found in self._item.finditer(text)
        ]

    def parse_exists(self, text: str) -> tuple[str, str, Item, bool, str] | None:
        """Prefix, text up to the claim, the thing, whether it is in the plural, and the tail."""
        if not (found := self._exists.fullmatch(text)):
            return None
        item = Item(self._kinds[found[4]], self._counts[found[3]], *found.span(3))
        return found[1] or "", "", item, found[4] in self._many, found[5] or ""

    def parse_statement(self, text: str) -> tuple[str, Statement] | None:
        """The prefix and the claim of a sentence such as "The horse is at the top left."."""
        if not (found := self._statement.fullmatch(text)):
            return None
        prefix, name, verb, negated, rest = found.groups()
        if not (predicate := self._parse_predicate(rest)):
            return None
        said = Statement(self._kinds[name], predicate, verb == "are", negated is not None)
        return prefix[:-1], said

    def _parse_predicate(self, text: str) -> Predicate | None:
        if text in COLOURS:
            return Colour(text)
        for sign, word in self._sizes.items():
            if text == word:
                return Size(sign)
        if found := self._related.fullmatch(text):
            (relation,) = (key for key, said in self._relations.items() if said == found[1])
            return Relation(relation, self._kinds[found[2]], found[2] in self._many)
        if found := self._comparison.fullmatch(text):
            (sign,) = (key for key, said in self._compared.items() if said == found[1])
            return Compared(sign, self._kinds[found[2]], found[2] in self._many)
        places = re.split(", | and ", text)
        if all(place in self._places for place in places):
            return Places(tuple(self._places.index(place) for place in places))
        return None

    def mentions(self, text: str) -> set[int]:
        """All kinds whose names occur in the text."""
        return {self._kinds[name] for name in self._mention.findall(text)}

    def agree(self, before: str, count: int) -> str:
        """The text before a list with the verb that its first number wants."""
        verb = "is" if count == 1 else "are"
        return re.sub(r"(?<=[Tt]here )(is|are)(?= $)", verb, before)


class Chinese:
    """Chinese, with the measure word of each thing."""

    code, stop = "zh", "。"
    yes, no = "有，", "没有，"
    true, false = "是的，", "不是，"
    settings = {key: setting.zh for key, setting in SETTINGS.items()}
    list_separators = ("、", "和")
    _kinds = _kinds("zh")
    _places = (
        *("左上角", "上方中间", "右上角"),
        *("左边中间", "正中间", "右边中间"),
        *("左下角", "下方中间", "右下角"),
    )
    _relations = {
        "left": "的左边",
        "right": "的右边",
        "above": "的上方",
        "below": "的下方",
        "on": "上",
        "next": "的旁边",
    }
    _sizes = {-1: "很小", 0: "不大也不小", 1: "很大"}
    _counts = {word: count for count, word in enumerate(NUMBERS["zh"]) if count} | {"二": 2}
    _name = _any(_kinds)
    _measure = _any({thing.measure for thing in THINGS})
    _item = re.compile(rf"(?:没有|([{''.join(_counts)}])(?:{_measure})?)({_name})")
    _exists = re.compile(
        rf"(有，|没有，)?(图中|图片里|图片中)?(?:没有|有([{''.join(_counts)}])(?:{_measure})?)({_name})。"
    )
    _statement = re.compile(rf"(是的，|不是，)?({_name})(.+)。")
    _related = re.compile(rf"({_name})({_any(_relations.values())})")
    _comparison = re.compile(rf"比({_name})([大小])|和({_name})一样大")
    _mention = re.compile(f"({_name})")
    _colour_keys = {name: key for key, name in COLOURS.items()}

    def listed(self, texts: list[str]) -> str:
        """As in "甲、乙和丙"."""
        return "和".join(filter(None, ("、".join(texts[:-1]), texts[-1])))

    def counted(self, kind: int, count: int) -> str:
        """As in "三匹马"."""
        return THINGS[kind].counted(count, "zh")

    def name(self, kind: int, plural: bool) -> str:
        """As in "马"."""
        return THINGS[kind].chinese

    def exists(self, kind: int, count: int, plural: bool = True, tail: str = "") -> str:
        """As in "有两个鸡蛋"."""
        return ("有" if count else "") + self.counted(kind, count)

    def absent(self, kind: int) -> str:
        """The answer to a question about a thing that is not there."""
        return f"图中没有{THINGS[kind].chinese}。"

    def sentence(self, text: str) -> str:
        """The text with a full stop."""
        return f"{text}。"

    def predicate(self, predicate: Predicate, negated: bool = False) -> str:
        """As in "在左上角", "不是红色的"."""
        not_ = "不" if negated else ""
        match predicate:
            case Places(cells):
                return f"{not_}在{self.listed([self._places[cell] for cell in cells])}"
            case Colour(name):
                return f"{not_}是{COLOURS[name]}的"
            case Size(sign):
                return self._sizes[sign]
            case Relation(relation, other):
                return f"{not_}在{THINGS[other].chinese}{self._relations[relation]}"
            case Compared(0, other):
                return f"和{THINGS[other].chinese}一样大"
            case Compared(sign, other):
                return f"比{THINGS[other].chinese}{'大' if sign > 0 else '小'}"

    def statement(self, said: Statement) -> str:
        """As in "马不在左上角"."""
        return THINGS[said.kind].chinese + self.predicate(said.predicate, said.negated)

    def caption(self, items: list[tuple[int, int]], setting: str) -> str:
        """The kinds and their counts, and the setting, in a sentence."""
        listed = self.listed([self.counted(*item) for item in items])
        return f"图中有{listed}，{self.settings[setting]}。"

    # --- text to claims ---

    def sentences(self, text: str) -> list[tuple[str, str]]:
        """Every sentence and the space behind it."""
        return re.findall(r"([^。]+。?)(\s*)", text)

    def items(self, text: str) -> list[Item]:
        """The counted things in a text."""
        return [
            Item(self._kinds[found[2]], self._counts.get(found[1], 0), *found.span())
            for found in self._item.finditer(text)
        ]

    def parse_exists(self, text: str) -> tuple[str, str, Item, bool, str] | None:
        """Prefix, text up to the claim, the thing, whether it is in the plural, and the tail."""
        if not (found := self._exists.fullmatch(text)):
            return None
        prefix, place, number, name = found.groups()
        item = Item(self._kinds[name], self._counts.get(number, 0), *found.span(4))
        return prefix or "", place or "", item, True, ""

    def parse_statement(self, text: str) -> tuple[str, Statement] | None:
        """The prefix and the claim of a sentence such as "马在左上角。"."""
        if not (found := self._statement.fullmatch(text)):
            return None
        prefix, name, rest = found.groups()
        negated = rest.startswith(("不在", "不是"))
        if not (predicate := self._parse_predicate(rest[negated:])):
            return None
        return prefix or "", Statement(self._kinds[name], predicate, negated=negated)

    def _parse_predicate(self, text: str) -> Predicate | None:
        for sign, word in self._sizes.items():
            if text == word:
                return Size(sign)
        if text[:1] == "是" and text[-1:] == "的" and text[1:-1] in self._colour_keys:
            return Colour(self._colour_keys[text[1:-1]])
        if found := self._comparison.fullmatch(text):
            sign = {"大": 1, "小": -1, None: 0}[found[2]]
            return Compared(sign, self._kinds[found[1] or found[3]])
        if text[:1] != "在":
            return None
        if found := self._related.fullmatch(text[1:]):
            (relation,) = (key for key, said in self._relations.items() if said == found[2])
            return Relation(relation, self._kinds[found[1]])
        places = re.split("[、和]", text[1:])
        if all(place in self._places for place in places):
            return Places(tuple(self._places.index(place) for place in places))
        return None

    def mentions(self, text: str) -> set[int]:
        """All kinds whose names occur in the text."""
        return {self._kinds[name] for name in self._mention.findall(text)}

    def agree(self, before: str, count: int) -> str:
        """The text before a list, which in Chinese heeds no number."""
        return before


LANGUAGES: dict[str, English | Chinese] = {"en": English(), "zh": Chinese()}
