"""CheckpointDefaults: what a checkpoint is sampled with where a request names nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from neounify.config.checks import require


@dataclass(frozen=True, kw_only=True)
class CheckpointDefaults:
    """Sizes and sampling values of a checkpoint; the defaults are the published models'.

    Areas are in pixels, sizes are (width, height) in pixels. A checkpoint may carry its own values
    in the section `"neounify": {"sampling": {...}}` of its config.json. Raises ConfigError.
    """

    image_size: tuple[int, int] = (2048, 2048)
    """Size of a generated image, multiples of the token side."""
    chat_min_pixels: int = 256**2
    """Smaller input images of a chat are enlarged to this area."""
    chat_max_pixels: int = 2048**2
    """Larger input images of a chat are reduced to this area."""
    edit_min_pixels: int = 512**2
    """Smaller input images of an edit are enlarged to this area."""
    edit_max_pixels: int = 2048**2
    """Larger input images of an edit are reduced to this area."""
    edit_max_total_pixels: int = 4096**2
    """Area of all input images of an edit together."""
    steps: int = 50
    """Denoising steps; at least 1."""
    guidance: float = 4.0
    """Guidance scale of the prompt; 0 to 1 is none."""
    image_guidance: float = 1.0
    """Guidance scale of the input images of an edit; 1 is none."""
    shift: float = 3.0
    """Timestep shift towards noise; above 0, 1 is none."""
    trained_sizes: tuple[tuple[int, int], ...] = ()
    """Sizes the model was trained to generate; empty: not recorded."""
    trained_pixels: tuple[int, int] | None = None
    """(least, greatest) area of training images of any shape; None: not recorded."""

    def __post_init__(self) -> None:
        for low, high in (
            (self.chat_min_pixels, self.chat_max_pixels),
            (self.edit_min_pixels, self.edit_max_pixels),
            (self.edit_min_pixels, self.edit_max_total_pixels),
        ):
            require(1 <= low <= high, f"sampling: pixel bounds {low}..{high} are not a range")
        low, high = self.trained_pixels or (1, 1)
        require(1 <= low <= high, f"sampling.trained_pixels {low}..{high} is not a range")
        require(self.steps >= 1, f"sampling.steps must be at least 1, got {self.steps}")
        require(self.shift > 0, f"sampling.shift must be positive, got {self.shift}")

    def edit_bounds(self, num_images: int) -> tuple[int, int]:
        """(minimum, maximum) area of each of the `num_images` input images of an edit."""
        share = self.edit_max_total_pixels // max(1, num_images)
        return self.edit_min_pixels, min(self.edit_max_pixels, share)

    def check_sizes(self, token_size: int) -> None:
        """ConfigError unless all sizes are multiples of the token side."""

        def fits(size: tuple[int, ...]) -> bool:
            sides = [side >= token_size and side % token_size == 0 for side in size]
            return len(sides) == 2 and all(sides)

        require(
            fits(self.image_size),
            f"sampling.image_size {self.image_size} must be (width, height), multiples of "
            f"{token_size}",
        )
        require(
            all(fits(size) for size in self.trained_sizes),
            f"sampling.trained_sizes {self.trained_sizes} must be (width, height) pairs, "
            f"multiples of {token_size}",
        )
