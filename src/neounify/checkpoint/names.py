"""The two-way tables between this package's tensor names and those of published checkpoints.

One rule gives both spellings of a group of tensors; a field in braces stands
for a number (the same on both sides) or for one of a few paired spellings. Each family of
checkpoints has a table; a published spelling means the same tensor in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, cast

from torch import Tensor

from neounify.config.families import PIXELUMM, SENSENOVA_U1
from neounify.model.parts import PartName, StreamName, WeightStream

Field: TypeAlias = tuple[tuple[str, str], ...]

NUMBERS = ("layer", "expert")
FIELDS: dict[str, Field] = {
    "stream": (("und", ""), ("gen", "_mot_gen")),
    "qkvo": (
        *((f"qkv.{x}_proj", f"{x}_proj") for x in "qkv"),
        ("out.o_proj", "o_proj"),
    ),
    "qk": (("q", "q"), ("k", "k")),
    "half": (("", ""), ("_hw", "_hw")),
    "moe": (("und", ""), ("gen", "_moe_gen")),
    "half_t": (("", "_t"), ("_hw", "_hw")),
    "mlp": tuple((f"{x}_proj", f"{x}_proj") for x in ("gate", "up", "down")),
    "norm": (
        ("qkv.input_norm", "input_layernorm"),
        ("out.post_norm", "post_attention_layernorm"),
    ),
    "vision": (("und", "vision_model"), ("gen", "fm_modules.vision_model_mot_gen")),
    "conv": (("patch", "patch_embedding"), ("merge", "dense_embedding")),
    "linear": (("linear1", "0"), ("linear2", "2")),
    "head": (("linear1", "0"), ("linear2", "2"), ("conv1", "conv1"), ("conv2", "conv2")),
    "tokens": (("patch", "pixel_patch_embed"), ("tube", "pixel_video_patch_embed")),
    "last": (("image_head", "unpatchify_head"), ("video_head", "video_unpatchify_head")),
    "kind": (("weight", "weight"), ("bias", "bias")),
}
"""Field name → pairs of (our spelling, published spelling)."""


@dataclass(frozen=True)
class Rule:
    """Both spellings of a family of tensors, the part of the model they are, and their stream.

    Without `stream`, the stream is the value of the field {stream}, {moe} or {vision}.
    """

    ours: str
    published: str
    part: PartName
    stream: WeightStream | None = None

    @cached_property
    def ours_pattern(self) -> re.Pattern[str]:
        return _pattern(self.ours, 0)

    @cached_property
    def published_pattern(self) -> re.Pattern[str]:
        return _pattern(self.published, 1)


_LAYER, _TEXT = "layers.{layer}.{stream}", "language_model.model"
_TEXT_LAYER = f"{_TEXT}.layers.{{layer}}"

_ANY = (
    Rule("embed_tokens.weight", f"{_TEXT}.embed_tokens.weight", "embedding", "shared"),
    Rule("lm_head.weight", "language_model.lm_head.weight", "lm head", "shared"),
    Rule("{stream}_{tokens}.proj.{kind}", "{tokens}{stream}.proj.{kind}", "patch embedding"),
    Rule("{last}.norm.weight", "{last}.norm.weight", "image head", "gen"),
    Rule("{last}.linear.{kind}", "{last}.linear.{kind}", "image head", "gen"),
)
"""Names that are the same in all families: tables of tokens, linear embeddings and heads."""

_SENSENOVA_U1 = (
    Rule(
        f"{_LAYER}.out.mlp.experts.{{expert}}.{{mlp}}.weight",
        f"{_TEXT_LAYER}.mlp{{stream}}.experts.{{expert}}.{{mlp}}.weight",
        "experts",
    ),
    Rule(
        f"{_LAYER}.{{qkvo}}.{{kind}}",
        f"{_TEXT_LAYER}.self_attn.{{qkvo}}{{stream}}.{{kind}}",
        "attention",
    ),
    Rule(
        f"{_LAYER}.qkv.{{qk}}_norm{{half}}.weight",
        f"{_TEXT_LAYER}.self_attn.{{qk}}_norm{{half}}{{stream}}.weight",
        "norm",
    ),
    Rule(f"{_LAYER}.{{norm}}.weight", f"{_TEXT_LAYER}.{{norm}}{{stream}}.weight", "norm"),
    Rule(f"{_LAYER}.out.mlp.{{mlp}}.weight", f"{_TEXT_LAYER}.mlp{{stream}}.{{mlp}}.weight", "mlp"),
    Rule(
        f"{_LAYER}.out.mlp.router.weight",
        f"{_TEXT_LAYER}.mlp{{stream}}.gate.weight",
        "router",
    ),
    Rule("{stream}_norm.weight", f"{_TEXT}.norm{{stream}}.weight", "norm"),
    Rule(
        "{vision}_patch.{conv}.{kind}",
        "{vision}.embeddings.{conv}.{kind}",
        "patch embedding",
    ),
    Rule(
        "timestep_embedder.{linear}.{kind}",
        "fm_modules.timestep_embedder.mlp.{linear}.{kind}",
        "timestep",
        "gen",
    ),
    Rule(
        "noise_scale_embedder.{linear}.{kind}",
        "fm_modules.noise_scale_embedder.mlp.{linear}.{kind}",
        "noise scale",
        "gen",
    ),
    Rule("image_head.{head}.{kind}", "fm_modules.fm_head.{head}.{kind}", "image head", "gen"),
)

_LAYER_MOE = "layers.{layer}.{moe}"

_PIXELUMM = (
    Rule(
        f"{_LAYER_MOE}.{{qkvo}}.{{kind}}",
        f"{_TEXT_LAYER}.self_attn.{{qkvo}}{{moe}}.{{kind}}",
        "attention",
    ),
    Rule(
        f"{_LAYER_MOE}.qkv.{{qk}}_norm{{half_t}}.weight",
        f"{_TEXT_LAYER}.self_attn.{{qk}}_norm{{half_t}}{{moe}}.weight",
        "norm",
    ),
    Rule(f"{_LAYER_MOE}.{{norm}}.weight", f"{_TEXT_LAYER}.{{norm}}{{moe}}.weight", "norm"),
    Rule(f"{_LAYER_MOE}.out.mlp.{{mlp}}.weight", f"{_TEXT_LAYER}.mlp{{moe}}.{{mlp}}.weight", "mlp"),
    Rule("{moe}_norm.weight", f"{_TEXT}.norm{{moe}}.weight", "norm"),
    Rule(
        "timestep_embedder.{linear}.{kind}",
        "time_embedder.mlp.{linear}.{kind}",
        "timestep",
        "gen",
    ),
)

TABLES: Mapping[str, tuple[Rule, ...]] = {
    SENSENOVA_U1: (*_SENSENOVA_U1, *_ANY),
    PIXELUMM: (*_PIXELUMM, *_ANY),
}
"""Rules of each family, by the name that `ModelConfig.family` has."""
_MARKS = {PIXELUMM: "language_model.model.norm_moe_gen.weight"}
"""A tensor that only checkpoints of a family have; without any, they are SenseNova-U1's."""


