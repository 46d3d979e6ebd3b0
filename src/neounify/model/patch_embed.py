"""Pixels to tokens: a patch convolution, a rotation by place, a merging convolution.

Both convolutions have stride = kernel, so each is a matrix product on patches
that are already cut out; any number of images of any size goes through one call.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from neounify.config import ModelConfig
from neounify.model.rope import rotate_patches


class PatchEmbed(nn.Module):
    """One stream's image embedding; D is the model's width, P and M patch and merge side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, patch, merge = config.vision_hidden_size, config.patch_size, config.merge
        self.patch = nn.Conv2d(config.channels, hidden, patch, stride=patch)
        self.merge = nn.Conv2d(hidden, config.hidden_size, merge, stride=merge)
        self.theta = config.rope_theta_vision

    def forward(
        self, patches: Float[Tensor, "n mm cpp"], places: Int[Tensor, "n mm 2"]
    ) -> Float[Tensor, "n d"]:
        """Embed N tokens of M·M patches each.

        `patches` holds pixels in order (channel, row, column); `places` the (row,
        column) of each patch in its image, in patch units.
        """
        rows, columns = places.flatten(0, 1).unbind(-1)
        x = gelu(linear(patches.flatten(0, 1), self.patch.weight.flatten(1), self.patch.bias))
        x = rotate_patches(x, rows, columns, self.theta)
        # [N, MM, hidden] -> [N, hidden, MM]: the order of the merging convolution's weight.
        x = x.unflatten(0, patches.shape[:2]).transpose(1, 2).flatten(1)
        return linear(x, self.merge.weight.flatten(1), self.merge.bias)


def token_patches(
    image: Float[Tensor, "c height width"], patch: int, merge: int
) -> Float[Tensor, "n mm cpp"]:
    """Cut one image into tokens of merge × merge patches, pixels as (channel, row, column)."""
    channels, height, width = image.shape
    side = patch * merge
    rows, columns = height // side, width // side
    cut = image.view(channels, rows, merge, patch, columns, merge, patch).permute(
        1, 4, 2, 5, 0, 3, 6
    )
    return cut.reshape(rows * columns, merge**2, channels * patch**2)
