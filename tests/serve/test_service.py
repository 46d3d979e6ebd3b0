"""Results of the service are those of the pipeline: alone, in a batch, in either mode."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import neounify
from neounify.config.presets import TINY
from neounify.engine.messages import LocalTransport
from neounify.engine.shared_memory import SharedSpace, folder
from neounify.errors import RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.pipeline.results import ImagePart, TextPart
from neounify.serve import context as context_module
from neounify.serve.build import Mode, ServeConfig, build_service, colocated
from neounify.serve.client import EngineClients
from neounify.serve.engines import EngineConfig
from neounify.serve.service import AdmissionConfig, EngineService, ServiceRequest
from neounify.tasks.chat import ChatRequest, make_chat_request, read_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest, turn_prompt
from neounify.text.template import TextSegment
from support.gguf_files import gguf_of
from support.scripted_sampler import script_sampler
from support.serving import Collected, collect, same_image, serve

RNG = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(RNG.integers(0, 255, (96, 128, 3), dtype=np.uint8))
OTHER = PIL.Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8))


def image_request(pipe: neounify.Pipeline, prompt: str = "a boat", **values: Any) -> ImageRequest:
    options: dict[str, Any] = {
        "width": 128,
        "height": 96,
        "sampling": ImageSampling(steps=6).resolve(pipe.config, editing=bool(values.get("images"))),
    }
    return ImageRequest(prompt=prompt, **(options | values))


def expected(pipe: neounify.Pipeline, request: ImageRequest) -> torch.Tensor:
    options: dict[str, Any] = {
        "width": request.width,
        "height": request.height,
        "steps": request.sampling.steps,
        "seed": request.seed,
        "images_per_prompt": request.count,
        "think": request.think,
        "max_think_tokens": request.max_think_tokens,
        "guidance": request.sampling.guidance.text,
        "negative_prompt": request.negative_prompt,
    }
    if request.images:
        result = pipe.edit(
            request.prompt,
            request.images,
            image_guidance=request.sampling.guidance.image,
            **options,
        )
    else:
        result = pipe.generate(request.prompt, **options)
    return result.pixels


def test_chat_gives_the_pipelines_answer(pipe: neounify.Pipeline) -> None:
    requests = [
        make_chat_request("Hello", [], max_new_tokens=12),
        make_chat_request("What is <image>?", [IMAGE], max_new_tokens=9),
        make_chat_request(
            "Hello", [], max_new_tokens=20, temperature=1.0, seed=5, repetition_penalty=1.2
        ),
        make_chat_request(
            [
                {"role": "user", "content": "<image> and <image>"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "more"},
            ],
            [IMAGE, OTHER],
            max_new_tokens=7,
        ),
    ]
    answers = serve(
        colocated(pipe),
        lambda service: asyncio.gather(*(collect(service, r) for r in requests)),
    )
    for request, answer in zip(requests, answers, strict=True):
        alone = _alone(pipe, request)
        assert answer.text == alone.text
        assert answer.finished is not None
        assert answer.finished.completion_tokens == len(alone.token_ids)
        assert answer.finished.prompt_tokens == alone.prompt_tokens
        assert answer.finished.finish_reason == alone.finish_reason


def _alone(pipe: neounify.Pipeline, request: ChatRequest) -> Any:
    sampling = request.sampling
    return pipe.chat(
        list(request.messages),
        list(request.images),
        max_new_tokens=request.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
    )


def test_long_prompts_are_read_in_pieces(pipe: neounify.Pipeline) -> None:
    settings = EngineConfig(limits={"prefill_step_rows": 16})
    text = "".join(chr(97 + n % 26) for n in range(150))
    request = make_chat_request(text + "<image>" + text, [IMAGE], max_new_tokens=6)
    answer = serve(colocated(pipe, settings), lambda service: collect(service, request))
    assert answer.text == _alone(pipe, request).text


def test_images_are_the_pipelines_alone_and_among_sixteen_others(pipe: neounify.Pipeline) -> None:
    editing = ImageSampling(steps=5, guidance=3, image_guidance=2).resolve(
        pipe.config, editing=True
    )
    requests = [
        image_request(pipe, seed=3),
        image_request(pipe, "two", width=64, height=64, count=2),
        image_request(pipe, "thoughtful", think=True, max_think_tokens=8),
        image_request(
            pipe, "unguided", sampling=ImageSampling(guidance=1).resolve(pipe.config, editing=False)
        ),
        image_request(pipe, "change", images=(IMAGE,), sampling=editing),
        image_request(pipe, "both", images=(IMAGE, OTHER)),
        *[image_request(pipe, f"boat {n}", seed=n) for n in range(10)],
    ]

    async def alone_and_together(service: Any) -> tuple[Collected, list[Collected]]:
        alone = await collect(service, requests[0], previews=2)
        chats = [make_chat_request(f"chat {n}", [], max_new_tokens=9) for n in range(4)]
        everything: list[ServiceRequest] = [*requests, *chats]
        together = await asyncio.gather(*(collect(service, r) for r in everything))
        return alone, together

    alone, together = serve(colocated(pipe), alone_and_together)
    for request, answer in zip(requests, together, strict=False):
        for index, pixels in enumerate(expected(pipe, request)):
            same_image(answer.images[index], pixels)
    same_image(alone.images[0], together[0].images[0])
    assert [p.step for p in alone.previews] == [2, 4]
    assert {p.steps for p in alone.previews} == {6}
    assert together[2].order[0] == "TextPiece"
    assert (
        together[2].thought
        == pipe.generate(
            "thoughtful", width=128, height=96, think=True, max_think_tokens=8, steps=1
        ).thoughts[0]
    )


def test_both_modes_give_the_same(pipe: neounify.Pipeline, folder: Path) -> None:
    request = image_request(pipe, seed=7, negative_prompt="blurry")
    edit = image_request(pipe, "change", images=(IMAGE,))
    chat = make_chat_request("<image>What?", [OTHER], max_new_tokens=8)
    story = _story(pipe)

    async def all_of_them(service: Any) -> list[Collected]:
        return await asyncio.gather(*(collect(service, r) for r in (request, edit, chat, story)))

    settings = ServeConfig(folder=folder, mode="separate", dtype="float32", threads=1)
    generated, edited, answered, collected = serve(build_service(settings), all_of_them)
    same_image(generated.images[0], expected(pipe, request)[0])
    same_image(edited.images[0], expected(pipe, edit)[0])
    assert answered.text == _alone(pipe, chat).text
    _same_story(pipe, collected)


def test_negative_prompts_are_the_pipelines(pipe: neounify.Pipeline) -> None:
    editing = ImageSampling(steps=4, guidance=3, image_guidance=2).resolve(
        pipe.config, editing=True
    )
    requests = [
        image_request(pipe, seed=3, negative_prompt="blurry"),
        image_request(pipe, seed=3),
        image_request(pipe, "change", images=(IMAGE,), sampling=editing, negative_prompt="blurry"),
        image_request(pipe, "change", images=(IMAGE,), negative_prompt="dark"),
    ]
    answers = serve(
        colocated(pipe),
        lambda service: asyncio.gather(*(collect(service, r) for r in requests)),
    )
    for request, answer in zip(requests, answers, strict=True):
        same_image(answer.images[0], expected(pipe, request)[0])
    assert not torch.allclose(answers[0].images[0], answers[1].images[0], atol=1e-3)


def test_usage_separates_text_images_and_thoughts(pipe: neounify.Pipeline) -> None:
    edit = image_request(pipe, "change", images=(IMAGE,), think=True, max_think_tokens=5)
    chat = make_chat_request("<image>What?", [OTHER], max_new_tokens=8, think=True)
    generated, answered = serve(
        colocated(pipe),
        lambda service: asyncio.gather(collect(service, edit), collect(service, chat)),
    )
    for request, collected in ((edit, generated), (chat, answered)):
        finished = collected.finished
        assert finished is not None
        prompt = pipe.tokenizer.encode("What?" if request is chat else "change")
        text = finished.prompt_tokens - finished.prompt_image_tokens
        assert text > len(prompt)
        assert finished.reasoning_tokens == finished.completion_tokens > 0
    assert generated.finished is not None
    assert generated.finished.prompt_image_tokens == 12
    assert generated.finished.image_tokens == 12


def test_histories_are_read_as_in_the_pipeline(pipe: neounify.Pipeline) -> None:
    answer = [
        {"type": "text", "text": "Once"},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": " more"},
    ]
    turns: list[Any] = [
        {"role": "user", "content": "Tell"},
        {"role": "assistant", "content": answer},
    ]
    asked = [*turns, {"role": "user", "content": "What <image>?"}]
    chats = [
        make_chat_request(asked, [OTHER], max_new_tokens=8),
        make_chat_request(turns, [], max_new_tokens=8),
    ]
    text, history, images = read_request(asked, [OTHER])
    story = dataclasses.replace(_story(pipe), prompt=text, history=history, images=images)
    requests: list[ServiceRequest] = [*chats, story]
    *answers, interleaved = serve(
        colocated(pipe),
        lambda service: asyncio.gather(*(collect(service, r) for r in requests)),
    )
    for chat, collected in zip(chats, answers, strict=True):
        assert collected.text == _alone(pipe, chat).text
    _same_story(pipe, interleaved, asked, [OTHER])


def _story(pipe: neounify.Pipeline) -> InterleaveRequest:
    return InterleaveRequest(
        prompt="Tell",
        sizes=[(64, 64), (96, 64)],
        sampling=ImageSampling(steps=3).resolve(pipe.config, editing=True),
        images=[OTHER],
        max_images=2,
        max_new_tokens=24,
        seed=2,
    )


def _same_story(
    pipe: neounify.Pipeline,
    collected: Collected,
    prompt: Any = "Tell",
    images: Any = (OTHER,),
    **options: Any,
) -> None:
    parts = list(
        pipe.interleave(
            prompt,
            images,
            max_images=2,
            max_new_tokens=24,
            width=[64, 96],
            height=[64, 64],
            seed=2,
            steps=3,
            **options,
        )
    )
    generated = [part.pixels for part in parts if isinstance(part, ImagePart)]
    assert collected.text == "".join(part.text for part in parts if isinstance(part, TextPart))
    assert len(collected.images) == len(generated)
    for index, pixels in enumerate(generated):
        same_image(collected.images[index], pixels)


def _open_images(pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model opens no image of itself: make it, every fifth token from now on."""
    opens, written = pipe.processor.token("<img>"), 0

    def opens_images(logits: torch.Tensor) -> int:
        nonlocal written
        written += 1
        if written % 5 == 0:
            return opens
        logits = logits.clone()
        logits[opens] = float("-inf")
        return int(logits.argmax())

    script_sampler(monkeypatch, opens_images)


