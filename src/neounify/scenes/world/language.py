"""Writing about scenes: captions in many wordings, and thoughts that list a layout.

A caption is written from facts alone and `parse_caption` reads it back to the same facts. The
layout thought lists the background and then every object with its size and place,

    background: white
    red circle, large, top left
    blue square, small, centre

one per line, in reading order; `parse_layout` turns it back into the scene.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, shuffled
from neounify.scenes.world.facts import ObjectFact, RelationFact, SceneFacts
from neounify.scenes.world.lexicon import (
    OPPOSITE,
    Language,
    cell_of_place,
    number_word,
    place_name,
    plural,
    relation_words,
    tokens,
    word,
)
from neounify.scenes.world.phrasebook import (
    POLITE,
    PROMPT_REQUESTS,
    PROMPT_STATEMENTS,
    FormSet,
)
from neounify.scenes.world.scene import Scene, SceneConfig, SceneObject


def noun(fact: ObjectFact, language: Language = "en", article: str | None = None) -> str:
    """A noun phrase: "two small red circles", "两个小的红色圆形".

    `article`: the word in front instead of the number, "" for none ("the red circle").
    """
    if fact.shape is None:
        shape = "object" if language == "en" else "物体"
    else:
        shape = word("shape", fact.shape, language)
    size = word("size", fact.size, language) if fact.size else ""
    colour = word("colour", fact.colour, language) if fact.colour else ""
    if language == "zh":
        count = f"{number_word(fact.count, 'zh')}个" if article is None else article
        return f"{count}{size}{'的' if size and colour else ''}{colour}{shape}"
    words = [w for w in (size, colour, shape if fact.count == 1 else plural(shape)) if w]
    if article is None:
        article = _indefinite(words[0]) if fact.count == 1 else number_word(fact.count)
    return " ".join([article, *words] if article else words)


def definite(fact: ObjectFact, language: Language = "en") -> str:
    """A noun phrase for a known object, its place included: "the red circle in the centre"."""
    place = fact.place
    phrase = noun(replace(fact, place=None), language, "the" if language == "en" else "")
    if place is None:
        return phrase
    if language == "zh":
        return f"{word('place', place, 'zh')}的{phrase}"
    return f"{phrase} in the {place}"


def caption(
    facts: SceneFacts, rng: np.random.Generator | None = None, language: Language = "en"
) -> str:
    """Put facts into words; `rng` varies the wording, without it the plainest is used."""
    writer = _Chinese(rng) if language == "zh" else _English(rng)
    return writer.write(facts)


def layout_text(scene: Scene, config: SceneConfig, language: Language = "en") -> str:
    """The thought that lists background, objects, sizes and places, one per line."""
    colon, comma = (": ", ", ") if language == "en" else ("：", "，")
    ground = "background" if language == "en" else "背景"
    lines = [f"{ground}{colon}{word('colour', scene.background, language)}"]
    for placed in scene.objects:
        name = noun(ObjectFact(placed.shape, placed.colour), language, "")
        size = [word("size", placed.size, language)] if len(config.sizes) > 1 else []
        place = word("place", place_name(placed.cell, config.grid), language)
        lines.append(comma.join([name, *size, place]))
    return "\n".join(lines)


def parse_layout(text: str, config: SceneConfig) -> Scene:
    """The scene that a layout thought lists, with every object in the middle of its cell.

    Raises:
        DataError: a line is not a background or an object, or the scene cannot be.
    """
    background, objects = None, []
    for line in text.strip().splitlines():
        said: dict[str, str] = {}
        for token in tokens(line):
            if token.kind in said:
                raise DataError(f"the layout line {line!r} names two of {token.kind}")
            if token.kind not in ("stop", "at", "the"):
                said[token.kind] = token.value
        if set(said) == {"background", "colour"}:
            background = said["colour"]
            continue
        expected = {"shape", "colour", "place"} | ({"size"} if len(config.sizes) > 1 else set())
        cell = cell_of_place(said.get("place", ""), config.grid)
        if set(said) != expected or cell is None:
            raise DataError(f"the layout line {line!r} is not 'colour shape, size, place'")
        size = said.get("size", config.sizes[0])
        objects.append(SceneObject(said["shape"], said["colour"], size, cell))
    if background is None:
        raise DataError(f"the layout {text!r} names no background")
    return Scene(background, tuple(objects))


def _indefinite(following: str) -> str:
    return "an" if following[0] in "aeiou" else "a"


class _Writer:
    """Wording choices; without a generator always the first option."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self.rng = rng

    def pick(self, *options: str) -> str:
        return options[0] if self.rng is None else pick(self.rng, options)

    def chance(self, probability: float) -> bool:
        return self.rng is not None and chance(self.rng, probability)

    def order(self, facts: SceneFacts) -> SceneFacts:
        """The facts with objects in random order and relations stated from either end."""
        if self.rng is None:
            return facts
        order = shuffled(self.rng, range(len(facts.objects)))
        rank = {old: new for new, old in enumerate(order)}
        relations = []
        for r in facts.relations:
            turned = RelationFact(rank[r.subject], r.relation, rank[r.object])
            if self.chance(0.5):
                turned = RelationFact(turned.object, OPPOSITE[r.relation], turned.subject)
            relations.append(turned)
        objects = tuple(facts.objects[i] for i in order)
        return SceneFacts(objects, tuple(relations), facts.background)


