"""The losses, against their formulas written out, and what freezing does to gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from neounify.config.presets import SCENES
from neounify.data.encode import Encoder
from neounify.data.loader import LoaderConfig, Pack, load_packs, make_pack
from neounify.data.sample import DataError
from neounify.flow.path import noise_scale
from neounify.image.pixels import patchify
from neounify.model.parts import GEN
from neounify.runtime import plan
from neounify.runtime.devices import Abilities
from neounify.scenes.world import SceneDataset, scene_config
from neounify.text import byte_tokenizer
from neounify.train.loss import Counts, LossConfig, Metrics, add_noise, loss_of
from neounify.train.setup import checkpoint_layers, freeze
from neounify.train.weights import new_model
from support.device_abilities import pretending
from support.models import batch_of

CONFIG = SCENES.replace(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16)
ENCODER = Encoder(config=CONFIG, tokenizer=byte_tokenizer(vocab_size=264), noise_draws=2)
SOURCE = SceneDataset(0, scene_config("default"))


def one_pack() -> Pack:
    return make_pack([ENCODER(SOURCE[n], np.random.default_rng(n)) for n in range(25)])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_noised_targets_lie_between_noise_and_image() -> None:
    pack = one_pack()
    noised = add_noise(pack, CONFIG, LossConfig(), generator())
    sigma = noise_scale(16, CONFIG.flow, cap=False)
    assert noised.noise_scale.tolist() == pytest.approx([sigma] * len(pack.targets))
    target = torch.tensor(pack.targets[3]).permute(2, 0, 1).float() / 127.5 - 1
    rows = slice(3 * 16, 4 * 16)
    torch.testing.assert_close(noised.clean[rows], patchify(target[None], 16, 3)[0])
    t = noised.t[3]
    noise = (noised.z[rows] - t * noised.clean[rows]) / ((1 - t) * sigma)
    assert abs(noise.std().item() - 1) < 0.05
    assert abs(noise.mean().item()) < 0.05


def test_times_are_logit_normal_and_shifted() -> None:
    t = LossConfig().draw_t([64] * 20_000, generator())
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean().item() + 0.8) < 0.02
    assert abs(logit.std().item() - 0.8) < 0.02
    shifted = LossConfig(time_shift=3.0).draw_t([64] * 20_000, generator())
    torch.testing.assert_close((1 - shifted) / shifted, 3 * (1 - t) / t, rtol=1e-3, atol=1e-3)


def test_the_loss_is_its_formula() -> None:
    pack = one_pack()
    model = new_model(CONFIG, 0)
    objective = LossConfig(text_weight=0.3, image_weight=0.7, task_weights={"vqa": 2.0})
    counts = Counts.of([pack])
    loss = loss_of(model, pack, objective, counts, generator())

    noised = add_noise(pack, CONFIG, objective, generator())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = [((torch.tensor(i).float() / 255 - mean) / std).permute(2, 0, 1) for i in pack.images]
    noise = (noised.z, noised.t, noised.noise_scale)
    logits, clean, _ = model(batch_of(pack.layout, pack.ids, images, *noise))
    assert clean is not None
    text = torch.nn.functional.cross_entropy(
        logits[pack.label_rows], pack.label_ids, reduction="none"
    )
    weights = torch.where(pack.label_tasks == 2, 2.0, 1.0)
    t = noised.t.repeat_interleave(16)[:, None]
    image = ((clean - noised.clean) / (1 - t).clamp(min=0.05)).square().mean(1)
    wanted = 0.3 * (text * weights).mean() + 0.7 * image.mean()
    torch.testing.assert_close(loss, wanted)


def test_a_mean_over_images_weighs_small_and_large_ones_alike() -> None:
    """And does so in parts of a step: a pack counts by its images, not by its tokens."""
    encoder = replace(ENCODER, noise_draws=1)
    painted = [sample for sample in map(SOURCE.__getitem__, range(60)) if sample.task == "t2i"]
    sizes = ((16, 32), (64, 64), (64, 64))
    packs = [
        make_pack([replace(encoder, target_buckets=(size,))(sample, np.random.default_rng(0))])
        for sample, size in zip(painted, sizes, strict=False)
    ]
    model, objective = new_model(CONFIG, 0), LossConfig(text_weight=0, image_mean="images")
    counts = Counts.of(packs)
    assert len({pack.layout[GEN].length for pack in packs}) == 2
    seeds = [torch.Generator().manual_seed(n) for n in range(3)]
    parts = [loss_of(model, p, objective, counts, g) for p, g in zip(packs, seeds, strict=True)]
    wanted = []
    for number, pack in enumerate(packs):
        alone = torch.Generator().manual_seed(number)
        by_tokens = LossConfig(text_weight=0)
        wanted.append(loss_of(model, pack, by_tokens, Counts.of([pack]), alone))
    torch.testing.assert_close(sum(parts), sum(wanted) / 3)


def test_times_are_shifted_by_the_shorter_side() -> None:
    shifts = LossConfig(side_shifts=((256, 1.0), (640, 2.0), (960, 3.0)))
    sides = [16, 256, 257, 640, 641, 960]
    plain = LossConfig().draw_t(sides, generator())
    shifted = shifts.draw_t(sides, generator())
    ratio = (1 - shifted) / shifted / ((1 - plain) / plain)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1, 2, 2, 3, 3]), rtol=1e-4, atol=0)
    with pytest.raises(DataError, match=r"side of 961 pixels, loss\.side_shifts ends at 960"):
        shifts.draw_t([961], generator())


def test_the_shorter_side_is_that_of_the_image() -> None:
    """32 x 16 and 48 x 16 pixels are both shifted by the 3 of side 16, not by the 5 of side 32."""
    encoder = replace(ENCODER, noise_draws=1)
    sample = next(s for s in map(SOURCE.__getitem__, range(100)) if s.task == "t2i")
    for bucket in ((16, 32), (48, 16)):
        rng = np.random.default_rng(1)
        pack = make_pack([replace(encoder, target_buckets=(bucket,))(sample, rng)])
        objective = LossConfig(side_shifts=((16, 3.0), (32, 5.0)))
        shifted = add_noise(pack, CONFIG, objective, generator()).t
        assert torch.equal(shifted, LossConfig(time_shift=3.0).draw_t([16], generator()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side_shifts": ((256, 1.0), (128, 2.0))}, r"the sides must ascend, got \[256, 128\]"),
        ({"side_shifts": ((256, 1.0),), "time_shift": 2.0}, "time_shift 2 and side_shifts both"),
        ({"side_shifts": ((256, 0.0),)}, "must be above 0, got 0"),
        ({"image_mean": "pixels"}, "tokens"),
    ],
)
def test_objectives_that_contradict_themselves(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig(**values)


def test_chunked_text_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = one_pack()
    model = new_model(CONFIG, 0)
    grads = []
    for size in (2**26, CONFIG.vocab_size * 7):
        monkeypatch.setattr(plan, "LOGITS", size)
        model.zero_grad()
        loss_of(model, pack, LossConfig(), Counts.of([pack]), generator()).backward()
        assert model.lm_head.weight.grad is not None
        grads.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_two_packs_make_the_gradient_of_one() -> None:
    packs = [
        item.pack
        for item in islice(
            load_packs(SOURCE, ENCODER, LoaderConfig(tokens_per_pack=900, workers=0)), 2
        )
    ]
    model = new_model(CONFIG, 0)
    counts = Counts.of(packs)
    for pack in packs:
        loss_of(model, pack, LossConfig(image_weight=0), counts, generator()).backward()
    assert model.lm_head.weight.grad is not None
    together = model.lm_head.weight.grad.clone()
    model.zero_grad()
    share = [len(pack.label_ids) / counts.labels for pack in packs]
    for pack, part in zip(packs, share, strict=True):
        loss = loss_of(model, pack, LossConfig(image_weight=0), Counts.of([pack]), generator())
        (loss * part).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, together)


def test_metrics_are_means_by_task_and_time() -> None:
    pack = one_pack()
    metrics = Metrics()
    loss_of(new_model(CONFIG, 0), pack, LossConfig(), Counts.of([pack]), generator(), metrics)
    report = metrics.report()
    noised = add_noise(pack, CONFIG, LossConfig(), generator())
    bins = {f"{int(t * 5) / 5:.1f}" for t in noised.t.tolist()}
    assert {n[7:10] for n in report if n.startswith("image/t0")} == bins
    assert 0 <= report["text/accuracy"] <= 1
    assert report["text/vqa/loss"] > 0


def test_reports_of_a_device_without_float64_are_the_same() -> None:
    reports = []
    for exact in (True, False):
        draws = generator()
        with pretending(Abilities(type="cpu", float64=exact)):
            metrics = Metrics()
            for _ in range(200):
                step = Metrics()
                tasks, t = torch.arange(3), torch.rand(3, generator=draws)
                owners = tasks.repeat_interleave(300)
                losses, clean = torch.rand(2, 900, generator=draws) * 5
                step.add_text(tasks, losses[:3], losses[:3] > 2)
                step.add_image(tasks, t, owners, losses, clean)
                metrics.merge(step)
        assert metrics.image.dtype == (torch.float64 if exact else torch.float32)
        reports.append(metrics.report())
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)


@pytest.mark.parametrize("frozen", ["und", "gen"])
def test_a_frozen_stream_gets_no_gradient(frozen: str) -> None:
    model = new_model(CONFIG, 0)
    freeze(model, (frozen,))
    pack = one_pack()
    loss_of(model, pack, LossConfig(), Counts.of([pack]), generator()).backward()
    for stream in ("und", "gen"):
        layer = getattr(model.layers[0], stream)
        grads = [p.grad is not None for p in layer.parameters()]
        assert all(grads) if stream != frozen else not any(grads)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    pack = one_pack()
    model = new_model(CONFIG, 0)
    gradients = []
    for wanted in (False, True, False):
        checkpoint_layers(model, wanted)
        model.zero_grad()
        loss_of(model, pack, LossConfig(), Counts.of([pack]), generator()).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        assert all(torch.equal(gradients[0][name], other[name]) for name in other)
