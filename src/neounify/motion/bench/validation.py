"""Validation of the checker of clips: true ones must pass, those with one thing changed must not.

What is changed is chosen by what the facts say and never by asking the checker. Worn copies of the
true clips (noise, blur, compression, a colour cast) must still pass.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from neounify.data.sample import DataError
from neounify.evaluate.metrics import Rate
from neounify.motion.bench.checks import check_continuation, check_motion
from neounify.motion.bench.follow import Clip
from neounify.motion.world.language import motion_facts
from neounify.motion.world.questions import ask_motion, check_motion_answer
from neounify.motion.world.render import render_motion
from neounify.motion.world.samples import sample_decided
from neounify.motion.world.scene import (
    MOTION_KINDS,
    Motion,
    MotionConfig,
    MotionScene,
    Mover,
    are_apart,
    draw_motion,
    draw_path,
    sample_motion,
)
from neounify.scenes.bench.validation import wear_out
from neounify.scenes.world.draw import pick, sample_rng, shuffled
from neounify.scenes.world.lexicon import stands_out

WEARS = ("noise", "blur", "shift", "jpeg")
JPEG_QUALITY = 75
_TRIES = 400

Changed = MotionScene | Clip | None
"""A scene to be rendered, frames that no scene has, or None where the change does not apply."""
Change = Callable[[MotionScene, MotionConfig, np.random.Generator], Changed]


def validate_motion(
    config: MotionConfig, number: int, seed: int = 0, worn: int | None = None
) -> dict[str, Rate]:
    """How often true, worn and wrong clips are judged as they are; rates of right judgements.

    `number` true clips, copies of the first `worn` (by default all) in every wear, and `number`
    wrong clips, with all changes equally often.
    """
    tally: defaultdict[str, list[bool]] = defaultdict(list)
    for index in range(number):
        rng = sample_rng(seed, 510, index)
        scene = sample_motion(rng, config, "any")
        facts = motion_facts(scene, background=True)
        clip = render_motion(scene, config)
        tally["true"].append(check_motion(facts, clip, config).correct)
        for wear in WEARS if worn is None or index < worn else ():
            tally[wear].append(check_motion(facts, wear_clip(clip, wear, rng), config).correct)
        name, asked, wrong = make_wrong_clip(config, sample_rng(seed, 513, index), index)
        facts = motion_facts(asked, background=True)
        is_rejected = not check_motion(facts, wrong, config).correct
        tally["wrong"].append(is_rejected)
        tally[f"wrong {name}"].append(is_rejected)
    return {name: Rate(sum(right), len(right)) for name, right in tally.items()}


def validate_continuation(config: MotionConfig, number: int, seed: int = 0) -> dict[str, Rate]:
    """True and wrong continuations of the first half of a clip.

    Wrong: the last frame given stays, the first half comes again, a frame is missing, or another
    clip follows.
    """
    tally: defaultdict[str, list[bool]] = defaultdict(list)
    for index in range(number):
        rng = sample_rng(seed, 511, index)
        scene = sample_decided(rng, config, "any")
        clip, start = render_motion(scene, config), scene.frames // 2
        rest = clip[start:]
        tally["continued"].append(check_continuation(scene, rest, start, config).correct)
        for wear in WEARS:
            worn = wear_clip(rest, wear, rng)
            right = check_continuation(scene, worn, start, config).correct
            tally[f"continued, {wear}"].append(right)
        others: dict[str, Clip] = {
            "stopped": np.repeat(clip[start - 1 : start], len(rest), axis=0),
            "repeated": clip[: len(rest)],
            "one frame less": rest[:-1],
            "another clip": render_motion(
                sample_motion(rng, config, "any", frames=scene.frames), config
            )[start:],
        }
        name = list(others)[index % len(others)]
        is_rejected = not check_continuation(scene, others[name], start, config).correct
        tally[f"continuation wrong, {name}"].append(is_rejected)
    return {name: Rate(sum(right), len(right)) for name, right in tally.items()}


def validate_motion_answers(config: MotionConfig, number: int, seed: int = 0) -> dict[str, Rate]:
    """True answers, and answers to the same kind of question about a clip where they differ."""
    tally: defaultdict[str, list[bool]] = defaultdict(list)
    for index in range(number):
        rng = sample_rng(seed, 512, index)
        question = ask_motion(sample_motion(rng, config, "any"), rng)
        tally["answer true"].append(check_motion_answer(question, question.answer))
        for _ in range(_TRIES):
            other = ask_motion(sample_motion(rng, config, "any"), rng)
            if other.kind == question.kind and other.value != question.value:
                tally["answer wrong"].append(not check_motion_answer(question, other.answer))
                break
    return {name: Rate(sum(right), len(right)) for name, right in tally.items()}


def wear_clip(clip: Clip, wear: str, rng: np.random.Generator) -> Clip:
    """A worn copy: frames as `wear_out` wears images, or "jpeg" at a quality of `JPEG_QUALITY`.

    A shift of colour is the same in all frames.
    """
    if wear == "jpeg":
        return np.stack([_compressed(frame) for frame in clip])
    if wear == "shift":
        long = clip.reshape(1, -1, 3)
        return wear_out(long, wear, rng).reshape(clip.shape)
    return np.stack([wear_out(frame, wear, rng) for frame in clip])


def _compressed(frame: Clip) -> Clip:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file).convert("RGB"))


def make_wrong_clip(
    config: MotionConfig, rng: np.random.Generator, turn: int
) -> tuple[str, MotionScene, Clip]:
    """A change, a scene, and its clip with that changed; `turn` chooses the change."""
    names = list(CHANGES) if config.max_shapes > 1 else [n for n in CHANGES if n not in OF_TWO]
    name = names[turn % len(names)]
    for _ in range(_TRIES):
        scene = sample_motion(rng, config, "any", shapes=2 if name in OF_TWO else None)
        changed = CHANGES[name](scene, config, rng)
        if changed is not None:
            if isinstance(changed, MotionScene):
                changed = render_motion(changed, config)
            return name, scene, changed
    raise DataError(f"the world has no clip to which the change {name!r} applies: {config}")


def _another(
    scene: MotionScene,
    mover: Mover,
    motions: list[Motion],
    rng: np.random.Generator,
) -> MotionScene | None:
    """The scene with one shape doing one of these instead, at some place with room for it."""
    for _ in range(_TRIES if motions else 0):
        motion = pick(rng, motions)
        other = replace(mover, motion=motion, path=draw_path(rng, motion, scene.frames))
        changed = scene.swap(mover, other)
        if are_apart(changed.movers):
            return changed
    return None


def _direction(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    movers = [mover for mover in scene.movers if mover.motion.way is not None]
    if not movers:
        return None
    mover = pick(rng, movers)
    kind = mover.motion.kind
    ways = [m for m in config.motions if m.kind == kind and m != mover.motion]
    return _another(scene, mover, ways, rng)


def _kind(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    mover = pick(rng, scene.movers)
    kinds = [kind for kind in MOTION_KINDS if kind != mover.motion.kind]
    return _another(scene, mover, [draw_motion(rng, config, [pick(rng, kinds)])], rng)


def _reversed(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    """The frames in reverse order, where that is another clip."""
    kinds = {mover.motion.kind for mover in scene.movers}
    return None if kinds <= {"bounce", "stay"} else render_motion(scene, config)[::-1]


def _look(name: str) -> Change:
    def change(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
        mover = pick(rng, scene.movers)
        return scene.swap(mover, _repainted(scene, mover, name, config, rng))

    return change


def _repainted(
    scene: MotionScene, mover: Mover, name: str, config: MotionConfig, rng: np.random.Generator
) -> Mover:
    if name == "shape":
        return replace(mover, shape=pick(rng, [s for s in config.shapes if s != mover.shape]))
    visible = [c for c in config.colours if stands_out(c, scene.background)]
    return replace(mover, colour=pick(rng, [c for c in visible if c != mover.colour]))


def _halfway(name: str) -> Change:
    """From the middle of the clip on, a shape has another shape or colour."""

    def change(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
        mover = pick(rng, scene.movers)
        if mover.motion.kind in ("appear", "vanish"):
            return None
        other = scene.swap(mover, _repainted(scene, mover, name, config, rng))
        half = scene.frames // 2
        return np.concatenate(
            [render_motion(scene, config)[:half], render_motion(other, config)[half:]]
        )

    return change


def _background(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    grounds = [
        ground
        for ground in config.backgrounds
        if ground != scene.background and all(stands_out(m.colour, ground) for m in scene.movers)
    ]
    return replace(scene, background=pick(rng, grounds)) if grounds else None


def _one_more(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    if len(scene.movers) > 1:
        return None
    still = Motion("stay")
    for _ in range(_TRIES):
        mover = replace(scene.movers[0], motion=still, path=draw_path(rng, still, scene.frames))
        mover = _repainted(scene, mover, "shape", config, rng)
        if are_apart((*scene.movers, mover)):
            return replace(scene, movers=(*scene.movers, mover))
    return None


def _one_less(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    return replace(scene, movers=(pick(rng, scene.movers),))


def _swapped(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    """Two shapes do each what the other should."""
    if len({str(mover.motion) for mover in scene.movers}) < 2:
        return None
    a, b = scene.movers
    other = replace(a, motion=b.motion, path=b.path), replace(b, motion=a.motion, path=a.path)
    return replace(scene, movers=other)


def _gone(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    """A shape is missing in a third of the frames, in the middle of the clip."""
    movers = [m for m in scene.movers if m.motion.kind not in ("appear", "vanish")]
    if not movers:
        return None
    mover = pick(rng, movers)
    missing = scene.frames // 3
    start = (scene.frames - missing) // 2
    path = mover.path[:start] + (None,) * missing + mover.path[start + missing :]
    return scene.swap(mover, replace(mover, path=path))


def _shuffled(scene: MotionScene, config: MotionConfig, rng: np.random.Generator) -> Changed:
    """The frames in random order, where a shape moves."""
    if not any(mover.motion.kind in ("move", "bounce") for mover in scene.movers):
        return None
    order = list(range(scene.frames))
    while np.abs(np.diff(order)).mean() < scene.frames / 4:
        order = shuffled(rng, range(scene.frames))
    return render_motion(scene, config)[order]


CHANGES: dict[str, Change] = {
    "direction": _direction,
    "kind": _kind,
    "shape": _look("shape"),
    "colour": _look("colour"),
    "background": _background,
    "one more": _one_more,
    "one less": _one_less,
    "swapped": _swapped,
    "reversed": _reversed,
    "shape halfway": _halfway("shape"),
    "colour halfway": _halfway("colour"),
    "gone for a while": _gone,
    "frames shuffled": _shuffled,
}
"""Ways in which a wrong clip differs from what was asked for."""
OF_TWO = ("one less", "swapped")
"""Those of clips with two shapes."""
