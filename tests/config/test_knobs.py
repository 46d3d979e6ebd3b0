"""Knobs of image sampling: one field each, offered by Python, command line and HTTP alike."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

import neounify
from neounify.cli import options as cli
from neounify.cli.app import app
from neounify.cli.checks import resolve_sampling
from neounify.cli.options import EditOptions
from neounify.config import TextSampling
from neounify.config.presets import SCENES, TINY
from neounify.config.sampling import TextKnobs, knob_doc
from neounify.errors import RequestError
from neounify.flow.sampling import (
    EditKnobs,
    GenerateKnobs,
    ImageSampling,
    InterleaveKnobs,
    ResolvedSampling,
)
from neounify.model import NeoUnify
from neounify.serve.http import create_app
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.completions import CompletionBody
from neounify.serve.http.fields import ImageFields
from neounify.serve.http.images import ImageBody
from neounify.tasks.chat import ChatKnobs, make_chat_request
from neounify.text import byte_tokenizer
from support.scripted_service import Scripted

KNOBS = [field.name for field in fields(ImageSampling)]
TEXT = [knob.name for knob in fields(TextSampling)]
DOCS = Path(__file__).parents[2] / "docs"
EDIT_ONLY = {"image_guidance", "published_interval"}
OPTIONS = {"guidance_interval": "interval", "guidance_norm": "norm"}
"""Names of the command line that are shorter than the field's."""


@pytest.fixture(scope="module")
def pipe() -> neounify.Pipeline:
    return neounify.Pipeline(NeoUnify(TINY).requires_grad_(False), byte_tokenizer())


OUT_OF_RANGE: dict[str, Any] = {
    "steps": 0,
    "shift": 0.0,
    "guidance": -1.0,
    "image_guidance": float("nan"),
    "guidance_interval": (0.5, 0.2),
    "guidance_norm": "loud",
    "solver": "magic",
    "t_eps": 0.0,
    "fast": "quarter",
    "guidance_reuse": 0,
    "guidance_stop": float("nan"),
    "step_cache": 1.5,
    "step_cache_most": 2.5,
    "step_cache_warm": 0,
}
OTHER: dict[str, Any] = {
    "steps": 7,
    "shift": 2.5,
    "guidance": 1.5,
    "image_guidance": 1.25,
    "guidance_interval": (0.1, 0.9),
    "guidance_norm": "global",
    "published_interval": True,
    "solver": "ab2",
    "published_solver": True,
    "t_eps": 0.01,
    "fast": "half",
    "guidance_reuse": 2,
    "guidance_stop": 0.05,
    "step_cache": 0.15,
    "step_cache_most": 3,
    "step_cache_warm": 1,
}


def _options(command: str) -> dict[str, Any]:
    group: Any = get_command(app)
    loaded = group.get_command(click.Context(group), command)
    return {option.name: option for option in loaded.params}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_is_offered_everywhere(name: str) -> None:
    doc = knob_doc(ImageSampling, name)
    default = getattr(ImageSampling(), name)
    for body in (ImageBody, ChatBody):
        field = body.model_fields[name]
        assert field.description == f"{doc} Extension."
        assert field.default == default
    for command in ("generate", "edit", "story"):
        if command == "generate" and name in EDIT_ONLY:
            continue
        option = _options(command)[OPTIONS.get(name, name)]
        assert option.help == doc
        assert not option.default  # not given: the field's own default


def test_every_knob_is_documented() -> None:
    for page in ("tasks.md", "serving-api.md"):
        text = (DOCS / page).read_text()
        for name in {*KNOBS, *TEXT} - {"constraint"}:
            assert f"`{name}`" in text, (page, name)


def test_keyword_arguments_are_the_fields() -> None:
    assert EditKnobs.__optional_keys__ == set(KNOBS)
    assert set(KNOBS) - GenerateKnobs.__optional_keys__ == EDIT_ONLY
    assert InterleaveKnobs.__optional_keys__ == set(KNOBS) | TextKnobs.__optional_keys__
    published = {"published_interval", "published_solver"}
    assert OUT_OF_RANGE.keys() | published == OTHER.keys() == set(KNOBS)


