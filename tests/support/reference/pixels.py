"""Images to token vectors and back, and the embedding of one number."""

from __future__ import annotations

import math

import numpy as np

from support.reference.pieces import Array, Facts, Weights, gelu, linear, rotate_adjacent, silu

SINUSOIDS = 128
PERIOD = 10000.0


def patches_of(pixels: Array, patch: int) -> Array:
    """Cut [C, H, W] into [rows, columns, C, P, P]."""
    channels, height, width = pixels.shape
    grid = np.zeros((height // patch, width // patch, channels, patch, patch))
    for row in range(height // patch):
        for column in range(width // patch):
            top, left = row * patch, column * patch
            grid[row, column] = pixels[:, top : top + patch, left : left + patch]
    return grid


def patch_features(pixels: Array, weights: Weights, name: str, facts: Facts) -> Array:
    """The first convolution and GELU, before the rotation: [rows, columns, channels]."""
    grid = patches_of(pixels, facts.patch)
    kernel = weights[f"{name}.patch_embedding.weight"]
    bias = weights[f"{name}.patch_embedding.bias"]
    rows, columns = grid.shape[:2]
    features = np.zeros((rows, columns, len(kernel)))
    for row in range(rows):
        for column in range(columns):
            for channel in range(len(kernel)):
                total = float((kernel[channel] * grid[row, column]).sum())
                features[row, column, channel] = total + bias[channel]
    return gelu(features)


def rotate_patches(features: Array, facts: Facts) -> Array:
    """Rotate the first half of the channels by the column, the second half by the row."""
    half = features.shape[2] // 2
    out = np.empty_like(features)
    base = facts.theta_vision
    for row in range(features.shape[0]):
        for column in range(features.shape[1]):
            vector = features[row, column]
            out[row, column, :half] = rotate_adjacent(vector[:half], column, base)
            out[row, column, half:] = rotate_adjacent(vector[half:], row, base)
    return out


def patch_embed(pixels: Array, weights: Weights, gen: bool, facts: Facts) -> Array:
    """Turn an image [3, H, W] into its token vectors [h·w, D], row by row."""
    name = "fm_modules.vision_model_mot_gen" if gen else "vision_model"
    name += ".embeddings"
    features = rotate_patches(patch_features(pixels, weights, name, facts), facts)
    kernel = weights[f"{name}.dense_embedding.weight"]
    bias = weights[f"{name}.dense_embedding.bias"]
    merge = facts.merge
    out: list[Array] = []
    for row in range(features.shape[0] // merge):
        for column in range(features.shape[1] // merge):
            vector = bias.copy()
            for i in range(merge):
                for j in range(merge):
                    patch = features[row * merge + i, column * merge + j]
                    vector = vector + kernel[:, :, i, j] @ patch
            out.append(vector)
    return np.array(out)


def tube_rows(frames: Array, per_tube: int, side: int) -> Array:
    """Cut frames [n, C, H, W] into tubes: rows of numbers in order (frame, row, column, channel).

    A last tube that is not full repeats the last frame.
    """
    count, channels, height, width = frames.shape
    out: list[list[float]] = []
    for tube in range(-(-count // per_tube)):
        for top in range(0, height, side):
            for left in range(0, width, side):
                row: list[float] = []
                for number in range(per_tube):
                    frame = frames[min(tube * per_tube + number, count - 1)]
                    for y in range(side):
                        for x in range(side):
                            for channel in range(channels):
                                row.append(frame[channel, top + y, left + x])
                out.append(row)
    return np.array(out)


def frames_of(rows: Array, per_tube: int, height: int, width: int, side: int) -> Array:
    """Put rows of tubes back into frames [n, 3, H, W], the inverse of `tube_rows`."""
    per_frame = (height // side) * (width // side)
    out = np.zeros((len(rows) // per_frame * per_tube, 3, height, width))
    for index, row in enumerate(rows):
        tube, cell = divmod(index, per_frame)
        top, left = cell // (width // side) * side, cell % (width // side) * side
        values = iter(row)
        for number in range(per_tube):
            for y in range(side):
                for x in range(side):
                    for channel in range(3):
                        out[tube * per_tube + number, channel, top + y, left + x] = next(values)
    return out


def sinusoids(t: float) -> Array:
    """[cos(t·f), sin(t·f)] with f_i = 10000^(−i/128)."""
    angles = [t * PERIOD ** (-i / SINUSOIDS) for i in range(SINUSOIDS)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def scalar_embed(value: float, weights: Weights, name: str) -> Array:
    """Linear, SiLU, Linear on the sinusoids of one number."""
    hidden = silu(linear(sinusoids(value), weights, f"fm_modules.{name}.mlp.0"))
    return linear(hidden, weights, f"fm_modules.{name}.mlp.2")


def flow_head(hidden: Array, rows: int, columns: int, weights: Weights, side: int) -> Array:
    """Each token's vector is its pixel block in order (row, column, channel)."""
    channels = weights["fm_modules.fm_head.2.bias"].shape[0] // side**2
    out = np.zeros((channels, rows * side, columns * side))
    for token, vector in enumerate(hidden):
        inner = gelu(linear(vector, weights, "fm_modules.fm_head.0"))
        values = linear(inner, weights, "fm_modules.fm_head.2")
        top, left = token // columns * side, token % columns * side
        for y in range(side):
            for x in range(side):
                for channel in range(channels):
                    index = (y * side + x) * channels + channel
                    out[channel, top + y, left + x] = values[index]
    return out


def pixel_shuffle(image: Array, factor: int) -> Array:
    """[c·r², h, w] -> [c, h·r, w·r] by index arithmetic."""
    channels, height, width = image.shape
    out = np.zeros((channels // factor**2, height * factor, width * factor))
    for channel in range(channels):
        to, rest = divmod(channel, factor**2)
        dy, dx = divmod(rest, factor)
        out[to, dy::factor, dx::factor] = image[channel]
    return out


def conv3x3(image: Array, weights: Weights, name: str) -> Array:
    """A 3×3 convolution with bias and a border of zeros, as nine weighted sums."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    _, height, width = image.shape
    padded = np.zeros((len(image), height + 2, width + 2))
    padded[:, 1:-1, 1:-1] = image
    out = np.zeros((len(kernel), height, width)) + bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + height, dx : dx + width].reshape(len(image), -1)
            out += (kernel[:, :, dy, dx] @ shifted).reshape(out.shape)
    return out


def pixel_head(
    hidden: Array, rows: int, columns: int, weights: Weights, shuffles: tuple[int, int, int]
) -> Array:
    """Shuffle, convolve, GELU, shuffle, convolve, shuffle on the D × h × w map."""
    first, second, third = shuffles
    image = np.zeros((hidden.shape[1], rows, columns))
    for token, vector in enumerate(hidden):
        image[:, token // columns, token % columns] = vector
    image = conv3x3(pixel_shuffle(image, first), weights, "fm_modules.fm_head.conv1")
    image = conv3x3(pixel_shuffle(gelu(image), second), weights, "fm_modules.fm_head.conv2")
    return pixel_shuffle(image, third)
