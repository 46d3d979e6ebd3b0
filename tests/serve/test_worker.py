"""How a worker shares its time between text and images."""

from __future__ import annotations

from collections.abc import Sequence

import neounify
from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine, GenerationSettings
from neounify.engine.messages import (
    Command,
    Decode,
    LocalTransport,
    Prefill,
    Reply,
    Report,
    TextInput,
)
from neounify.engine.understanding import UnderstandingEngine, UnderstandingSettings
from neounify.serve.engines import Worker

NAME = (1, "cond")


class Script:
    """A channel that gives one list of commands and hangs up when nothing is left to do."""

    def __init__(self, commands: list[Command]) -> None:
        self.commands: list[list[Command]] = [commands]

    def receive(self, *, wait: bool) -> list[Command] | None:
        if self.commands:
            return self.commands.pop()
        return None if wait else []

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        pass


class Painting(GenerationEngine):
    """Has images for some steps, and notes which of the steps were to be short."""

    def __init__(self, pipe: neounify.Pipeline, steps: int) -> None:
        super().__init__(pipe.model, GenerationSettings(), LocalTransport())
        self.left, self.short = steps, list[bool]()

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self, *, beside_text: bool = False) -> None:
        self.left -= 1
        self.short.append(beside_text)


def steps_beside(pipe: neounify.Pipeline, then: Decode | None) -> list[bool]:
    command = Prefill(1, {NAME: (TextInput((1, 2, 3)),)}, {NAME: 8}, then)
    understanding = UnderstandingEngine(pipe.model, UnderstandingSettings(), LocalTransport())
    painting = Painting(pipe, 4)
    Worker(Script([command]), understanding, painting).run()
    return painting.short


def test_denoising_steps_are_short_beside_text(pipe: neounify.Pipeline) -> None:
    then = Decode(1, NAME, TextSampling(), frozenset(), 2)
    assert steps_beside(pipe, then) == [True] * 4


def test_prompts_of_images_are_no_text(pipe: neounify.Pipeline) -> None:
    """Else images that arrive would keep those under way from sharing their steps."""
    assert steps_beside(pipe, None) == [False] * 4
