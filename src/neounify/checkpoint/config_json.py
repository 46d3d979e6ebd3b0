"""`config.json` of the published layout, read into a ModelConfig and written back.

Every key is checked by name. Unknown keys survive a round trip, and
an unchanged config is written back as it was.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from neounify.checkpoint.document import (
    OWN_FLOW,
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
    unlist,
)
from neounify.config import CheckpointDefaults, FlowConfig, MlpConfig, ModelConfig
from neounify.config.checks import check_size
from neounify.config.families import FAMILIES, SENSENOVA_U1, family_named
from neounify.errors import ConfigError
from neounify.image.pixels import RGB

ARCHITECTURES = ("qwen3", "qwen3_moe")


def read_config(document: Mapping[str, Any]) -> ModelConfig:
    """The model a parsed config.json describes.

    Raises ConfigError for an unknown architecture, a missing key, a value of the
    wrong type, sizes that do not fit together or a feature not implemented here.
    """
    family = _family(document)
    if family_named(family).config_form == "qwen3":
        from neounify.checkpoint.qwen3_config import read_qwen3

        return read_qwen3(document, family)
    return _Reader(document).model()


def config_of_tensors(
    document: Mapping[str, Any], family: str, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """The config of a checkpoint of a family: a config.json, and published names → shapes.

    Raises ConfigError, also for the config.json of another family.
    """
    if FAMILIES[family].config_form == "qwen3":
        from neounify.checkpoint.qwen3_config import config_of

        return config_of(document, family, shapes)
    form, described = FAMILIES[family].config_form, document.get("model_type")
    others = [f.title for f in FAMILIES.values() if f.config_form == described != form]
    if shapes and others:
        raise ConfigError(
            f"the weights are those of a {FAMILIES[family].title} model, but the config.json has "
            f"the model_type {described!r}, as {', '.join(others)} models need it, not {form!r}"
        )
    return read_config(document)


def _family(document: Any) -> str:
    """The family that a config.json names in this package's section."""
    package = document.get("neounify") if isinstance(document, Mapping) else None
    named = package.get("family") if isinstance(package, Mapping) else None
    return SENSENOVA_U1 if named is None else str(named)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json document of a model; the inverse of `read_config`.

    Raises ConfigError for a config that the document cannot state, such as a generation stream with
    dense layers beside sparse ones.
    """
    published = config.published
    if family_named(config.family).config_form == "qwen3":
        from neounify.checkpoint.qwen3_config import write_qwen3

        if _family(published) == config.family and read_config(published) == config:
            return copy.deepcopy(dict(published))
        document = write_qwen3(config)
    else:
        if published and read_config(published) == config:
            return copy.deepcopy(dict(published))
        document = _overlay_document(config)
    _check_stated(config, document)
    return document


def quantised_entry(preset: str, fingerprint: str) -> dict[str, Any]:
    """The entry `quantised` of this package's section: the preset, and the checkpoint before it."""
    return {"preset": preset, "from": fingerprint, "version": 1}


def quantised_as(config: ModelConfig) -> str | None:
    """The preset that the entry `quantised` names; None where there is none."""
    entry = subsection(config.published or {}, "neounify").get("quantised")
    preset = entry.get("preset") if isinstance(entry, dict) else None
    return preset if isinstance(preset, str) else None


