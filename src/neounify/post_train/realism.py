"""GAN head of DMD2: a logit of how real an image is, from the fake's states of it with noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import gelu, softplus

from neounify.errors import CheckpointError, ConfigError
from neounify.image.pixels import RGB, patchify
from neounify.post_train.prompts import PromptCase

WIDTH = 128


class RealismHead(nn.Module):
    """Mean over an image's tokens of a small MLP, and a logit: real images have high ones.

    Its weights are drawn from `seed`.
    """

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, WIDTH)
        self.outer = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, states: Float[Tensor, "images n d"]) -> Float[Tensor, " images"]:
        """The logit of each image from the generation stream's last states of its tokens."""
        pooled = gelu(self.inner(self.norm(states.float()))).mean(1)
        logits: Tensor = self.outer(pooled)[:, 0]
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """Its weights for a saved state."""
        return {f"head.{name}": parameter.detach() for name, parameter in self.named_parameters()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them. Raises CheckpointError."""
        for name, tensor in self.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != tensor.shape:
                raise CheckpointError(f"the state has no {name} of shape {list(tensor.shape)}")
            tensor.copy_(saved)


def student_realism_loss(generated: Float[Tensor, " images"]) -> Float[Tensor, " images"]:
    """softplus(-D(x)) of the student's images."""
    return softplus(-generated)


def head_loss(
    real: Float[Tensor, " images"], generated: Float[Tensor, " images"]
) -> Float[Tensor, " images"]:
    """softplus(-D(real)) + softplus(D(x))."""
    return softplus(-real) + softplus(generated)


def real_tokens(
    cases: Sequence[PromptCase], token_size: int, device: torch.device
) -> Float[Tensor, "images n ccc"]:
    """Tokens in [-1, 1] of a real image of each case, in the case's size, which is that of all.

    Raises ConfigError for a case that has none.
    """
    arrays = []
    for case in cases:
        if case.real is None:
            raise ConfigError(
                f"method.gan: the prompt {case.prompt[:80]!r} has no real image; give every line "
                'of the prompts an "image", or gan = 0'
            )
        image = case.real().convert("RGB")
        size = (case.width, case.height)
        if image.size != size:
            image = image.resize(size, PIL.Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image))
    pixels = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)
    return patchify(pixels.float() / 127.5 - 1, token_size, RGB)


@contextmanager
def without_gradient(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Parameters that a graph recorded inside gives no gradient; trained ones before and after."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