def test_stories_alternate_as_in_the_pipeline(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _open_images(pipe, monkeypatch)
    plain = _story(pipe)
    sampling = ImageSampling(steps=3, guidance=3, image_guidance=2).resolve(
        pipe.config, editing=True
    )
    negative = dataclasses.replace(plain, sampling=sampling, negative_prompt="blurry")
    steered: dict[str, Any] = {"guidance": 3, "image_guidance": 2, "negative_prompt": "blurry"}
    for story, options in ((plain, {}), (negative, steered)):
        _open_images(pipe, monkeypatch)
        collected = serve(colocated(pipe), partial(collect, request=story))
        assert len(collected.images) == 2
        assert collected.order[-1] == "Finished"
        _open_images(pipe, monkeypatch)
        _same_story(pipe, collected, **options)


@pytest.mark.parametrize("room", [5, 6, 7, 8])
def test_a_story_ends_where_the_context_does(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Four tokens, <img>, the image, </img>: with less room the same parts in either way."""
    _open_images(pipe, monkeypatch)
    prompt = turn_prompt(pipe.processor, _story(pipe), "cond")
    used = sum(len(s.ids) if isinstance(s, TextSegment) else 1 for s in prompt.segments)
    config = TINY.replace(max_positions=used + room)
    model = NeoUnify(config).eval().requires_grad_(False)
    model.load_state_dict(pipe.model.state_dict())
    small = neounify.Pipeline(model, pipe.tokenizer, system_message="Paint well.")
    collected = serve(colocated(small), lambda service: collect(service, _story(small)))
    assert collected.finished is not None
    assert collected.finished.finish_reason == "length"
    assert len(collected.images) == 1
    _open_images(pipe, monkeypatch)
    _same_story(small, collected)


@pytest.mark.parametrize("kind", ["chat", "generate", "edit", "story"])
def test_long_work_leaves_the_event_loop(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Tokenising prompts, naming and packing images: other answers continue meanwhile."""
    long = "long " * 100
    requests: dict[str, ServiceRequest] = {
        "chat": make_chat_request(f"What is <image>? {long}", [IMAGE], max_new_tokens=2),
        "generate": image_request(pipe, long, think=True, max_think_tokens=2),
        "edit": image_request(pipe, long, images=(IMAGE,)),
        "story": replace(_story(pipe), prompt=long),
    }
    request = requests[kind]
    threads: dict[str, set[int]] = {"encode": set(), "digest": set(), "pack": set()}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # A few words that are always the same may be tokenised anywhere.
            if name != "encode" or long in args[0]:
                threads[name].add(threading.get_ident())
            return function(*args, **options)

        return call

    async def work(service: Any) -> int:
        encode, pack = pipe.tokenizer.encode, service.clients.transport.pack
        monkeypatch.setattr(pipe.tokenizer, "encode", watched("encode", encode))
        monkeypatch.setattr(service.clients.transport, "copies", True)
        monkeypatch.setattr(service.clients.transport, "pack", watched("pack", pack))
        monkeypatch.setattr(context_module, "_digest", watched("digest", context_module._digest))
        await collect(service, request)
        return threading.get_ident()

    loop = serve(colocated(pipe), work)
    assert threads["encode"]
    assert [name for name, used in threads.items() if loop in used] == []
    assert bool(threads["digest"]) == (kind != "generate")


def test_a_process_casts_the_weights_it_needs(folder: Path) -> None:
    cast = neounify.load(folder, dtype="bfloat16")
    chat = make_chat_request("Hello", [], max_new_tokens=4)
    request = image_request(cast, width=64, height=64)
    settings = ServeConfig(folder=folder, mode="separate", dtype="bfloat16", threads=1)
    answered, generated = serve(
        build_service(settings),
        lambda service: asyncio.gather(collect(service, chat), collect(service, request)),
    )
    assert answered.text == _alone(cast, chat).text
    torch.testing.assert_close(generated.images[0], expected(cast, request)[0], rtol=0, atol=0.05)


def test_one_file_of_weights_beside_a_config(
    pipe: neounify.Pipeline, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.gguf"
    gguf_of(load_file(folder / "model.safetensors")).write(file)
    request = image_request(pipe, width=64, height=64)
    modes: tuple[Mode, ...] = ("colocate", "separate")
    for mode in modes:
        config = ServeConfig(folder=file, config=folder, mode=mode, dtype="float32", threads=1)
        generated = serve(build_service(config), lambda service: collect(service, request))
        same_image(generated.images[0], expected(pipe, request)[0])


def test_without_lm_head_there_is_no_text(pipe: neounify.Pipeline) -> None:
    config = pipe.config.replace(lm_head=False)
    model = NeoUnify(config)
    headless = neounify.Pipeline(model.requires_grad_(False).eval(), pipe.tokenizer)
    chat = make_chat_request("Hello", [], max_new_tokens=4)
    with pytest.raises(RequestError, match="has no lm_head"):
        serve(colocated(headless), lambda service: collect(service, chat))
    thought = image_request(pipe, width=64, height=64, think=True)
    with pytest.raises(RequestError, match="has no lm_head"):
        serve(colocated(headless), lambda service: collect(service, thought))


def test_an_engine_that_does_not_stop_keeps_no_shared_memory(pipe: neounify.Pipeline) -> None:
    class Client:
        async def stop(self) -> None:
            raise RuntimeError("still running")

    space = SharedSpace()
    space.open()
    client: Any = Client()
    clients = EngineClients(client, client, LocalTransport(), space)
    service = EngineService(pipe.processor, clients, AdmissionConfig())
    with pytest.raises(RuntimeError, match="still running"):
        asyncio.run(service.stop())
    assert not list(folder().glob(f"{space.prefix}*"))