def family_of(published: Container[str]) -> str:
    """The family of a checkpoint with these tensors (published names)."""
    return next((name for name, mark in _MARKS.items() if mark in published), SENSENOVA_U1)


CODES_BESIDE = ("weight_scale", "weight_s_rel", "weight_s_channel", "weight_codebook")
"""Last parts of the names of what belongs to the codes of a quantised weight, in both spellings."""


def to_published(name: str, family: str = SENSENOVA_U1) -> str:
    """A family's spelling of one of this package's tensor names; KeyError for another name."""
    if of_expert(name, 0) is not None:
        raise KeyError(f"{name!r} joins experts, which are published one by one")
    weight, beside = _split_beside(name)
    rule, values = _match_ours(weight, TABLES[family])
    spelt = {key: _translate(key, value, 0) for key, value in values.items()}
    return _join_beside(rule.published.format(**spelt), beside)


def from_published(name: str) -> str | None:
    """This package's spelling of a published tensor name; None for a name not of this layout."""
    weight, beside = _split_beside(name)
    for rule in _EVERY:
        match = rule.published_pattern.fullmatch(weight)
        if match:
            values = match.groupdict()
            ours = rule.ours.format(**{k: _translate(k, v, 1) for k, v in values.items()})
            return _join_beside(ours, beside)
    return None