@pytest.mark.parametrize("call", ["generate", "edit", "interleave", "chat"])
@pytest.mark.parametrize("name", ["stpes", "constraint", "editing"])
def test_names_that_are_no_knobs(pipe: neounify.Pipeline, call: str, name: str) -> None:
    images = (Image.new("RGB", (64, 64)),) if call == "edit" else ()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        getattr(pipe, call)("a boat", *images, **{name: None})


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}\b") as refused:
        ImageSampling(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize("editing", [False, True])
def test_none_stands_for_the_checkpoints_own(editing: bool) -> None:
    for config in (TINY, SCENES):
        defaults = config.sampling
        resolved = ImageSampling().resolve(config, editing=editing)
        assert (resolved.steps, resolved.shift) == (defaults.steps, defaults.shift)
        guidance = resolved.guidance
        assert (guidance.text, guidance.image) == (defaults.guidance, defaults.image_guidance)
        assert guidance.editing is editing


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, value in OTHER.items() if name != "fast"]
)
def test_what_is_named_is_used(name: str, value: Any) -> None:
    def flat(sampling: ResolvedSampling) -> dict[str, Any]:
        guidance = sampling.guidance
        return {
            "steps": sampling.steps,
            "shift": sampling.shift,
            "guidance": guidance.text,
            "image_guidance": guidance.image,
            "guidance_interval": guidance.interval,
            "guidance_norm": guidance.norm,
            "published_interval": guidance.published_interval,
            "solver": sampling.solver,
            "published_solver": sampling.published_solver,
            "t_eps": sampling.t_eps,
            "guidance_reuse": guidance.reuse,
            "guidance_stop": guidance.stop,
            "step_cache": sampling.cache.threshold,
            "step_cache_most": sampling.cache.most,
            "step_cache_warm": sampling.cache.warm,
        }

    plain = flat(ImageSampling().resolve(TINY, editing=True))
    named = flat(ImageSampling(**{name: value}).resolve(TINY, editing=True))
    assert named == plain | {name: value}
    assert plain[name] != value


def test_edits_have_no_cfg_zero_star() -> None:
    sampling = ImageSampling(guidance_norm="cfg_zero_star")
    assert sampling.resolve(TINY, editing=False).guidance.norm == "cfg_zero_star"
    with pytest.raises(RequestError, match="for text-to-image only"):
        sampling.resolve(TINY, editing=True)


def test_half_a_step_is_none() -> None:
    with pytest.raises(RequestError, match=r"steps must be from 1 to 1000, got 8\.5"):
        ImageSampling(steps=8.5)  # type: ignore[arg-type]
    for steps in (8.0, True):
        with pytest.raises(RequestError, match=rf"got {steps}, which is no whole number"):
            ImageSampling(steps=steps)  # type: ignore[arg-type]
    assert ImageSampling(steps=np.int64(8)).steps == 8


def test_the_fields_of_http_are_all_of_the_class() -> None:
    assert set(KNOBS) <= set(ImageFields.model_fields)


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_every_option_and_field_arrives(name: str, value: Any) -> None:
    """Not only offered: what is written there is what images are sampled with."""
    wanted = ImageSampling(**{name: value}).resolve(TINY, editing=True)
    written: Any = "0.1,0.9" if name == "guidance_interval" else value
    options = EditOptions(**{OPTIONS.get(name, name): written})
    assert resolve_sampling(options, TINY) == wanted
    form = {name: written if isinstance(written, str) else json.dumps(written)}
    for body in (form, {name: list(value) if isinstance(value, tuple) else value}):
        fields = ImageBody.model_validate({"prompt": "a boat", **body})
        state = create_app(Scripted()).state.server
        assert state.sampling(fields, editing=True, steps=fields.steps) == wanted


# --- text ---

NOT_OPTIONS = {"logprobs", "constraint"}
"""Values of programs: a command line prints text, and a schema is a separate file."""
TEXT_OUT_OF_RANGE: dict[str, Any] = {
    "repetition_penalty": 0.0,
    "temperature": -1.0,
    "top_k": -1,
    "top_p": 0.0,
    "min_p": 1.5,
    "seed": 2**64,
    "logprobs": 21,
}


@pytest.mark.parametrize("name", [name for name in TEXT if name != "constraint"])
def test_every_knob_of_text_is_offered_everywhere(name: str) -> None:
    doc = knob_doc(TextSampling, name)
    for body in (ChatBody, CompletionBody):
        field = body.model_fields[name]
        if name not in ("seed", "logprobs"):  # of the whole answer, and OpenAI's own
            assert (field.description or "").removesuffix(" Extension.") == doc
            assert field.default == getattr(TextSampling(), name)
    assert name in ChatKnobs.__optional_keys__
    assert name in TextKnobs.__optional_keys__ | {"seed", "logprobs"}
    for command in ("chat", "story"):
        if name in NOT_OPTIONS:
            continue
        option = _options(command)[name]
        assert name == "seed" or option.help == doc
        assert not option.default


@pytest.mark.parametrize(("name", "value"), TEXT_OUT_OF_RANGE.items())
def test_a_value_of_text_out_of_range_names_its_field(name: str, value: Any) -> None:
    assert TEXT_OUT_OF_RANGE.keys() | {"constraint"} == set(TEXT)
    with pytest.raises(RequestError, match=rf"^{name} must be .* got {value}") as refused:
        TextSampling(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "repetition_penalty": 1.5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 7,
    }.items(),
)
def test_every_option_and_field_of_text_arrives(name: str, value: Any) -> None:
    wanted = TextSampling(**{name: value})
    arguments = cli.ChatOptions(**{name: value}).arguments()
    assert make_chat_request("Hello?", (), **arguments).sampling == wanted
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": ""}], name: value})
    assert body.sampling(seed=body.seed) == wanted
