"""Parser of captions into facts, so that a program can check the text of a model.

The grammar is small. Text falls into segments at commas, stops and colons. A segment holds noun
phrases (number, size, colour, shape; colour and size may also follow, "a circle that is red"),
places, relations and a background. Places that open a segment belong to the noun after them,
others to the noun before. `A left of B`, `left of B there is A`, `A 在 B 的左边` and
`B 的左边有 A` all say the same. A noun with "the", or without a number, refers to an object
named before if there is exactly one it fits; otherwise it names a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from neounify.data.sample import DataError
from neounify.scenes.world.facts import ObjectFact, RelationFact, SceneFacts
from neounify.scenes.world.lexicon import Token, TokenKind, language_of, tokens


def parse_caption(text: str) -> SceneFacts:
    """Facts that a caption in English or Chinese states.

    Raises:
        DataError: a word is not of this world, or the words do not make a caption.
    """
    claims = _Claims(chinese=language_of(text) == "zh")
    try:
        for segment in _segments(tokens(text)):
            claims.read(_items(segment))
        return claims.facts()
    except _Unreadable as error:
        raise DataError(f"cannot read the caption {text!r}: {error}") from None


class _Unreadable(Exception):
    """A caption whose words do not make a statement; the message says why."""


_NOTHING = ObjectFact()


@dataclass(frozen=True)
class _Item:
    """A noun phrase, a place, a relation or a background, with its value."""

    kind: TokenKind
    value: str = ""
    fact: ObjectFact = _NOTHING
    refers: bool = False


def _segments(words: Sequence[Token]) -> list[list[Token]]:
    segments: list[list[Token]] = [[]]
    for token in words:
        if token.kind == "stop":
            segments.append([])
        else:
            segments[-1].append(token)
    return [segment for segment in segments if segment]


def _items(segment: Sequence[Token]) -> list[_Item]:
    """Join the words of a segment into noun phrases and backgrounds."""
    items: list[_Item] = []
    attributes: dict[str, str] = {}  # attributes that wait for their noun
    for position, token in enumerate(segment):
        if token.kind in ("number", "size", "colour", "the"):
            after = (t.kind for t in segment[position + 1 :] if t.kind not in ("size", "colour"))
            if token.kind in ("number", "the") or next(after, "") in ("shape", "background"):
                if token.kind in attributes:
                    raise _Unreadable(f"two words for the {token.kind} of one thing")
                attributes[token.kind] = token.value
            else:
                items = _describe_last(items, token)
        elif token.kind == "shape":
            number = attributes.get("number")
            fact = ObjectFact(
                shape=token.value or None,
                colour=attributes.get("colour"),
                size=attributes.get("size"),
                count=1 if number is None else int(number),
            )
            items.append(_Item("shape", fact=fact, refers="the" in attributes or number is None))
            attributes = {}
        elif token.kind == "background":
            items.append(_Item("background", attributes.get("colour", "")))
            attributes = {}
        elif token.kind != "at":
            items.append(_Item(token.kind, token.value))
            attributes = {}
    if set(attributes) - {"the"}:
        raise _Unreadable("a noun phrase has no noun")
    return items


def _describe_last(items: list[_Item], token: Token) -> list[_Item]:
    """A colour or size that follows its noun: "the circle is red", "the background is white"."""
    for index in reversed(range(len(items))):
        item = items[index]
        if item.kind == "background" and token.kind == "colour" and not item.value:
            return [*items[:index], replace(item, value=token.value), *items[index + 1 :]]
        if item.kind == "shape" and getattr(item.fact, token.kind) is None:
            fact = _described(item.fact, token)
            return [*items[:index], replace(item, fact=fact), *items[index + 1 :]]
    raise _Unreadable(f"{token.value} describes nothing")


def _described(fact: ObjectFact, token: Token) -> ObjectFact:
    if token.kind == "colour":
        return replace(fact, colour=token.value)
    return replace(fact, size=token.value)


class _Claims:
    """The facts gathered so far; `read` adds those of one segment."""

    def __init__(self, chinese: bool) -> None:
        self.chinese = chinese
        self.objects: list[ObjectFact] = []
        self.relations: list[RelationFact] = []
        self.background: str | None = None
        self.last: int | None = None  # the object named last
        self.waiting_place: str | None = None  # "in the centre, …"
        self.waiting_relation: tuple[str, int] | None = None  # "left of the square, …"

    def read(self, items: Sequence[_Item]) -> None:
        places_lead = bool(items) and items[0].kind == "place" and len(items) > 1
        relation: str | None = None
        named: list[int] = []  # the objects this segment names
        for item in items:
            if item.kind == "background":
                self._set_background(item.value)
            elif item.kind == "place":
                self._read_place(item.value, leads=places_lead)
            elif item.kind == "relation":
                if relation is not None:
                    raise _Unreadable("two relations in one clause")
                if self.chinese and len(named) > 1:
                    self._relate(named[-2], item.value, named[-1])
                else:
                    relation = item.value
            else:
                here = self._name(item)
                if self.waiting_relation is not None:
                    self._relate(here, *self.waiting_relation)
                    self.waiting_relation = None
                elif relation is not None:
                    if not named:
                        self.waiting_relation = (relation, here)
                    elif self.chinese:
                        self._relate(here, relation, named[-1])
                    else:
                        self._relate(named[-1], relation, here)
                    relation = None
                named.append(here)
        if relation is not None:
            raise _Unreadable(f"{relation!r} lacks an object")

    def facts(self) -> SceneFacts:
        if self.waiting_place is not None or self.waiting_relation is not None:
            raise _Unreadable("a place or relation belongs to nothing")
        if not self.objects and self.background is None:
            raise _Unreadable("it names nothing")
        return SceneFacts(tuple(self.objects), tuple(self.relations), self.background)

    def _name(self, item: _Item) -> int:
        """The index of the object a noun phrase means, a new one if need be."""
        known = [i for i, o in enumerate(self.objects) if item.refers and _agree(item.fact, o)]
        if len(known) > 1:
            raise _Unreadable(f"{item.fact.shape} may be any of {len(known)} objects")
        if known:
            index, old = known[0], self.objects[known[0]]
            self.objects[index] = replace(
                old,
                colour=old.colour or item.fact.colour,
                size=old.size or item.fact.size,
                shape=old.shape or item.fact.shape,
            )
        else:
            index = len(self.objects)
            self.objects.append(item.fact)
        if self.waiting_place is not None:
            self._put(index, self.waiting_place)
            self.waiting_place = None
        self.last = index
        return index

    def _read_place(self, place: str, leads: bool) -> None:
        if not leads and self.last is not None and self.objects[self.last].place is None:
            self._put(self.last, place)
        elif self.waiting_place is None:
            self.waiting_place = place
        else:
            raise _Unreadable("two places for one object")

    def _put(self, index: int, place: str) -> None:
        if self.objects[index].place not in (None, place):
            raise _Unreadable("an object has two places")
        self.objects[index] = replace(self.objects[index], place=place)

    def _relate(self, subject: int, relation: str, other: int) -> None:
        if subject == other:
            raise _Unreadable("an object stands in a relation to itself")
        if self.objects[subject].count != 1 or self.objects[other].count != 1:
            raise _Unreadable("a relation joins groups, not single objects")
        self.relations.append(RelationFact(subject, relation, other))

    def _set_background(self, colour: str) -> None:
        if not colour or self.background not in (None, colour):
            raise _Unreadable("the background has no colour, or two")
        self.background = colour


def _agree(reference: ObjectFact, known: ObjectFact) -> bool:
    """Whether a noun phrase may refer to an object named before."""
    pairs = (
        (reference.shape, known.shape),
        (reference.colour, known.colour),
        (reference.size, known.size),
    )
    return known.count == 1 and all(a is None or b is None or a == b for a, b in pairs)
