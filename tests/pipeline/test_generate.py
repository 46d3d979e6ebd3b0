"""Image generation: batches, noise, callbacks, cancelling, input that cannot be used."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import neounify
from neounify.config.presets import TINY
from neounify.errors import Cancelled, ImageError, PromptError, RequestError
from neounify.flow.path import initial_noise, noise_scale
from neounify.model import NeoUnify
from neounify.pipeline import ImageProgress
from neounify.text import byte_tokenizer
from support.prefilling import watch_prefills

SIZE: dict[str, Any] = {"width": 64, "height": 96, "steps": 3}
PROMPTS = ["a red boat", "two green stars on a blue ground, far away", "x"]


def test_an_image_does_not_depend_on_its_batch(pipe: neounify.Pipeline) -> None:
    together = pipe.generate(PROMPTS, seed=[5, 6, 7], **SIZE).pixels
    for number, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 7], strict=True)):
        alone = pipe.generate(prompt, seed=seed, **SIZE).pixels
        assert torch.allclose(alone, together[number : number + 1], atol=1e-5)


def test_the_same_call_gives_the_same_image(pipe: neounify.Pipeline) -> None:
    first, again = (pipe.generate("a boat", seed=3, **SIZE).pixels for _ in range(2))
    assert torch.equal(first, again)


def test_two_threads_use_one_pipeline(pipe: neounify.Pipeline) -> None:
    alone = [pipe.generate(prompt, seed=1, **SIZE).pixels for prompt in PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda prompt: pipe.generate(prompt, seed=1, **SIZE).pixels, PROMPTS * 3)
    for number, pixels in enumerate(results):
        assert torch.allclose(pixels, alone[number % 3], atol=1e-5)


def test_seed_and_prompt_matter(pipe: neounify.Pipeline) -> None:
    base = pipe.generate("a boat", seed=1, **SIZE).pixels
    assert not torch.allclose(pipe.generate("a boat", seed=2, **SIZE).pixels, base, atol=1e-3)
    assert not torch.allclose(pipe.generate("a cat", seed=1, **SIZE).pixels, base, atol=1e-6)


def test_several_images_of_one_prompt_are_one_draw(pipe: neounify.Pipeline) -> None:
    out = pipe.generate("a boat", images_per_prompt=2, seed=9, **SIZE)
    scale = noise_scale(6, pipe.config.flow)
    noise = initial_noise((2, 3, 96, 64), scale, torch.Generator().manual_seed(9))
    from_noise = pipe.generate("a boat", images_per_prompt=2, noise=noise, **SIZE)
    assert out.pixels.shape == (2, 3, 96, 64)
    assert torch.equal(out.pixels, from_noise.pixels)
    assert (out.seeds, from_noise.seeds) == ([9], [None])
    assert [image.size for image in out.images] == [(64, 96)] * 2
    alone = pipe.generate("a boat", seed=9, **SIZE).pixels
    assert torch.allclose(out.pixels[:1], alone, atol=1e-5)


def test_one_seed_per_prompt_gives_the_images_of_these_seeds(pipe: neounify.Pipeline) -> None:
    """As `n` images over HTTP have seed + i: see docs/serving-api.md."""
    out = pipe.generate(["a boat"] * 2, seed=[9, 10], **SIZE)
    alone = [pipe.generate("a boat", seed=seed, **SIZE).pixels for seed in (9, 10)]
    assert torch.allclose(out.pixels, torch.cat(alone), atol=1e-5)
    drawn_together = pipe.generate("a boat", images_per_prompt=2, seed=9, **SIZE).pixels
    assert not torch.allclose(drawn_together[1:], alone[1], atol=1e-3)


def test_callback_sees_every_step_and_the_last_is_close(pipe: neounify.Pipeline) -> None:
    seen: list[ImageProgress] = []
    out = pipe.generate(PROMPTS[:2], callback=seen.append, **SIZE)
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    assert len(seen[0].preview()) == 2
    # The last step goes to t = 1, where the point is the prediction.
    assert torch.allclose(seen[-1].clean, out.pixels, atol=1e-4)


def test_cancel_stops_within_a_step(pipe: neounify.Pipeline) -> None:
    cancel = threading.Event()
    steps: list[int] = []

    def callback(progress: ImageProgress) -> None:
        steps.append(progress.step)
        cancel.set()

    with pytest.raises(Cancelled):
        pipe.generate("a boat", callback=callback, cancel=cancel, **SIZE)
    assert steps == [1]


def test_thinking_returns_the_thought(pipe: neounify.Pipeline) -> None:
    out = pipe.generate(PROMPTS[:2], think=True, max_think_tokens=4, **SIZE)
    plain = pipe.generate(PROMPTS[:2], **SIZE)
    assert all(isinstance(thought, str) for thought in out.thoughts)
    assert plain.thoughts == [None, None]
    assert not torch.allclose(out.pixels, plain.pixels, atol=1e-4)


def test_guidance_one_needs_no_second_prefix(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_prefills(monkeypatch)
    pipe.generate("a boat", guidance=1.0, **SIZE)
    pipe.generate("a boat", guidance=2.0, **SIZE)
    pipe.generate(PROMPTS, guidance=2.0, **SIZE)
    assert [len(prompts) for prompts in calls] == [
        1,
        2,
        4,
    ]  # the empty prefix is shared by all prompts


def test_a_negative_prompt_changes_the_unconditional_prefix_only(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_prefills(monkeypatch)
    plain = pipe.generate("a boat", guidance=3.0, **SIZE).pixels
    negative = pipe.generate("a boat", guidance=3.0, negative_prompt="blurry", **SIZE).pixels
    assert not torch.allclose(plain, negative, atol=1e-4)
    assert torch.equal(
        plain, pipe.generate("a boat", guidance=3.0, negative_prompt="", **SIZE).pixels
    )
    reads = [
        {pipe.tokenizer.decode(ids, skip_special=False) for ids in prompts} for prompts in calls
    ]
    assert [len(texts) for texts in reads] == [2, 2, 2]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert reads[0] - reads[1] == {turn.format("")}
    assert reads[1] - reads[0] == {turn.format("blurry")}


def test_negative_prompts_in_a_batch_are_those_alone(pipe: neounify.Pipeline) -> None:
    negatives = ["blurry", "", "blurry"]
    options: dict[str, Any] = {"guidance": 3.0, **SIZE}
    together = pipe.generate(PROMPTS, seed=[5, 6, 7], negative_prompt=negatives, **options).pixels
    for n, prompt in enumerate(PROMPTS):
        alone = pipe.generate(prompt, seed=5 + n, negative_prompt=negatives[n], **options).pixels
        assert torch.allclose(alone, together[n : n + 1], atol=1e-5)


def test_second_order_solver_comes_closer(pipe: neounify.Pipeline) -> None:
    few: dict[str, Any] = {"width": 64, "height": 64, "guidance": 1.0, "shift": 1.0, "t_eps": 0.5}
    exact = pipe.generate("a boat", steps=256, **few).pixels
    euler = pipe.generate("a boat", steps=16, **few).pixels
    ab2 = pipe.generate("a boat", steps=16, solver="ab2", **few).pixels
    assert (ab2 - exact).norm() < 0.5 * (euler - exact).norm()


def test_result_can_be_used_with_autograd(pipe: neounify.Pipeline) -> None:
    pixels = pipe.generate("a boat", **SIZE).pixels
    weight = torch.ones((), requires_grad=True)
    (weight * pixels).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"width": 100, "height": 64}, ImageError, "96"),
        ({"width": 0, "height": 64}, ImageError, "32"),
        ({"height": None}, RequestError, "both"),
        ({"width": 10**9, "height": 32}, ImageError, "320000"),
        ({"steps": 0}, RequestError, "steps"),
        ({"shift": -1.0}, RequestError, "shift"),
        ({"shift": 1e-12}, RequestError, r"from 0\.001 to 1000"),
        ({"shift": 1e9}, RequestError, r"from 0\.001 to 1000"),
        ({"shift": float("nan")}, RequestError, "shift"),
        ({"guidance": float("nan")}, RequestError, "guidance"),
        ({"guidance_interval": (0.5, 0.2)}, RequestError, "interval"),
        ({"guidance_norm": "loud"}, RequestError, "cfg_zero_star"),
        ({"solver": "magic"}, RequestError, "euler"),
        ({"t_eps": 0.0}, RequestError, "t_eps"),
        ({"noise": torch.full((1, 3, 64, 64), float("nan"))}, RequestError, "noise must be finite"),
        ({"seed": 2**64}, RequestError, "seed"),
        ({"seed": [1, 2]}, RequestError, "2 values"),
        ({"images_per_prompt": 0}, RequestError, "images_per_prompt"),
        ({"negative_prompt": "x", "guidance": 1.0}, RequestError, "guidance is 1, so nothing"),
        ({"negative_prompt": "an <image>"}, RequestError, "holds no images"),
        ({"negative_prompt": "nul \0"}, RequestError, "negative_prompt"),
        ({"negative_prompt": ["a", "b"]}, RequestError, "2 values"),
        ({"noise": torch.zeros(1, 3, 32, 32)}, RequestError, "noise must be"),
        ({"noise": torch.zeros(1, 3, 64, 64, 1)}, RequestError, r"\[prompts .*, 3, H, W\]"),
        ({"noise": torch.zeros(1, 4, 64, 64)}, RequestError, r"\[prompts .*, 3, H, W\]"),
    ],
)
def test_bad_arguments(
    pipe: neounify.Pipeline, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        pipe.generate("a boat", **{"width": 64, "height": 64, "steps": 1} | arguments)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_the_channels_of_the_model(channels: int) -> None:
    torch.manual_seed(0)
    model = NeoUnify(TINY.replace(channels=channels)).eval().requires_grad_(False)
    pipe = neounify.Pipeline(model, byte_tokenizer())
    sizes: dict[str, Any] = {"width": 96, "height": 64, "steps": 2}
    result = pipe.generate("a boat", seed=3, **sizes)
    assert result.pixels.shape == (1, channels, 64, 96)
    torch.testing.assert_close(pipe.generate("a boat", seed=3, **sizes).pixels, result.pixels)


@pytest.mark.parametrize("name", ["image_guidance", "published_interval", "stpes"])
def test_names_that_are_no_arguments(pipe: neounify.Pipeline, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        pipe.generate("a boat", **{name: 1})  # type: ignore[arg-type]


def test_bad_prompts(pipe: neounify.Pipeline) -> None:
    for prompt in ("", "   ", "a <image> without one", "nul \0"):
        with pytest.raises(PromptError):
            pipe.generate(prompt, **SIZE)
    with pytest.raises(RequestError, match="empty"):
        pipe.generate([], **SIZE)


def test_prompt_longer_than_the_context(pipe: neounify.Pipeline) -> None:
    limit = pipe.config.max_positions
    with pytest.raises(PromptError, match=str(limit)):
        pipe.generate("word " * limit, **SIZE)
