"""Packs with clips: their noise, the loss of mixed packs, and a step that learns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from neounify.attention import select_for
from neounify.config import VideoConfig
from neounify.config.presets import SCENES
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.loader import Pack, make_pack
from neounify.data.sample import Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.distributed.sequence import Share
from neounify.image.clips import tube_rows
from neounify.model import NeoUnify
from neounify.model.layout import Rows
from neounify.model.parts import GEN, StreamName
from neounify.model.stream import Projected
from neounify.text import byte_tokenizer
from neounify.train.loss import Counts, LossConfig, Metrics, add_noise, loss_of
from neounify.train.speed import StepOperations
from neounify.train.weights import new_model
from support.models import TINY_CHANGES, one_thread

__all__ = ["one_thread"]  # a fixture

CONFIG = SCENES.replace(**TINY_CHANGES, video=VideoConfig(tube_frames=4, und=True))
ENCODER = Encoder(
    config=CONFIG,
    tokenizer=byte_tokenizer(vocab_size=264),
    dropout=GuidanceDropout(text=0.0, all=0.0),
)
CLIP = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
IMAGE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)


def user(*parts: SampleText | SampleClip) -> Turn:
    return Turn("user", parts)


def answer(part: SampleText | SampleClip | SampleImage) -> Turn:
    return Turn("assistant", (part,))


ASK = user(SampleText("a star"))
T2V = Sample("t2v", (ASK, answer(SampleClip(CLIP, "target", fps=16))))
T2I = Sample("t2i", (ASK, answer(SampleImage(IMAGE, "target"))))
QUESTION = Sample(
    "video_qa",
    (user(SampleClip(CLIP, "input"), SampleText("Where?")), answer(SampleText("left", True))),
)
NEXT = Sample(
    "next_frames",
    (
        user(SampleClip(CLIP[:4], "input"), SampleText("a star")),
        answer(SampleClip(CLIP[4:], "target")),
    ),
)


def pack_of(*samples: Sample) -> Pack:
    rng = np.random.default_rng(0)
    return make_pack([ENCODER(sample, rng) for sample in samples])


@pytest.fixture(scope="module")
def model() -> NeoUnify:
    return new_model(CONFIG, 0)


def loss(model: NeoUnify, pack: Pack, *, fixed: bool = False) -> torch.Tensor:
    config = LossConfig(t_std=0.0) if fixed else LossConfig()
    counts = Counts.of([pack])
    return loss_of(model, pack, config, counts, torch.Generator().manual_seed(0), Metrics())


def test_noised_clips_lie_between_noise_and_frames() -> None:
    noised = add_noise(pack_of(T2V), CONFIG, LossConfig(), torch.Generator().manual_seed(0))
    frames = torch.from_numpy(CLIP).movedim(-1, 1).float() / 127.5 - 1
    torch.testing.assert_close(noised.clean, tube_rows(frames, 16, 4))
    t, sigma = noised.t[0], noised.noise_scale[0]
    noise = (noised.z - t * noised.clean) / ((1 - t) * sigma)
    assert abs(noise.std().item() - 1) < 0.05
    assert noised.padding is None


def test_rows_of_images_are_padded_beside_clips() -> None:
    pack = pack_of(T2I, T2V)
    noised = add_noise(pack, CONFIG, LossConfig(), torch.Generator().manual_seed(0))
    assert noised.clean.shape == (4 + 8, 4 * 768)
    assert noised.clean[:4, 768:].abs().max() == 0
    assert noised.padding is not None
    assert noised.padding.tolist() == [4.0, 1.0]


def test_the_loss_of_a_mixed_pack_is_that_of_its_parts(
    model: NeoUnify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of an image and a tube weigh the same, whatever their number of pixels."""
    # Without noise, z does not depend on what else is drawn in a pack.
    monkeypatch.setattr("neounify.train.loss.torch.randn", no_noise)
    mixed = loss(model, pack_of(T2I, T2V, QUESTION, NEXT), fixed=True)
    parts = [loss(model, pack_of(sample), fixed=True) for sample in (T2I, T2V, NEXT)]
    labels = loss(model, pack_of(QUESTION), fixed=True)
    weights = [pack_of(sample).layout[GEN].length for sample in (T2I, T2V, NEXT)]
    image = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
    torch.testing.assert_close(mixed, image + labels, rtol=1e-5, atol=1e-6)


