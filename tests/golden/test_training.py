"""Training against the recorded step of PixelUMM: documents, losses, gradients of every weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neounify
from neounify.checkpoint.names import to_published
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.loader import Pack, make_pack
from neounify.data.sample import Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.flow.path import noisy
from neounify.image.clips import join_rows
from neounify.model.layout import Kind
from neounify.model.neo import ModelOutput, NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.train import loss as losses
from neounify.train.loss import Counts, LossConfig, Metrics, Noised, loss_of
from support.golden import checkpoint, load_fixture, needs_golden
from support.golden_steps import SINGLE_PASS, visibility
from support.models import assert_close, one_thread

__all__ = ["one_thread"]  # a fixture

FAMILY = "pixelumm"
NAMES = ("tiny-f18", "tiny-f22")
both = pytest.mark.parametrize("name", NAMES)
pytestmark = needs_golden
INSTRUCTION = "Generate a high-quality image based on the following description:\n"
OBJECTIVE = LossConfig(
    text_weight=1.0,
    image_mean="images",
    t_mean=0.0,
    t_std=1.0,
    side_shifts=((256, 1.0), (640, 2.0), (960, 3.0)),
)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, neounify.Pipeline]:
    root = tmp_path_factory.mktemp("training")
    folders = {name: checkpoint(name, root, FAMILY) for name in NAMES}
    return {name: neounify.load(path, config=path / "llm") for name, path in folders.items()}


def _sample(task: str, question: list[Any], answer: Any) -> Sample:
    turns = Turn("user", tuple(question)), Turn("assistant", (answer,))
    return Sample(task, turns, task)


def _documents(pipe: neounify.Pipeline, recorded: dict[str, Tensor]) -> list[Encoded]:
    """The recorded samples: an image, a question, a clip without its caption, a clip to look at."""
    pixels = {
        name: recorded[name].numpy()
        for name in ("picture_gen", "picture_und", "clip_gen", "clip_und")
        if name in recorded
    }
    painted = SampleImage(pixels["picture_gen"], "target")
    shown = SampleImage(pixels["picture_und"], "input")
    samples = [
        _sample("t2i", [SampleText(f"{INSTRUCTION}a lamp")], painted),
        _sample("vqa", [shown, SampleText("What is this?")], SampleText("A dark lamp.", loss=True)),
        _sample("t2v", [SampleText("dropped")], SampleClip(pixels["clip_gen"], "target", 24.0)),
    ]
    if "clip_und" in pixels:
        clip = SampleClip(pixels["clip_und"], "input", 4.0, tubes=True)
        samples.append(_sample("video_qa", [clip, SampleText("And?")], SampleText("Rain.", True)))
    documents = []
    for sample in samples:
        encoder = Encoder(
            config=pipe.config,
            tokenizer=pipe.processor.tokenizer,
            system_message=pipe.processor.system_message,
            dropout=GuidanceDropout(text=float(sample.task == "t2v"), all=0.0),
            target_pixels=(256, 10_000),
            input_pixels=(256, 10_000),
        )
        documents.append(encoder(sample, np.random.default_rng(0)))
    return documents


@both
def test_documents(name: str, pipes: dict[str, neounify.Pipeline]) -> None:
    """Ids, kinds, positions, labels, sizes and visible tokens of every row."""
    recorded, facts = load_fixture(name, "train", FAMILY)
    documents = _documents(pipes[name], recorded)
    assert [document.length for document in documents] == facts["sample_lens"]
    pack = make_pack(documents)
    assert pack.ids.tolist() == recorded["packed_text_ids"].tolist()
    assert pack.label_ids.tolist() == recorded["packed_label_ids"].tolist()
    order = _packed_order(pack)
    positions = torch.cat([pack.layout[stream].positions.float() for stream in (UND, GEN)])
    assert torch.equal(positions[order].T, recorded["packed_mrope_position_ids"].float())
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order))
    assert where[pack.label_rows].tolist() == recorded["ce_loss_indexes"].tolist()
    for (stream, kind), array in INDEXES.items():
        rows = where[_rows_of(pack, stream, kind)].tolist()
        assert rows == (recorded[array].tolist() if array in recorded else [])
    image, clip = pack.layout[GEN].grids
    assert [[image.rows, image.columns]] == recorded["packed_pixel_grid_hw_gen"].tolist()
    assert [[clip.rows, clip.columns]] == recorded["pixel_video_grid_hw_gen"].tolist()
    assert [image.length] == recorded["packed_gen_image_lens"].tolist()
    assert [clip.length] == recorded["packed_gen_video_lens"].tolist()
    assert [clip.length] == recorded["pixel_video_patch_seqlens_gen"].tolist()
    assert torch.equal(visibility(pack.layout)[order][:, order], recorded["mask"])


INDEXES: dict[tuple[StreamName, Kind], str] = {
    (UND, "text"): "packed_text_indexes",
    (UND, "image"): "packed_pixel_patch_indexes_und",
    (UND, "tube"): "packed_pixel_video_patch_indexes_und",
    (GEN, "image"): "packed_pixel_patch_indexes_gen",
    (GEN, "tube"): "packed_pixel_video_patch_indexes_gen",
}
"""Recorded numbers of the rows of each kind, in the order of the samples."""


def _rows_of(pack: Pack, stream: StreamName, kind: Kind) -> list[int]:
    """Rows of one kind, in order, of `und` and then of `gen`."""
    kinds = [span.kind for span, _ in pack.layout[stream].spans for _ in range(span.length)]
    offset = 0 if stream == UND else pack.layout[UND].length
    return [offset + row for row, is_of in enumerate(kinds) if is_of == kind]


def _packed_order(pack: Pack) -> Tensor:
    """Rows of `und` and then of `gen` in the order of the samples, in which they are recorded."""
    order = []
    offset = pack.layout[UND].length
    for (start, stop), (first, last) in zip(
        pack.layout[UND].ranges, pack.layout[GEN].ranges, strict=True
    ):
        order += [*range(start, stop), *range(offset + first, offset + last)]
    return torch.tensor(order)


class Shown(Metrics):
    """Metrics that keep what a step computes: states, predictions and losses of tokens."""

    def __init__(self, model: NeoUnify, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ce = self.mse = self.clean = torch.empty(0)
        self.states: dict[StreamName, Tensor] = {}
        backbone, forward = model.backbone, model.forward

        def kept_states(*arguments: Any) -> dict[StreamName, Tensor]:
            self.states = backbone(*arguments)
            return self.states

        def kept_prediction(*arguments: Any) -> ModelOutput:
            output = forward(*arguments)
            assert output.clean is not None
            output.clean.retain_grad()
            self.clean = output.clean
            return output

        monkeypatch.setattr(model, "backbone", kept_states)
        monkeypatch.setattr(model, "forward", kept_prediction)

    def add_text(self, tasks: Tensor, losses: Tensor, correct: Tensor) -> None:
        super().add_text(tasks, losses, correct)
        self.ce = losses

    def add_image(
        self, tasks: Tensor, t: Tensor, owners: Tensor, losses: Tensor, clean: Tensor
    ) -> None:
        super().add_image(tasks, t, owners, losses, clean)
        self.mse = losses

    def weights(self, target: Tensor) -> Tensor:
        """The weight of every noisy token in the loss, from the gradient of its prediction.

        A token's part is w · mse, quadratic in x̂ - x, so its gradient times x̂ - x is 2 · w · mse.
        """
        assert self.clean.grad is not None
        return (self.clean.grad * (self.clean - target)).sum(1).detach() / (2 * self.mse)


@both
def test_a_step(
    name: str, pipes: dict[str, neounify.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, predictions and losses with the recorded noise and times, then the gradients."""
    recorded, facts = load_fixture(name, "train", FAMILY)
    model = pipes[name].model
    pack = make_pack(_documents(pipes[name], recorded))
    drawn, clip = losses.add_noise, recorded.get("noise_video")
    generator = torch.Generator().manual_seed(facts["seed"])
    of_clip = torch.randn(8, 3072, generator=generator) if clip is None else clip
    noise = join_rows([recorded["noise_image"], of_clip])
    t = torch.stack([1 - recorded["t_image"][0], 1 - recorded["t_video"][0]])

    def recorded_noise(*arguments: Any) -> Noised:
        ours = drawn(*arguments)
        per_token = t.repeat_interleave(ours.lengths).unsqueeze(1)
        z = noisy(ours.clean, noise, per_token, ours.noise_scale[0])
        return Noised(ours.clean, z, t, ours.noise_scale, ours.lengths, ours.padding)

    monkeypatch.setattr(losses, "add_noise", recorded_noise)
    metrics, counts = Shown(model, monkeypatch), Counts.of([pack])
    model.requires_grad_(True)
    loss = loss_of(model, pack, OBJECTIVE, counts, generator, metrics)
    loss.backward()
    _check_tokens(metrics, pack, recorded)
    target = drawn(pack, model.config, OBJECTIVE, generator).clean
    assert_close(counts.images * metrics.weights(target), recorded["mse_weights"], SINGLE_PASS)
    total, text, flow = recorded["losses"].tolist()
    report = metrics.report()
    assert loss.item() == pytest.approx(total, rel=SINGLE_PASS)
    assert report["text/loss"] == pytest.approx(text, rel=SINGLE_PASS)
    of_images = [report[f"image/{task}/loss"] for task in ("t2i", "t2v")]
    assert sum(of_images) / 2 == pytest.approx(flow, rel=SINGLE_PASS)
    named = {to_published(n, FAMILY): p for n, p in model.named_parameters()}
    ours = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    assert named.keys() - ours.keys() == set(facts["no_gradient"])
    assert ours.keys() == facts["gradient_norms"].keys()
    for array in (key for key in recorded if key.startswith("grad/")):
        assert_close(ours[array.removeprefix("grad/")], recorded[array], SINGLE_PASS)
    for key, norm in facts["gradient_norms"].items():
        assert float(ours[key].norm()) == pytest.approx(norm, rel=SINGLE_PASS)


