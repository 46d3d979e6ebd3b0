"""Predictions of the generation stream behind cached prompts, with gradients; frozen copies.

Keys and values of a prompt are constants: where the understanding stream is frozen, they are
computed once and shared by all steps, images of a group and models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neounify.attention import select_for
from neounify.cache import SequenceCache, new_cache
from neounify.checkpoint.load import DECODED
from neounify.checkpoint.names import stream_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.engine.denoiser import groups
from neounify.engine.sequences import ModelInput, Piece
from neounify.engine.understanding import forward_und
from neounify.errors import ConfigError
from neounify.flow.guidance import Branch, Guidance, Velocities
from neounify.flow.path import noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import to_und_pixels
from neounify.lora.layers import HALVES, weight_name
from neounify.model.layout import Grid, Layout, Noise
from neounify.model.neo import ModelBatch, NeoUnify
from neounify.model.parts import GEN
from neounify.pipeline import load
from neounify.post_train.prompts import PromptCase
from neounify.runtime.plan import plan_execution
from neounify.tasks.image import ImageRequest, branch_prompt, edit_images
from neounify.tasks.interleave import InterleaveRequest, turn_prompt
from neounify.tasks.program import Processor
from neounify.text.template import ImageSegment, Prompt
from neounify.text.tokens import IMAGE_CLOSE, IMAGE_OPEN

Key = tuple[object, int | None]
"""A prompt's content: its segments or branch, and which case its images or story are of."""
Prefixes = Mapping[Branch, SequenceCache]
"""KV caches of a prompt's guidance branches."""


class NoisyImages:
    """Noisy images of one size behind cached prompts: layout and attention are planned once.

    `prefixes` is one cache per image, `attention` the name of a backend. Any model that shares the
    understanding stream can be asked.
    """

    def __init__(
        self,
        model: NeoUnify,
        grid: Grid,
        prefixes: Sequence[SequenceCache],
        attention: str = "auto",
    ) -> None:
        self.grid, self.count = grid, len(prefixes)
        self.sigma = noise_scale(grid.length, model.config.flow)
        self.layout = Layout(cache.document(Noise.of(grid)) for cache in prefixes)
        self.attend = select_for(model, attention).plan(self.layout, prefixes)

    def clean(
        self, model: NeoUnify, z: Float[Tensor, "images n ccc"], t: Float[Tensor, " images"]
    ) -> Float[Tensor, "images n ccc"]:
        """x̂ of a model at z and t, float32."""
        return self.clean_and_states(model, z, t)[0]

    def clean_and_states(
        self, model: NeoUnify, z: Float[Tensor, "images n ccc"], t: Float[Tensor, " images"]
    ) -> tuple[Float[Tensor, "images n ccc"], Float[Tensor, "images n d"]]:
        """x̂ of a model at z and t, float32, and the states that its image head read."""
        batch = ModelBatch(
            layout=self.layout,
            attend=self.attend,
            z=z.flatten(0, 1),
            t=t,
            noise_scale=torch.full_like(t, self.sigma),
        )
        output = model(batch)
        clean, states = output.clean, output.states
        return clean.float().unflatten(0, (self.count, -1)), states.unflatten(0, (self.count, -1))