def no_noise(*shape: object, **options: object) -> torch.Tensor:
    generator = options.get("generator")
    assert isinstance(generator, torch.Generator)
    size = shape[0] if isinstance(shape[0], torch.Size) else torch.Size((int(str(shape[0])),))
    return torch.zeros(size)


def test_every_weight_of_clips_has_a_gradient(model: NeoUnify) -> None:
    pack = pack_of(T2I, T2V, QUESTION, NEXT)
    model.zero_grad()
    loss(model, pack).backward()
    for name in ("und_tube.proj.weight", "gen_tube.proj.weight", "video_head.linear.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
    model.zero_grad()


def test_steps_on_one_clip_lower_its_loss() -> None:
    torch.manual_seed(0)
    learner = new_model(CONFIG, 1)
    pack = pack_of(T2V)
    optimizer = torch.optim.AdamW(learner.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(learner, pack, fixed=True)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]


def test_operations_count_tubes_by_their_own_layers(model: NeoUnify) -> None:
    """8 tubes in their embedding, whose input has no gradient, and in their head."""
    operations = StepOperations(model)
    tube = 4 * 768 * 32
    assert operations.patches[GEN, "tube"].operations(8) == 2 * tube * 8 * 2
    assert operations.heads["tube"].operations(8) == 2 * tube * 8 * 3
    clip, image = (operations.of(pack_of(sample)) for sample in (T2V, T2I))
    assert clip > image + 2 * (2 * 8 - 4) * operations.layers[GEN].weights


def test_shares_of_a_mixed_pack_add_up_to_its_loss(model: NeoUnify) -> None:
    """Two halves of the rows, each with the keys of all, as two ranks compute them."""
    pack = pack_of(T2I, T2V, QUESTION, NEXT)
    config, counts = LossConfig(), Counts.of([pack])
    whole = loss(model, pack)
    shares = []
    lengths = pack.layout.lengths
    for number in (0, 1):
        rows = {n: range(number * (c // 2), c if number else c // 2) for n, c in lengths.items()}
        share = Share(_Whole(model, pack, rows), rows)
        generator = torch.Generator().manual_seed(0)
        shares.append(loss_of(model, pack, config, counts, generator, None, None, share))
    torch.testing.assert_close(sum(shares), whole)


class _Whole:
    """Attention of some rows whose keys and values are those that the whole pack has."""

    def __init__(self, model: NeoUnify, pack: Pack, rows: Rows) -> None:
        self.rows, self.seen = rows, self._record(model, pack)

    def _record(self, model: NeoUnify, pack: Pack) -> dict[int, Mapping[StreamName, Tensor]]:
        plan = select_for(model).plan(pack.layout)
        seen: dict[int, Mapping[StreamName, Tensor]] = {}

        def attend(
            layer: int, streams: Mapping[StreamName, Projected]
        ) -> Mapping[StreamName, Tensor]:
            seen[layer] = plan(layer, streams)
            return seen[layer]

        whole = Share(attend, None)
        generator = torch.Generator().manual_seed(0)
        loss_of(model, pack, LossConfig(), Counts.of([pack]), generator, None, None, whole)
        return seen

    def __call__(
        self, layer: int, streams: Mapping[StreamName, Projected]
    ) -> dict[StreamName, Tensor]:
        return {
            name: self.seen[layer][name][self.rows[name].start : self.rows[name].stop]
            for name in streams
        }