class _English(_Writer):
    def write(self, facts: SceneFacts) -> str:
        facts = self.order(facts)
        if not facts.objects:
            return self._finish(f"a {facts.background} background")
        ground = facts.background
        sentences: list[str] = []
        body, rest = self._body(facts)
        if ground is not None:
            where = self.pick(f"on a {ground} background", f"against a {ground} background")
            form = self.pick("after", "after", "before", "sentence")
            if form == "after" and not body.startswith(_OPENINGS):
                body = f"{body} {where}"
            elif form == "before":
                body = f"{where}, {body}"
            else:
                sentences.append(f"the background is {ground}")
        sentences = [body, *rest, *sentences]
        return self._finish(*sentences)

    def _finish(self, *sentences: str) -> str:
        if self.chance(0.3):
            return " ".join(s[0].upper() + s[1:] + "." for s in sentences)
        return ". ".join(sentences) + ("." if len(sentences) > 1 else "")

    def _body(self, facts: SceneFacts) -> tuple[str, list[str]]:
        if facts.objects[0].place is not None:
            return self._placed_list(facts), []
        if len(facts.objects) == 2 and len(facts.relations) == 1:
            form = self.pick("phrase", "phrase", "front", "sentence")
            r = facts.relations[0]
            subject, other = facts.objects[r.subject], facts.objects[r.object]
            relation = self.pick(*relation_words(r.relation, "en"))
            if form == "phrase":
                return f"{noun(subject)} {relation} {noun(other)}", []
            if form == "front":
                return f"{relation} {noun(other)} there is {noun(subject)}", []
        said = []
        for r in facts.relations:
            one, two = definite(facts.objects[r.subject]), definite(facts.objects[r.object])
            said.append(f"{one} is {self.pick(*relation_words(r.relation, 'en'))} {two}")
        return self._plain_list(facts), said

    def _plain_list(self, facts: SceneFacts) -> str:
        names = [self._noun(fact) for fact in facts.objects]
        listed = _join(names)
        be = "is" if facts.objects[0].count == 1 else "are"
        return self.pick(
            listed,
            listed,
            f"there {be} {listed}",
            f"a picture of {listed}",
            f"an image with {listed}",
            f"a drawing of {listed}",
            f"a picture that shows {listed}",
        )

    def _noun(self, fact: ObjectFact) -> str:
        if fact.colour and not fact.size and self.chance(0.1):
            be = "is" if fact.count == 1 else "are"
            return f"{noun(replace(fact, colour=None))} that {be} {fact.colour}"
        if fact.count == 1 and self.chance(0.15):
            return noun(fact, article="one")
        return noun(fact)

    def _placed_list(self, facts: SceneFacts) -> str:
        form = self.pick("after", "after", "before", "label")
        placed = [(noun(_unplaced(fact)), fact.place) for fact in facts.objects]
        if form == "label":
            return ", ".join(f"{place}: {name}" for name, place in placed)
        if form == "before":
            return ", ".join(f"in the {place} there is {name}" for name, place in placed)
        preposition = self.pick("in", "in", "at")
        return _join([f"{name} {preposition} the {place}" for name, place in placed])


# A body that opens like this cannot take "on a white background" at its end.
_OPENINGS = ("in the ", "top ", "middle ", "bottom ", "centre:")


