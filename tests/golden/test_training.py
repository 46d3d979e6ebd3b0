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
from neounify.data.encode import Encoded, Encoder, GuidanceDropout
from neounify.data.loader import Pack, make_pack
from neounify.data.sample import Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.flow.path import noisy
from neounify.image.clips import join_rows
from neounify.model.parts import GEN, UND
from neounify.train import loss as losses
from neounify.train.loss import Counts, LossConfig, Metrics, Noised, loss_of
from support.golden import checkpoint, load_fixture, needs_golden
from support.golden_steps import SINGLE_PASS
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
    """Ids, positions, labels, sizes and visible tokens of every row."""
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


def _packed_order(pack: Pack) -> Tensor:
    """Rows of `und` and then of `gen` in the order of the samples, in which they are recorded."""
    order = []
    offset = pack.layout[UND].length
    for (start, stop), (first, last) in zip(
        pack.layout[UND].ranges, pack.layout[GEN].ranges, strict=True
    ):
        order += [*range(start, stop), *range(offset + first, offset + last)]
    return torch.tensor(order)


@both
def test_a_step(
    name: str, pipes: dict[str, neounify.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses with the recorded noise and times, then the gradients."""
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
    metrics = Metrics()
    model.requires_grad_(True)
    loss = loss_of(model, pack, OBJECTIVE, Counts.of([pack]), generator, metrics)
    loss.backward()
    total, text, _ = recorded["losses"].tolist()
    report = metrics.report()
    assert loss.item() == pytest.approx(total, rel=SINGLE_PASS)
    assert report["text/loss"] == pytest.approx(text, rel=SINGLE_PASS)
    mse = recorded["mse"].flatten()
    assert report["image/t2i/loss"] == pytest.approx(float(mse[:6].mean()), rel=SINGLE_PASS)
    assert report["image/t2v/loss"] == pytest.approx(float(mse[6:].mean()), rel=SINGLE_PASS)
    named = {to_published(n, FAMILY): p for n, p in model.named_parameters()}
    ours = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    assert named.keys() - ours.keys() == set(facts["no_gradient"])
    vectors = {k.removeprefix("grad/"): v for k, v in recorded.items() if k.startswith("grad/")}
    assert ours.keys() == facts["gradient_norms"].keys()
    for key, gradient in vectors.items():
        assert_close(ours[key], gradient, SINGLE_PASS)
    for key, norm in facts["gradient_norms"].items():
        assert float(ours[key].norm()) == pytest.approx(norm, rel=SINGLE_PASS)


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