def _check_tokens(metrics: Shown, pack: Pack, recorded: dict[str, Tensor]) -> None:
    """States of all rows, predictions of noisy ones, and the loss of each label and noisy row."""
    states = torch.cat([metrics.states[UND], metrics.states[GEN]])[_packed_order(pack)]
    assert_close(states, recorded["last_hidden"], SINGLE_PASS)
    image, width = recorded["x_image"].shape  # rows of images are padded to the width of tubes
    assert_close(metrics.clean[:image, :width], recorded["x_image"], SINGLE_PASS)
    assert_close(metrics.clean[image:], recorded["x_video"], SINGLE_PASS)
    assert_close(metrics.ce, recorded["ce"], SINGLE_PASS)
    assert_close(metrics.mse, recorded["mse"].flatten(), SINGLE_PASS)


@both
def test_times_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - t of the recorded step, from what was drawn for it."""
    recorded, _ = load_fixture(name, "train", FAMILY)
    raw = recorded["packed_timesteps"]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: -raw)
    times = OBJECTIVE.draw_t([32] * len(raw), torch.Generator())
    wanted = torch.cat([recorded["t_image"], recorded["t_video"]])
    assert_close(1 - times, wanted, SINGLE_PASS)


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded draws of 1 - t, shifted by the shorter side of five sizes."""
    recorded, _ = load_fixture("common", "schedule", FAMILY)
    raw = recorded["train.raw"]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: -raw)
    generator = torch.Generator()
    unshifted = replace(OBJECTIVE, side_shifts=()).draw_t([16] * len(raw), generator)
    assert_close(1 - unshifted, recorded["train.t"], SINGLE_PASS)
    sizes = [key for key in recorded if key.startswith("train.shifted_")]
    assert len(sizes) == 5
    for key in sizes:
        side = min(map(int, key.removeprefix("train.shifted_").split("x")))
        times = OBJECTIVE.draw_t([side] * len(raw), generator)
        assert_close(1 - times, recorded[key], SINGLE_PASS)
