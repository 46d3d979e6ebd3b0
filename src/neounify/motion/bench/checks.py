"""Verdicts on clips: whether the shapes do what was asked, and whether a clip continues rightly.

Every part is a number from 0 to 1 that falls with the error and is 1 where the strict verdict
holds, so a part serves as a reward as well. Tolerances are for generated clips: up to
1 − `STEADY` of the frames may show something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from neounify.motion.bench.follow import (
    Clip,
    FittedMotion,
    Followed,
    Track,
    as_clip,
    fit_motion,
    follow,
)
from neounify.motion.world.language import MotionFacts, MoverFact
from neounify.motion.world.questions import MotionQuestion, check_motion_answer
from neounify.motion.world.scene import DIRECTIONS, MotionConfig, MotionScene, Place
from neounify.scenes.bench.checks import Verdict
from neounify.scenes.bench.perceive import Percept, SeenObject, perceive

STEADY = 0.85
"""Share of frames in which a shape, a colour, a count or a background must be right."""
MAX_ANGLE = 22.5
"""Degrees that a direction may be off: half the angle between two of eight."""
MAX_MISFIT, MAX_UNEVENNESS = 0.035, 0.12
"""Root mean square distance from a smooth path in sides of the frame, and of the log radius."""
MAX_PLACE_ERROR, MAX_RADIUS_ERROR = 0.05, 0.1
"""Mean distance from the true place in sides of the frame, and mean |log| of the radii's ratio.