def with_quantised(document: Mapping[str, Any], entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with this entry `quantised` in this package's section; None takes it out."""
    changed = dict(document)
    section = dict(subsection(document, "neounify"))
    section.pop("quantised", None)
    if entry is not None:
        section["quantised"] = dict(entry)
    changed.pop("neounify", None)
    return changed | ({"neounify": section} if section else {})


def _check_stated(config: ModelConfig, document: Mapping[str, Any]) -> None:
    """Raise ConfigError where a config is not what its document says."""
    try:
        read = read_config(document)
    except ConfigError as error:
        raise ConfigError(f"config.json cannot state this config: {error}") from error
    for field in dataclasses.fields(ModelConfig):
        value, stated = getattr(config, field.name), getattr(read, field.name)
        if isinstance(value, MlpConfig) and value.sparse and all(value.sparse):
            stated = dataclasses.replace(stated, width=value.width)  # of dense layers, unused
        require(
            not field.compare or value == stated,
            f"config.json cannot state {field.name} {value}: it would be read as {stated}",
        )


class _Reader:
    """Reads the published layout key by key, so that every error names its key."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        if not isinstance(document, Mapping):
            raise ConfigError(f"config.json must hold an object, found {type(document).__name__}")
        self.top = document
        self.llm = self._section("llm_config")
        self.vision = self._section("vision_config")

    def model(self) -> ModelConfig:
        top, llm, vision = self.top, self.llm, self.vision
        self._check_supported()
        package = subsection(top, "neounify")
        sparse = llm["model_type"] == "qwen3_moe"
        num_layers = integer(llm, "num_hidden_layers")
        heads = integer(llm, "num_attention_heads")
        hidden = integer(llm, "hidden_size")
        declared = unlist(vision.get("llm_hidden_size", hidden))
        require(
            declared == hidden,
            f"vision_config.llm_hidden_size {declared} differs from llm_config.hidden_size "
            f"{hidden}",
        )
        width = integer(llm, "intermediate_size", 0 if sparse else None)
        und = MlpConfig(width=width)
        gen = MlpConfig(width=integer(package, "gen_intermediate_size", width))
        if sparse:
            und, gen = self._experts(width, num_layers)
        return ModelConfig(
            hidden_size=hidden,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=integer(llm, "num_key_value_heads", heads),
            head_dim=integer(llm, "head_dim", hidden // max(1, heads)),
            vocab_size=integer(llm, "vocab_size"),
            und_mlp=und,
            gen_mlp=gen,
            rms_norm_eps=number(llm, "rms_norm_eps", 1e-6),
            rope_theta=number(llm, "rope_theta"),
            rope_theta_hw=number(llm, "rope_theta_hw", 1e4),
            max_positions=integer(llm, "max_position_embeddings", 262_144),
            max_grid=integer(llm, "max_position_embeddings_hw", 10_000),
            attention_bias=flag(llm, "attention_bias", False),
            tie_embeddings=flag(llm, "tie_word_embeddings", False),
            lm_head=flag(package, "lm_head", True),
            patch_size=integer(vision, "patch_size", 16),
            merge=self._merge(),
            vision_hidden_size=integer(vision, "hidden_size"),
            rope_theta_vision=number(vision, "rope_theta_vision", 1e4),
            flow_head_width=integer(package, "flow_head_width", 4096),
            flow=dataclasses.replace(self._flow(), **read_own(package, "flow", OWN_FLOW)),
            sampling=read_sampling(package),
            published=copy.deepcopy(dict(top)),
            **(
                {"image_head": "pixel" if flag(top, "use_pixel_head", False) else "flow"}
                | read_own(package, "model", OWN_MODEL)
            ),
        )

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self.top.get(name)
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.json has no object {name!r}; is this a neo_chat checkpoint?")
        return section

    def _check_supported(self) -> None:
        model_type = self.top.get("model_type")
        require(
            model_type == "neo_chat",
            f"config.json: model_type is {model_type!r}, this package reads 'neo_chat'",
        )
        architecture = self.llm.get("model_type")
        require(
            architecture in ARCHITECTURES,
            f"llm_config.model_type is {architecture!r}; known are {', '.join(ARCHITECTURES)}",
        )
        for section, key, allowed in (
            (self.llm, "hidden_act", ("silu",)),
            (self.llm, "rope_scaling", (None,)),
            (self.llm, "use_sliding_window", (False,)),
            (self.vision, "num_channels", (RGB,)),
            (self.top, "concat_time_token_num", (0,)),
        ):
            value = section.get(key, allowed[0])
            require(value in allowed, f"{key} {value!r} is not supported, only {allowed[0]!r} is")

    def _merge(self) -> int:
        ratio = unlist(self.top.get("downsample_ratio", 0.5))
        vision_ratio = unlist(self.vision.get("downsample_ratio", ratio))
        require(
            isinstance(ratio, int | float) and 0 < ratio <= 1 and (1 / ratio).is_integer(),
            f"downsample_ratio {ratio!r} must be 1, 1/2, 1/3, …",
        )
        require(
            ratio == vision_ratio,
            f"downsample_ratio is {ratio} but {vision_ratio} in vision_config",
        )
        return round(1 / ratio)

    def _experts(self, width: int, num_layers: int) -> tuple[MlpConfig, MlpConfig]:
        llm = self.llm
        check_size("num_layers", num_layers)  # each of them is marked below
        step = integer(llm, "decoder_sparse_step", 1)
        dense_layers = llm.get("mlp_only_layers") or []
        require(
            isinstance(dense_layers, list) and all(isinstance(n, int) for n in dense_layers),
            f"mlp_only_layers must be a list of layer numbers, got {dense_layers!r}",
        )
        experts = integer(llm, "num_experts")
        und = MlpConfig(
            width=width,
            num_experts=experts,
            experts_per_token=integer(llm, "num_experts_per_tok"),
            expert_width=integer(llm, "moe_intermediate_size"),
            normalise_top_k=flag(llm, "norm_topk_prob", False),
            sparse=tuple(
                experts > 0 and n not in dense_layers and step > 0 and (n + 1) % step == 0
                for n in range(num_layers)
            ),
        )
        gen = dataclasses.replace(
            und,
            num_experts=integer(llm, "gen_num_experts", und.num_experts),
            experts_per_token=integer(llm, "gen_num_experts_per_tok", und.experts_per_token),
            expert_width=integer(llm, "gen_moe_intermediate_size", und.expert_width),
            sparse=(True,) * num_layers,
        )
        return und, gen

    def _flow(self) -> FlowConfig:
        top, default = self.top, FlowConfig()
        return FlowConfig(
            noise_scale=number(top, "noise_scale", default.noise_scale),
            noise_scale_mode=top.get("noise_scale_mode", default.noise_scale_mode),
            noise_scale_base_tokens=integer(
                top, "noise_scale_base_image_seq_len", default.noise_scale_base_tokens
            ),
            noise_scale_max=number(top, "noise_scale_max_value", default.noise_scale_max),
            noise_scale_embedding=flag(top, "add_noise_scale_embedding", True),
            t_eps_training=number(top, "t_eps", default.t_eps_training),
        )


def _overlay_document(c: ModelConfig) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(dict(c.published))
    sparse = c.is_sparse
    ratio = 1 / c.merge
    document.setdefault("architectures", ["NEOChatModel"])
    _overlay(
        document,
        model_type="neo_chat",
        template=document.get("template", "neo1_0"),
        downsample_ratio=ratio,
        use_pixel_head=c.image_head == "pixel",
        noise_scale=c.flow.noise_scale,
        noise_scale_mode=c.flow.noise_scale_mode,
        noise_scale_base_image_seq_len=c.flow.noise_scale_base_tokens,
        noise_scale_max_value=c.flow.noise_scale_max,
        add_noise_scale_embedding=c.flow.noise_scale_embedding,
        t_eps=c.flow.t_eps_training,
    )
    _overlay(
        document.setdefault(
            "vision_config", {"model_type": "neo_vision", "num_channels": c.channels}
        ),
        patch_size=c.patch_size,
        hidden_size=c.vision_hidden_size,
        llm_hidden_size=c.hidden_size,
        downsample_ratio=ratio,
        rope_theta_vision=c.rope_theta_vision,
    )
    llm = document.setdefault("llm_config", {"hidden_act": "silu", "rope_scaling": None})
    _overlay(
        llm,
        model_type="qwen3_moe" if sparse else "qwen3",
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        intermediate_size=c.und_mlp.width,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        rope_theta_hw=c.rope_theta_hw,
        max_position_embeddings=c.max_positions,
        max_position_embeddings_hw=c.max_grid,
        attention_bias=c.attention_bias,
        tie_word_embeddings=c.tie_embeddings,
    )
    if sparse:
        und, gen = c.und_mlp, c.gen_mlp
        _overlay(
            llm,
            num_experts=und.num_experts,
            num_experts_per_tok=und.experts_per_token,
            moe_intermediate_size=und.expert_width,
            norm_topk_prob=und.normalise_top_k,
            gen_num_experts=gen.num_experts,
            gen_num_experts_per_tok=gen.experts_per_token,
            gen_moe_intermediate_size=gen.expert_width,
            decoder_sparse_step=llm.get("decoder_sparse_step", 1),
            mlp_only_layers=[n for n, is_sparse in enumerate(und.sparse) if not is_sparse]
            if llm.get("decoder_sparse_step", 1) == 1
            else llm.get("mlp_only_layers", []),
        )
    section = document.pop("neounify", {})
    kept = {key: value for key, value in section.items() if key not in PACKAGE_KEYS}
    if section := kept | _package_section(c):
        document["neounify"] = section
    return document


PACKAGE_KEYS = (
    "sampling",
    "flow_head_width",
    "gen_intermediate_size",
    "lm_head",
    "model",
    "flow",
)
"""Keys of the section of this package: what the published layout has no key for."""


def _package_section(c: ModelConfig) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if c.sampling != CheckpointDefaults():
        section["sampling"] = stated_sampling(c.sampling)
    model = {name: getattr(c, name) for name in OWN_MODEL}
    if c.image_head == "pixel":  # which a key of the published layout says
        del model["image_head"]
    flow = {name: getattr(c.flow, name) for name in OWN_FLOW}
    for name, values, defaults in (("model", model, OWN_MODEL), ("flow", flow, OWN_FLOW)):
        if stated := stated_own(values, defaults):
            section[name] = stated
    if c.flow_head_width != 4096:
        section["flow_head_width"] = c.flow_head_width
    if not c.is_sparse and c.gen_mlp.width != c.und_mlp.width:
        # The published layout has one width for both streams.
        section["gen_intermediate_size"] = c.gen_mlp.width
    if not c.lm_head:
        section["lm_head"] = False
    return section


def _overlay(section: dict[str, Any], **values: Any) -> None:
    """Set keys, but leave alone what already says the same (1 and 1.0, [0.5] and 0.5)."""
    for key, value in values.items():
        if key not in section or unlist(section[key]) != value:
            section[key] = value