class _Chinese(_Writer):
    def write(self, facts: SceneFacts) -> str:
        facts = self.order(facts)
        ground = word("colour", facts.background, "zh") if facts.background else None
        if not facts.objects:
            return f"{ground}背景"
        body = self._body(facts)
        if ground is None:
            return body
        return self.pick(f"{ground}背景，{body}", f"{body}，背景是{ground}")

    def _body(self, facts: SceneFacts) -> str:
        names = [noun(_unplaced(fact), "zh") for fact in facts.objects]
        if facts.objects[0].place is not None:
            places = [word("place", f.place, "zh") for f in facts.objects if f.place]
            if self.pick("before", "after") == "before":
                pairs = zip(places, names, strict=True)
                return "，".join(f"{place}有{name}" for place, name in pairs)
            return "，".join(f"{name}在{place}" for place, name in zip(places, names, strict=True))
        if len(facts.objects) == 2 and len(facts.relations) == 1:
            r = facts.relations[0]
            relation = self.pick(*relation_words(r.relation, "zh"))
            a, b = names[r.subject], names[r.object]
            return self.pick(f"{a}在{b}的{relation}", f"{b}的{relation}有{a}")
        listed = "、".join(names[:-1]) + "和" * (len(names) > 1) + names[-1]
        body = self.pick(listed, f"图中有{listed}", f"一张有{listed}的图片")
        for r in facts.relations:
            subject, other = (definite(facts.objects[i], "zh") for i in (r.subject, r.object))
            body += f"，{subject}在{other}的{self.pick(*relation_words(r.relation, 'zh'))}"
        return body


def prompt(
    facts: SceneFacts,
    rng: np.random.Generator,
    language: Language = "en",
    forms: FormSet = "wide",
) -> str:
    """A request for an image in words beyond those of captions, before any `Surface`.

    With forms "held_out", the request or the polite form around it is one that training never has.
    """
    if language == "en":
        phrase = _Phrase(rng).write(facts)
    else:
        phrase = _Chinese(rng).write(facts).replace("图中有", "")
    inside, around = held_out_parts(rng) if forms == "held_out" else (forms, forms)
    if inside == around and chance(rng, 0.5):
        text = pick(rng, PROMPT_STATEMENTS[forms][language]).format(c=phrase)
        return _ended(text, rng, language)
    request = pick(rng, PROMPT_REQUESTS[inside][language]).format(c=phrase)
    text = pick(rng, POLITE[around][language]).format(x=request)
    return text[0].upper() + text[1:] if chance(rng, 0.6) else text


def held_out_parts(rng: np.random.Generator) -> tuple[FormSet, FormSet]:
    """Forms of a request and of what stands around it, of which at least one is held out."""
    parts: tuple[tuple[FormSet, FormSet], ...] = (
        ("held_out", "held_out"),
        ("held_out", "wide"),
        ("wide", "held_out"),
    )
    return pick(rng, parts)


def _ended(text: str, rng: np.random.Generator, language: Language) -> str:
    stopped = text[-1] in "?？。." or chance(rng, 0.6)
    text = text if stopped else text + ("." if language == "en" else "。")
    return text[0].upper() + text[1:] if chance(rng, 0.5) else text


class _Phrase(_Writer):
    """One phrase for all facts, which any request can hold: "a circle that is red on white"."""

    def write(self, facts: SceneFacts) -> str:
        facts = self.order(facts)
        if not facts.objects:
            return f"a {facts.background} background"
        names = [self._named(fact) for fact in facts.objects]
        if len(names) == 2 and len(facts.relations) == 1:
            r = facts.relations[0]
            relation = self.pick(*relation_words(r.relation, "en"))
            body = f"{names[r.subject]} {relation} {names[r.object]}"
        else:
            body = _join(names)
            for r in facts.relations:
                one, two = definite(facts.objects[r.subject]), definite(facts.objects[r.object])
                relation = self.pick(*relation_words(r.relation, "en"))
                body += self.pick(f", {one} {relation} {two}", f", with {one} {relation} {two}")
        if facts.background is None:
            return body
        ground = f"{_indefinite(facts.background)} {facts.background} background"
        return self.pick(f"{body} on {ground}", f"{body} with {ground}", f"{body}, on {ground}")

    def _named(self, fact: ObjectFact) -> str:
        name = noun(_unplaced(fact))
        if fact.colour and self.chance(0.3):
            bare = noun(replace(fact, colour=None, place=None))
            be = "is" if fact.count == 1 else "are"
            colour = fact.colour
            name = self.pick(
                f"{bare} that {be} {colour}", f"{bare} which {be} {colour}", f"{bare} in {colour}"
            )
        if fact.place is None:
            return name
        return f"{name} {self.pick('in', 'in', 'at')} the {fact.place}"


def _unplaced(fact: ObjectFact) -> ObjectFact:
    return replace(fact, place=None)


def _join(names: list[str]) -> str:
    """A list in English: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
