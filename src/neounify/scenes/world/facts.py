"""Facts that a text states about an image: the meeting point of captions, prompts and checks.

`SceneFacts` is what a caption says, no more: an attribute that is not mentioned is None. The
writer turns facts into words, the parser turns words into facts, and the checker asks whether
a scene or an image satisfies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import pick
from neounify.scenes.world.lexicon import OPPOSITE, place_name, relations_between
from neounify.scenes.world.scene import Scene, SceneConfig, SceneObject


@dataclass(frozen=True)
class ObjectFact:
    """`count` alike objects; None where an attribute is not mentioned."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    count: int = 1

    def fits(self, shape: str | None, colour: str | None, size: str | None) -> bool:
        """Whether an object with these attributes is one of those meant (place aside)."""
        return (
            self.shape in (None, shape)
            and self.colour in (None, colour)
            and self.size in (None, size)
        )


@dataclass(frozen=True)
class RelationFact:
    """`objects[subject]` stands in `relation` to `objects[object]` of the same facts."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class SceneFacts:
    """All that a text claims; the objects are claimed to be all there are."""

    objects: tuple[ObjectFact, ...] = ()
    relations: tuple[RelationFact, ...] = ()
    background: str | None = None

    def __post_init__(self) -> None:
        for relation in self.relations:
            ends = (relation.subject, relation.object)
            if not all(0 <= end < len(self.objects) for end in ends) or ends[0] == ends[1]:
                raise DataError(f"a relation joins objects {ends} of {len(self.objects)}")

    @property
    def count(self) -> int:
        """Number of objects claimed."""
        return sum(fact.count for fact in self.objects)


@dataclass(frozen=True, kw_only=True)
class CaptionStyle:
    """Kinds of facts in a caption. `places`: "none", one "relation", or every object's "cell"."""

    colour: bool = True
    size: bool = False
    background: bool = False
    places: str = "none"

    def __post_init__(self) -> None:
        if self.places not in ("none", "relation", "cell"):
            raise DataError(f"places is {self.places!r}, not 'none', 'relation' or 'cell'")


FULL_STYLE = CaptionStyle(size=True, background=True, places="cell")
"""Every fact of a scene."""


def facts_of(
    scene: Scene, config: SceneConfig, style: CaptionStyle, rng: np.random.Generator | None = None
) -> SceneFacts:
    """Facts of a scene that a caption of that style states; `rng` chooses the related pair, if any.

    A relation is stated only between two objects that are uniquely described; without such a
    pair, none is stated. Sizes are not mentioned in a world with a single size.
    """
    facts = [_fact_of(placed, config, style) for placed in scene.objects]
    counts = Counter(facts)
    objects = tuple(replace(fact, count=counts[fact]) for fact in counts)
    relations: tuple[RelationFact, ...] = ()
    if style.places == "relation":
        unique = [i for i, fact in enumerate(facts) if counts[fact] == 1]
        index = {fact: i for i, fact in enumerate(counts)}
        pairs = [(a, b) for a in unique for b in unique if a < b]
        if pairs:
            a, b = pick(rng, pairs) if rng is not None else pairs[0]
            relations_here = relations_between(scene.objects[a].cell, scene.objects[b].cell)
            relation = pick(rng, relations_here) if rng is not None else relations_here[0]
            relations = (RelationFact(index[facts[a]], relation, index[facts[b]]),)
    return SceneFacts(objects, relations, scene.background if style.background else None)


def canonical(facts: SceneFacts) -> SceneFacts:
    """Equal for texts that state the same, whatever their word order."""
    order = sorted(range(len(facts.objects)), key=lambda i: _sort_key(facts.objects[i]))
    rank = {old: new for new, old in enumerate(order)}
    relations = set()
    for r in facts.relations:
        subject, relation, other = rank[r.subject], r.relation, rank[r.object]
        if relation in ("right of", "below"):
            subject, relation, other = other, OPPOSITE[relation], subject
        relations.add((subject, relation, other))
    return SceneFacts(
        tuple(facts.objects[i] for i in order),
        tuple(RelationFact(*r) for r in sorted(relations)),
        facts.background,
    )


def _sort_key(fact: ObjectFact) -> tuple[str, ...]:
    named = (fact.place, fact.shape, fact.colour, fact.size)
    return (*(name or "" for name in named), str(fact.count))


_WAYS_TO_REFER = (
    ("shape",),
    ("shape", "colour"),
    ("colour",),
    ("shape", "size"),
    ("shape", "colour", "size"),
    ("shape", "place"),
    ("shape", "colour", "place"),
    ("place",),
    ("shape", "colour", "size", "place"),
)


def reference(
    scene: Scene,
    config: SceneConfig,
    target: SceneObject,
    rng: np.random.Generator | None = None,
    hide: str | None = None,
) -> ObjectFact | None:
    """Few words that single an object out, without the attribute `hide`; None if there are none.

    With `rng`, one of the two shortest ways, so that texts vary. The shape is left out only where
    it is hidden.
    """
    unique = []
    for attributes in _WAYS_TO_REFER:
        if hide in attributes or ("shape" not in attributes and hide != "shape"):
            continue
        if "size" in attributes and len(config.sizes) == 1:
            continue
        fact = _fact_with(target, config, attributes)
        if len(matching(scene, config, fact)) == 1:
            unique.append(fact)
    if not unique:
        return None
    return unique[0] if rng is None else pick(rng, unique[:2])


def matching(scene: Scene, config: SceneConfig, fact: ObjectFact) -> tuple[SceneObject, ...]:
    """The objects of a scene that a fact (its count aside) describes."""
    return tuple(
        placed
        for placed in scene.objects
        if fact.fits(placed.shape, placed.colour, placed.size)
        and fact.place in (None, place_name(placed.cell, config.grid))
    )


def _fact_of(placed: SceneObject, config: SceneConfig, style: CaptionStyle) -> ObjectFact:
    attributes = ["shape"]
    if style.colour:
        attributes.append("colour")
    if style.size and len(config.sizes) > 1:
        attributes.append("size")
    if style.places == "cell":
        attributes.append("place")
    return _fact_with(placed, config, attributes)


def _fact_with(placed: SceneObject, config: SceneConfig, attributes: Collection[str]) -> ObjectFact:
    return ObjectFact(
        shape=placed.shape if "shape" in attributes else None,
        colour=placed.colour if "colour" in attributes else None,
        size=placed.size if "size" in attributes else None,
        place=place_name(placed.cell, config.grid) if "place" in attributes else None,
    )