Of two shapes the worse one of each frame counts.
"""
MAX_TRACKS = 5
"""Tracks, the longest first, that are tried for the shapes asked for."""


@dataclass(frozen=True)
class MotionVerdict(Verdict):
    """A verdict with its parts from 0 to 1; an attribute is right where its part is 1."""

    parts: Mapping[str, float]

    @classmethod
    def of(cls, parts: Mapping[str, float]) -> MotionVerdict:
        """The verdict of these parts."""
        return cls({name: value >= 1 for name, value in parts.items()}, dict(parts))


def graded(error: float, right: float, wrong: float) -> float:
    """1 for errors up to `right`, 0 from `wrong` up, on a line between."""
    return min(1.0, max(0.0, (wrong - error) / (wrong - right)))


def steady(share: float) -> float:
    """A share of frames as a part: 1 from `STEADY` up, in proportion below."""
    return min(1.0, share / STEADY)


def check_motion(
    facts: MotionFacts, clip: Clip | Sequence[Clip], config: MotionConfig
) -> MotionVerdict:
    """Whether a clip shows what facts claim, and nothing besides. Raises DataError for no clip.

    Parts: "count", "shape", "colour" and "background" (where stated), "kind", "direction" (of moves
    and bounces), "path" (smoothness of place and size).
    """
    return check_followed(facts, follow(clip, config), config)


def check_followed(facts: MotionFacts, seen: Followed, config: MotionConfig) -> MotionVerdict:
    """Whether facts hold of what was followed, under the assignment that does them most justice."""
    tracks = seen.tracks[:MAX_TRACKS]
    fits = {id(track): fit_motion(track, seen.frames, config) for track in tracks}
    options: list[Track | None] = [*tracks, *[None] * len(facts.movers)]
    best: dict[str, float] = {}
    for chosen in permutations(options, len(facts.movers)):
        judged = [
            _judge(fact, track, fits[id(track)] if track else None)
            for fact, track in zip(facts.movers, chosen, strict=True)
        ]
        parts = {
            name: float(np.mean([one[name] for one in judged if name in one]))
            for name in dict.fromkeys(name for one in judged for name in one)
        }
        if not best or sum(parts.values()) > sum(best.values()):
            best = parts
    parts = {"count": steady(_right_counts(facts, seen)), **best}
    if facts.background is not None:
        right = np.mean([percept.background == facts.background for percept in seen.percepts])
        parts["background"] = steady(float(right))
    return MotionVerdict.of(parts)


def _judge(fact: MoverFact, track: Track | None, fit: FittedMotion | None) -> dict[str, float]:
    """The parts of one shape that was asked for, if this track is it."""
    wanted = fact.motion
    names = ["shape", *["colour"] * (fact.colour is not None), "kind"]
    names += ["direction"] * (wanted.way is not None) + ["path"]
    if track is None or fit is None:
        return dict.fromkeys(names, 0.0)
    motion = fit.motion
    is_kind = motion is not None and motion.kind == wanted.kind
    parts = {
        "shape": steady(track.share("shape", fact.shape)),
        "kind": float(is_kind) * steady(fit.steady),
        "path": min(
            graded(fit.misfit, MAX_MISFIT, 4 * MAX_MISFIT),
            graded(fit.unevenness, MAX_UNEVENNESS, 4 * MAX_UNEVENNESS),
        ),
    }
    if fact.colour is not None:
        parts["colour"] = steady(track.share("colour", fact.colour))
    if wanted.kind == "move" and wanted.way is not None:
        parts["direction"] = graded(_angle_off(fit, wanted.way), MAX_ANGLE, 90.0) * is_kind
    elif wanted.kind == "bounce":
        parts["direction"] = float(motion == wanted)
    return {name: parts[name] for name in names}


def _angle_off(fit: FittedMotion, way: str) -> float:
    """Degrees between a travel and a direction, 0 to 180."""
    x, y = DIRECTIONS[way]
    off = abs(fit.angle - math.degrees(math.atan2(y, x))) % 360
    return min(off, 360 - off)


def _right_counts(facts: MotionFacts, seen: Followed) -> float:
    """Share of frames with as many shapes as asked for, whenever they appear and vanish."""
    kinds = [fact.motion.kind for fact in facts.movers]
    most = len(kinds)
    changing = sum(kind in ("appear", "vanish") for kind in kinds)
    right = [most - changing <= len(p.objects) <= most for p in seen.percepts]
    first, last = len(seen.percepts[0].objects), len(seen.percepts[-1].objects)
    ends = first == most - kinds.count("appear") and last == most - kinds.count("vanish")
    # Where nothing appears or vanishes the ends are frames like the others.
    return float(np.mean(right)) if ends or not changing else 0.0


def check_continuation(
    scene: MotionScene, clip: Clip | Sequence[Clip], start: int, config: MotionConfig
) -> MotionVerdict:
    """Whether frames from `start` on continue a clip as the scene does.

    Parts: "frames" (as many as are left), "count", "shape", "colour", "background", "place" and
    "size" against the true ones frame by frame. Frames that are missing count as wrong.
    """
    frames = as_clip(clip)
    left = scene.frames - start
    scores: dict[str, list[float]] = {
        name: [] for name in ("count", "shape", "colour", "background", "place", "size")
    }
    for number in range(left):
        percept = perceive(frames[number], config.still) if number < len(frames) else None
        for name, value in _frame_parts(scene, start + number, percept).items():
            scores[name].append(value)
    parts = {"frames": float(len(frames) == left)}
    for name in ("count", "shape", "colour", "background"):
        parts[name] = steady(float(np.mean(scores[name])))
    for name, limit in (("place", MAX_PLACE_ERROR), ("size", MAX_RADIUS_ERROR)):
        parts[name] = graded(float(np.mean(scores[name])), limit, 4 * limit)
    return MotionVerdict.of(parts)


def _frame_parts(scene: MotionScene, frame: int, percept: Percept | None) -> dict[str, float]:
    """The right shares of one frame, and its largest errors of place and log radius."""
    places = [m.path[frame] for m in scene.movers]
    true = [(m, p) for m, p in zip(scene.movers, places, strict=True) if p is not None]
    seen = percept.objects if percept else ()
    objects: list[SeenObject | None] = [*seen[:MAX_TRACKS], *[None] * len(true)]

    def distance(place: Place, seen: SeenObject | None) -> float:
        return 1.0 if seen is None else math.hypot(seen.x - place.x, seen.y - place.y)

    chosen = min(
        permutations(objects, len(true)),
        key=lambda some: sum(distance(p, o) for (_, p), o in zip(true, some, strict=True)),
    )
    pairs = [(m, p, o) for (m, p), o in zip(true, chosen, strict=True)]
    parts = {
        "count": float(percept is not None and len(seen) == len(true)),
        "background": float(percept is not None and percept.background == scene.background),
    }
    if pairs:
        parts |= {
            "shape": float(np.mean([o is not None and o.shape == m.shape for m, _, o in pairs])),
            "colour": float(np.mean([o is not None and o.colour == m.colour for m, _, o in pairs])),
            # Of two shapes the worse one: a shape that stays must not hide one that stopped.
            "place": max(distance(p, o) for _, p, o in pairs),
            "size": max(_radius_error(p, o) for _, p, o in pairs),
        }
    return parts


def _radius_error(place: Place, seen: SeenObject | None) -> float:
    return 1.0 if seen is None else abs(math.log(seen.radius / place.radius))


def check_motion_vqa(question: MotionQuestion, answer: str) -> Verdict:
    """Whether an answer in free words is the right one."""
    return Verdict({"answer": check_motion_answer(question, answer)})