def is_beside_codes(name: str) -> bool:
    """Whether a tensor belongs to the codes of a quantised weight, such as its scale."""
    return name.rpartition(".")[2] in CODES_BESIDE


def _split_beside(name: str) -> tuple[str, str]:
    """The name of the weight that a tensor belongs to, and its own last part if it has one."""
    module, _, leaf = name.rpartition(".")
    return (f"{module}.weight", leaf) if is_beside_codes(name) else (name, "")


def _join_beside(weight: str, beside: str) -> str:
    return weight.removesuffix("weight") + beside if beside else weight


_HALVES = (
    (
        re.compile(r"(layers\.\d+\.(?:und|gen))\.(?=input_norm\.|[qkv]_proj\.|[qk]_norm)"),
        r"\1.qkv.",
    ),
    (re.compile(r"(layers\.\d+\.(?:und|gen))\.(?=o_proj\.|post_norm\.|mlp\.)"), r"\1.out."),
)


def current_name(name: str) -> str:
    """A tensor name of this package as it is now; states of earlier versions lack the halves."""
    for pattern, current in _HALVES:
        name = pattern.sub(current, name)
    return name


_STACKED = re.compile(r"(layers\.\d+\.(?:und|gen)\.out\.mlp\.experts)\.((?:gate|up|down)_proj)")


def of_expert(name: str, expert: int) -> str | None:
    """The name of an expert's part of the joined weights `name` (ours); None for other tensors."""
    match = _STACKED.fullmatch(name)
    return f"{match[1]}.{expert}.{match[2]}.weight" if match else None


def each_expert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, the joined weights of experts apart, as checkpoints have them."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if of_expert(name, 0) is None:
            apart[name] = tensor
        else:
            apart |= {cast(str, of_expert(name, n)): part for n, part in enumerate(tensor)}
    return apart


def stream_of(name: str) -> WeightStream:
    """Which stream a tensor (our name) belongs to; KeyError for an unknown name."""
    rule, values = _match_ours(name)
    if rule.stream is not None:
        return rule.stream
    return cast(WeightStream, next(values[key] for key in _STREAM_FIELDS if key in values))


_OF_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_IN_LAYER = re.compile(r"layers\.(\d+)\.(und|gen)\.")


def layer_of(name: str) -> tuple[int, StreamName] | None:
    """The layer and stream of a tensor (our name); None for one outside the layers."""
    match = _IN_LAYER.match(name)
    return None if match is None else (int(match[1]), cast(StreamName, match[2]))


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor (our name) belongs to; None for any other."""
    match = _OF_EXPERT.search(name)
    return None if match is None else int(match[1])


def part_of(name: str) -> PartName:
    """Which part of the model a tensor (our name) is, such as "attention" or "router"."""
    return _match_ours(name)[0].part


_EVERY = tuple(dict.fromkeys(rule for table in TABLES.values() for rule in table))
_STREAM_FIELDS = ("stream", "moe", "vision")


def _match_ours(name: str, rules: Sequence[Rule] = _EVERY) -> tuple[Rule, dict[str, str]]:
    weight, _ = _split_beside(of_expert(name, 0) or name)
    for rule in rules:
        match = rule.ours_pattern.fullmatch(weight)
        if match:
            return rule, match.groupdict()
    raise KeyError(f"{name!r} is not the name of a tensor of this model")


def _pattern(template: str, side: int) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    pieces[0::2] = [re.escape(literal) for literal in pieces[0::2]]
    pieces[1::2] = [f"(?P<{name}>{_alternatives(name, side)})" for name in pieces[1::2]]
    return re.compile("".join(pieces))


def _alternatives(name: str, side: int) -> str:
    # No leading zeros: each tensor has exactly one name.
    if name in NUMBERS:
        return "0|[1-9][0-9]{0,5}"
    return "|".join(re.escape(pair[side]) for pair in FIELDS[name])


def _translate(name: str, value: str, side: int) -> str:
    if name in NUMBERS:
        return value
    return next(pair[1 - side] for pair in FIELDS[name] if pair[side] == value)


LM_HEAD = to_published("lm_head.weight")
EMBED_TOKENS = to_published("embed_tokens.weight")
"""Published names that are the same in all families."""