class GuidedImages:
    """`NoisyImages` behind the prompts of all guidance branches, which run as one batch."""

    def __init__(
        self,
        model: NeoUnify,
        grid: Grid,
        prefixes: Sequence[Prefixes],
        guidance: Guidance,
        attention: str = "auto",
    ) -> None:
        self.guidance, self.images = guidance, len(prefixes)
        self.branches = guidance.branches()
        caches = [p[branch] for branch in self.branches for p in prefixes]
        self.noisy = NoisyImages(model, grid, caches, attention)

    def velocity(
        self,
        model: NeoUnify,
        z: Float[Tensor, "images n ccc"],
        t: Float[Tensor, " images"] | float,
    ) -> Float[Tensor, "images n ccc"]:
        """The guided velocity of a model at z and t < 1, of each image or of all."""
        times, branches = self._times(t, z), len(self.branches)
        clean = self.noisy.clean(model, z.repeat(branches, 1, 1), times.repeat(branches))
        s = (1 - times).view(-1, 1, 1)
        v = {b: (x - z) / s for b, x in zip(self.branches, clean.chunk(branches), strict=True)}
        if branches == 1:
            return v["cond"]
        if not isinstance(t, Tensor):
            return self._guided(v, t)
        each = enumerate(t.tolist())
        return torch.stack([self._guided({b: v[b][i] for b in v}, at) for i, at in each])

    def clean(
        self,
        model: NeoUnify,
        z: Float[Tensor, "images n ccc"],
        t: Float[Tensor, " images"] | float,
    ) -> Float[Tensor, "images n ccc"]:
        """The guided x̂ of a model at z and t < 1."""
        return z + (1 - self._times(t, z)).view(-1, 1, 1) * self.velocity(model, z, t)

    def _times(self, t: Tensor | float, z: Tensor) -> Float[Tensor, " images"]:
        """t of each image; a number is not copied from the host."""
        return t if isinstance(t, Tensor) else z.new_full((self.images,), t, dtype=torch.float32)

    def _guided(self, v: Velocities, t: float) -> Tensor:
        if not self.guidance.acts_at(t):
            return v["cond"]
        return self.guidance.combine(v, first_step=t == 0)


@torch.no_grad()
def prefill(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    requests: Sequence[ImageRequest],
) -> list[dict[Branch, SequenceCache]]:
    """KV caches of the branches that each request's guidance needs; equal prompts share theirs."""
    known: dict[Key, ModelInput] = {}
    wanted: list[dict[Branch, Key]] = []
    for case, request in zip(cases, requests, strict=True):
        images = edit_images(processor, request.images) if request.images else []
        keys: dict[Branch, Key] = {}
        key: Key
        for branch in request.sampling.guidance.branches():
            if case.preceding is not None and branch != "uncond":
                key = (branch, id(case))
                read = interleaved_prompt(model, processor, case, request, branch)
            else:
                prompt = branch_prompt(processor, request, branch)
                key = (prompt.segments, id(case) if prompt.n_images else None)
                read = TokenPrompt.of(model, prompt, images)
            keys[branch] = key
            if key not in known:
                known[key] = read.model_input(model)
        wanted.append(keys)
    prefill_all(model, known.values())
    return [
        {branch: cast(SequenceCache, known[key].cache) for branch, key in keys.items()}
        for keys in wanted
    ]


@torch.no_grad()
def prefill_all(model: NeoUnify, inputs: Iterable[ModelInput]) -> None:
    """Append every input to its cache, in calls of limited size."""
    limit = plan_execution(model.config, model.device, model.compute_dtype).prefill_rows
    for group in groups(inputs, lambda item: sum(s.length for s in item.spans), limit):
        forward_und(model, group)


@dataclass(frozen=True, eq=False)
class TokenPrompt:
    """A prompt as the model reads it: text ids and prepared images in order."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, model: NeoUnify, prompt: Prompt, images: Sequence[Tensor]) -> TokenPrompt:
        """A prompt with its images [channels, height, width]."""
        pieces: list[Piece] = []
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment):
                image = images[segment.image]
                pieces.append(Piece(image=image, grid=model.token_grid(image)))
            else:
                pieces.append(Piece(ids=list(segment.ids)))
        return cls(tuple(pieces))

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(piece.tokens for piece in self.pieces)

    def followed_by(self, ids: Sequence[int]) -> TokenPrompt:
        """The prompt and further text."""
        return TokenPrompt((*self.pieces, Piece(ids=list(ids)))) if ids else self

    def with_image(self, model: NeoUnify, image: Float[Tensor, "c h w"]) -> TokenPrompt:
        """The prompt and an image, normalised for the understanding stream."""
        return TokenPrompt((*self.pieces, Piece(image=image, grid=model.token_grid(image))))

    def model_input(self, model: NeoUnify, capacity: int | None = None) -> ModelInput:
        """The input of a call, behind a new cache of `capacity` tokens, by default its own."""
        cache = new_cache(model, self.length if capacity is None else capacity)
        return ModelInput.of(cache, self.pieces)


def interleave_request(
    case: PromptCase, sampling: ResolvedSampling, *, think: bool = False
) -> InterleaveRequest:
    """The request for an interleaved answer of a case."""
    return InterleaveRequest(
        prompt=case.prompt,
        sizes=((case.width, case.height),),
        sampling=sampling,
        images=case.images,
        think=think,
    )


def interleaved_prompt(
    model: NeoUnify, processor: Processor, case: PromptCase, request: ImageRequest, branch: Branch
) -> TokenPrompt:
    """What the image that is wanted follows in an interleaved answer: all before it, and `<img>`.

    As `tasks.interleave` has it: branch "cond" sees texts and images, "image" images alone.
    """
    assert case.preceding is not None
    turn = turn_prompt(processor, interleave_request(case, request.sampling), branch)
    images = edit_images(processor, case.images) if case.images else []
    prompt = TokenPrompt.of(model, turn, images)
    for part in case.preceding:
        if isinstance(part, str):
            text = processor.tokenizer.encode(part) if branch == "cond" else []
            prompt = prompt.followed_by([*text, processor.token(IMAGE_OPEN)])
        else:
            pixels = to_und_pixels(part, processor.dtype, model.config.und_pixels)
            prompt = prompt.with_image(model, pixels)
            prompt = prompt.followed_by([processor.token(IMAGE_CLOSE)])
    return prompt


def frozen_copy(model: NeoUnify) -> NeoUnify:
    """A copy whose frozen parameters are those of the model and whose others are frozen copies.

    A reference, an old policy or a teacher thus costs the memory of what is trained: of adapters
    with LoRA, of the generation stream otherwise.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared)
    for parameter in twin.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
            parameter.grad = None
    return twin.eval()


