"""Facts of captions, comparable whatever their word order."""

from __future__ import annotations

from neounify.scenes.world.facts import ObjectFact, RelationFact, SceneFacts
from neounify.scenes.world.lexicon import OPPOSITE


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
    return (
        fact.place or "",
        fact.shape or "",
        fact.colour or "",
        fact.size or "",
        str(fact.count),
    )
