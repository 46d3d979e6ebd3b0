"""Configs of families whose published folders have none: a Qwen3 config.json and a profile.

The config.json is that of the language model the family began with, which gives the sizes. The
profile (`config/families.py`) gives the rest, and the tensors what differs between checkpoints.
Saved folders name their family, and what is not as in its profile, in this package's section.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from neounify.checkpoint.document import (
    OWN_MODEL,
    flag,
    integer,
    number,
    read_own,
    read_sampling,
    require,
    stated_own,
    stated_sampling,
    subsection,
)
from neounify.checkpoint.names import EMBED_TOKENS, to_published
from neounify.config import MlpConfig, ModelConfig
from neounify.config.families import FAMILIES, family_named

MODEL_TYPE = "qwen3"
_PROFILE_MODEL = ("rope_theta_hw", "max_grid", "patch_size", "merge", "channels")
PACKAGE_KEYS = ("family", "model", "flow", "sampling", "gen_intermediate_size", "lm_head")


def read_qwen3(document: Mapping[str, Any], family: str) -> ModelConfig:
    """The model of a family with the sizes of a parsed Qwen3 config.json. Raises ConfigError."""
    title, profile = family_named(family).title, family_named(family).profile
    model_type = document.get("model_type")
    require(
        model_type == MODEL_TYPE,
        f"config.json: model_type is {model_type!r}; {title} weights need the config.json of the "
        f"Qwen3 model they began with, whose model_type is {MODEL_TYPE!r}",
    )
    for key, allowed in (
        ("hidden_act", "silu"),
        ("rope_scaling", None),
        ("use_sliding_window", False),
    ):
        value = document.get(key, allowed)
        require(value == allowed, f"{key} {value!r} is not supported, only {allowed!r} is")
    package = subsection(document, "neounify")
    heads, hidden = integer(document, "num_attention_heads"), integer(document, "hidden_size")
    width = integer(document, "intermediate_size")
    flow = profile["flow"]
    return ModelConfig(
        **{
            **profile,
            "hidden_size": hidden,
            "num_layers": integer(document, "num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": integer(document, "num_key_value_heads", heads),
            "head_dim": integer(document, "head_dim", hidden // max(1, heads)),
            "vocab_size": integer(document, "vocab_size"),
            "und_mlp": MlpConfig(width=width),
            "gen_mlp": MlpConfig(width=integer(package, "gen_intermediate_size", width)),
            "rms_norm_eps": number(document, "rms_norm_eps", 1e-6),
            "rope_theta": number(document, "rope_theta", profile["rope_theta"]),
            "max_positions": integer(document, "max_position_embeddings", 40_960),
            "attention_bias": flag(document, "attention_bias", False),
            "tie_embeddings": flag(document, "tie_word_embeddings", False),
            "lm_head": flag(package, "lm_head", True),
            **read_own(package, "model", _profile_fields(profile)),
            "flow": dataclasses.replace(flow, **read_own(package, "flow", vars(flow))),
            "sampling": read_sampling(package, profile["sampling"]),
            "published": copy.deepcopy(dict(document)),
        }
    )


def config_of(document: Mapping[str, Any], family: str, shapes: Mapping[str, Any]) -> ModelConfig:
    """The config of a checkpoint of a family from its tensors too: published name → shape.

    They say how many tokens the tables have, and whether there is an embedding of clean tubes.
    Raises ConfigError.
    """
    config = read_qwen3(document, family)
    table = shapes.get(EMBED_TOKENS, ())
    if len(table) == 2 and table[0] >= 1:
        config = config.replace(vocab_size=table[0])
    flow = dataclasses.replace(
        config.flow,
        unread_time_embedder=to_published("timestep_embedder.linear1.weight", family) in shapes,
    )
    if config.video is None:
        return config.replace(flow=flow)
    und = to_published("und_tube.proj.weight", family) in shapes
    able = config.capabilities
    return config.replace(
        flow=flow,
        video=dataclasses.replace(config.video, und=und),
        capabilities=able if und else tuple(name for name in able if name != "chat_video"),
    )


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model of such a family, with this package's section.

    Raises ConfigError for a config that it cannot state.
    """
    c, profile = config, FAMILIES[config.family].profile
    document = copy.deepcopy(dict(c.published))
    section = dict(subsection(document, "neounify"))
    sizes = {
        "architectures": document.get("architectures", ["Qwen3ForCausalLM"]),
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "intermediate_size": c.und_mlp.width,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_positions,
        "attention_bias": c.attention_bias,
        "tie_word_embeddings": c.tie_embeddings,
    }
    document |= {k: v for k, v in sizes.items() if k not in document or document[k] != v}
    like = _profile_fields(profile)
    package: dict[str, Any] = {
        "family": c.family,
        "model": stated_own({name: getattr(c, name) for name in like}, like),
        "flow": stated_own(vars(c.flow), vars(profile["flow"])),
    }
    if c.sampling != profile["sampling"]:
        package["sampling"] = stated_sampling(c.sampling, profile["sampling"])
    if c.gen_mlp.width != c.und_mlp.width:
        package["gen_intermediate_size"] = c.gen_mlp.width
    if not c.lm_head:
        package["lm_head"] = False
    kept = {key: value for key, value in section.items() if key not in PACKAGE_KEYS}
    stated = {key: value for key, value in package.items() if value or key == "lm_head"}
    return document | {"neounify": kept | stated}


def _profile_fields(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that Qwen3's config.json has no key for, as the profile has them."""
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    return {name: profile.get(name, defaults[name]) for name in (*OWN_MODEL, *_PROFILE_MODEL)}
