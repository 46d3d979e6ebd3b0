"""Requests of the load: chats about scenes and images of scenes, each different.

Request `number` is the same whenever it is asked for.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from neounify.scenes.world import (
    FULL_STYLE,
    PRESETS,
    Scene,
    caption,
    facts_of,
    render,
    sample_rng,
    sample_scene,
)

Kind = Literal["chat", "paint"]

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
EDITS = "/v1/images/edits"
QUESTION = "Describe everything in the picture."
MOST_TOKENS = 128
PAINT_EVERY = 5
"""One request in so many generates an image: 20 %."""
TEXT_ONLY_EVERY = 4
"""One chat in so many has no image."""
WARM_UP = 1_000_000
"""Numbers from here on are those of requests that do not count."""

_WORLD = PRESETS["default"]
_SEED = 4


@dataclass(frozen=True)
class Call:
    """One HTTP request to send."""

    kind: Kind
    path: str
    body: dict[str, Any]


def chat(number: int, *, stream: bool = True) -> Call:
    """A question about the image of a scene, or every now and then a text without one."""
    scene = _scene(number)
    content: Any = _sentence(scene)
    if number % TEXT_ONLY_EVERY:
        image = {"type": "image_url", "image_url": {"url": _data_url(scene)}}
        content = [image, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MOST_TOKENS,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Call("chat", CHAT, body)


def paint(number: int, **fields: Any) -> Call:
    """The generation of a scene with the model's default settings, except for `fields`."""
    body = {"prompt": _sentence(_scene(number)), "seed": number}
    return Call("paint", IMAGES, body | fields)


def edit(number: int, **fields: Any) -> Call:
    """The image of a scene to edit."""
    body = {
        "prompt": "Remove the largest shape.",
        "images": [{"image_url": _data_url(_scene(number))}],
        "seed": number,
    }
    return Call("paint", EDITS, body | fields)


def story(number: int, **fields: Any) -> Call:
    """An answer in text and at most one image."""
    content = f"Tell a story in one picture. It starts with {_sentence(_scene(number))}."
    body = {
        "messages": [{"role": "user", "content": content}],
        "modalities": ["text", "image"],
        "max_images": 1,
        "max_tokens": MOST_TOKENS,
        "seed": number,
    }
    return Call("chat", CHAT, body | fields)


def mixed(number: int) -> Call:
    """80 % chat, 20 % image generation."""
    return paint(number) if number % PAINT_EVERY == PAINT_EVERY - 1 else chat(number)


def all_mixed(first: int = 0) -> Iterator[Call]:
    """Requests of the mix without end."""
    return map(mixed, itertools.count(first))


def _scene(number: int) -> Scene:
    return sample_scene(sample_rng(_SEED, number), _WORLD)


def _sentence(scene: Scene) -> str:
    return caption(facts_of(scene, _WORLD, FULL_STYLE))


def _data_url(scene: Scene) -> str:
    file = BytesIO()
    Image.fromarray(render(scene, _WORLD)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