@torch.no_grad()
def adopt_weights(twin: NeoUnify, other: NeoUnify) -> None:
    """Give a copy the weights of another model of its shape; adapters that only it has stay.

    Frozen weights are then those of `other` itself, the others copies.
    """
    theirs = dict(other.named_parameters())
    for name, parameter in list(twin.named_parameters()):
        if name not in theirs:
            continue
        if parameter.requires_grad:
            parameter.copy_(theirs[name])
        else:
            module, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(module), leaf, theirs[name])


@torch.no_grad()
def move_towards(model: NeoUnify, twin: NeoUnify, decay: float) -> None:
    """twin ← decay·twin + (1 - decay)·model, of the parameters that are trained."""
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            theirs[name].lerp_(parameter, 1 - decay)


def load_teacher(folder: Path, model: NeoUnify) -> NeoUnify:
    """The model of a checkpoint, frozen, for prompts that `model` has cached.

    Its understanding stream must be that of `model`, whose memory it then shares. Raises
    ConfigError for another shape or another understanding stream.
    """
    loaded = load(folder, dtype=model.compute_dtype, device=model.device, backend=DECODED)
    teacher = loaded.model
    ours, theirs = _check_shapes(folder, model, teacher)
    for name, a in ours.items():
        b = theirs[name]
        if stream_of(name) == GEN:
            continue
        if not torch.equal(a, b):
            raise ConfigError(
                f"the teacher {folder} has another understanding stream than the model ({name} "
                "differs), so it cannot share cached prompts; both must start from one model"
            )
        module, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(module), leaf, a)
    for name, parameter in theirs.items():
        if stream_of(name) == GEN:
            parameter.requires_grad_(False)
    return teacher.eval()


def check_teacher(folder: Path, model: NeoUnify) -> None:
    """Raise ConfigError for a teacher of another shape, CheckpointError for one that is none.

    Only headers are read.
    """
    config = CheckpointFolder.open(folder).config
    with torch.device("meta"):
        _check_shapes(folder, model, NeoUnify(config))


def _check_shapes(
    folder: Path, model: NeoUnify, teacher: NeoUnify
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters of a model, without adapters, and of its teacher, by name.

    The teacher's experts are stacked like the model's. Raises ConfigError for another shape.
    """
    teacher.stack_experts_like(model)
    ours = {
        weight_name(name): parameter
        for name, parameter in model.named_parameters()
        if not name.endswith(HALVES)
    }
    theirs = dict(teacher.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            raise ConfigError(
                f"the teacher {folder} has another shape than the model: {name} is "
                f"{_shape(b)} there and {_shape(a)} here"
            )
    return ours, theirs


def _shape(parameter: Tensor | None) -> str:
    return "absent" if parameter is None else str(list(parameter.shape))
