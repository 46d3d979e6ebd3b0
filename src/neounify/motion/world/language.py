"""Captions of clips: what each shape does, in many wordings, and no more than the facts say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neounify.motion.world.scene import Motion, MotionScene
from neounify.scenes.world.draw import chance, pick
from neounify.scenes.world.facts import ObjectFact
from neounify.scenes.world.language import noun

WAYS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up left": ("up and to the left", "diagonally up to the left"),
    "up right": ("up and to the right", "diagonally up to the right"),
    "down left": ("down and to the left", "diagonally down to the left"),
    "down right": ("down and to the right", "diagonally down to the right"),
}
"""Words for directions, usual ones first."""
_VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "move": (
        ("moves {way}", "moving {way}"),
        ("goes {way}", "going {way}"),
        ("slides {way}", "sliding {way}"),
    ),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("becomes larger", "becoming larger"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "appear": (("appears", "appearing"), ("shows up", "showing up")),
    "vanish": (("vanishes", "vanishing"), ("disappears", "disappearing")),
    "bounce": (
        ("bounces off the {way} edge", "bouncing off the {way} edge"),
        ("bounces off the {way}", "bouncing off the {way}"),
        ("hits the {way} edge and comes back", "hitting the {way} edge and coming back"),
    ),
    "stay": (
        ("stays as it is", "staying as it is"),
        ("does not change", "not changing"),
        ("stands still", "standing still"),
    ),
}
"""Verbs of the third person and their participles; {way} is a direction or an edge."""
_LEADS = ("A video of ", "A clip of ", "Show ", "Animate ")
_JOINTS = (" and ", " while ")


@dataclass(frozen=True)
class MoverFact:
    """What a caption says of one shape; None says nothing."""

    shape: str
    colour: str | None
    motion: Motion


@dataclass(frozen=True)
class MotionFacts:
    """What a caption says of a clip."""

    movers: tuple[MoverFact, ...]
    background: str | None = None


def motion_facts(
    scene: MotionScene, *, colour: bool = True, background: bool = False
) -> MotionFacts:
    """The facts of a clip: shapes and motions, and as asked their colours and the background."""
    movers = [MoverFact(m.shape, m.colour if colour else None, m.motion) for m in scene.movers]
    return MotionFacts(tuple(movers), scene.background if background else None)


def draw_facts(scene: MotionScene, rng: np.random.Generator) -> MotionFacts:
    """Facts as prompts state them: colours mostly, the background now and then."""
    return motion_facts(scene, colour=chance(rng, 0.8), background=chance(rng, 0.35))


def motion_caption(facts: MotionFacts, rng: np.random.Generator | None = None) -> str:
    """Put facts into words; `rng` varies the wording, without it the plainest is used."""
    participle = rng is not None and chance(rng, 0.5)
    clauses = [_clause(fact, rng, participle=participle) for fact in facts.movers]
    joint = _JOINTS[0] if rng is None or participle else pick(rng, _JOINTS)
    text = joint.join(clauses)
    ground = f"on a {facts.background} background" if facts.background else ""
    leads = bool(ground) and not participle and rng is not None and chance(rng, 0.3)
    if leads:
        text = f"{ground}, {text}"
    if participle and rng is not None:
        text = pick(rng, _LEADS) + text
    if ground and not leads:
        text = f"{text}, {ground}"
    return text[0].upper() + text[1:] + "."


def frame_caption(scene: MotionScene, frame: int, rng: np.random.Generator) -> str:
    """What one frame of a clip shows: the shapes in it and now and then the background."""
    shown = [mover for mover in scene.movers if mover.path[frame] is not None]
    nouns = [noun(ObjectFact(mover.shape, mover.colour)) for mover in shown]
    text = " and ".join(nouns) or "nothing"
    ground = f" on a {scene.background} background" if not nouns or chance(rng, 0.35) else ""
    return f"{text[0].upper()}{text[1:]}{ground}."


def _clause(fact: MoverFact, rng: np.random.Generator | None, *, participle: bool) -> str:
    forms = _VERBS[fact.motion.kind]
    verb = (forms[0] if rng is None else pick(rng, forms))[participle]
    way = fact.motion.way
    if way and fact.motion.kind == "move":
        way = WAYS[way][0] if rng is None else pick(rng, WAYS[way])
    return f"{noun(ObjectFact(fact.shape, fact.colour))} {verb.format(way=way)}"
