"""Checkpoints of the second family: recognised, loaded, saved as they were, and refused clearly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neounify
from neounify.checkpoint import (
    CheckpointFolder,
    expected_shapes,
    from_published,
    load_model,
    read_config,
    save_model,
    summarise,
    to_published,
    write_config,
)
from neounify.config import CheckpointDefaults, ModelConfig, VideoConfig, VideoDefaults
from neounify.config.families import FAMILIES, PIXELUMM
from neounify.config.presets import TINY, U1_A3B
from neounify.errors import CheckpointError, ConfigError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.golden import checkpoint, needs_golden

CONFIG = TINY.replace(**FAMILIES[PIXELUMM].profile, flow_head_width=4096, vision_hidden_size=1024)
WITHOUT_TUBES_IN = CONFIG.replace(
    video=VideoConfig(und=False), capabilities=("chat", "generate", "generate_video")
)


def _saved(folder: Path, config: ModelConfig = CONFIG) -> Path:
    torch.manual_seed(0)
    save_model(NeoUnify(config).requires_grad_(False), folder)
    return folder


def _published(folder: Path, config: ModelConfig = CONFIG) -> tuple[Path, Path]:
    """A folder as it is published, without a config, and the folder of the language model."""
    _saved(folder, config)
    document = json.loads((folder / "config.json").read_text())
    del document["neounify"]
    llm = folder.parent / "llm"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps(document | {"vocab_size": 300}))
    (folder / "config.json").unlink()
    return folder, llm


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_TUBES_IN], ids=["tubes in", "no tubes in"])
def test_names_of_every_tensor_go_both_ways(config: ModelConfig) -> None:
    for name in expected_shapes(config):
        published = to_published(name, PIXELUMM)
        assert from_published(published) == name
    assert to_published("layers.3.gen.qkv.q_norm.weight", PIXELUMM) == (
        "language_model.model.layers.3.self_attn.q_norm_t_moe_gen.weight"
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        WITHOUT_TUBES_IN,
        CONFIG.replace(
            patch_size=8,
            video=None,
            capabilities=("chat",),
            flow=dataclasses.replace(CONFIG.flow, t_eps_sampling=None),
            sampling=CheckpointDefaults(image_size=(64, 64)),
        ),
    ],
    ids=["profile", "no tubes in", "other sizes"],
)
def test_configs_survive_writing_and_reading(config: ModelConfig) -> None:
    written = json.loads(json.dumps(write_config(config)))
    assert written["model_type"] == "qwen3"
    assert read_config(written) == config
    assert write_config(read_config(written)) == written


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_TUBES_IN], ids=["tubes in", "no tubes in"])
def test_a_published_folder_is_recognised_by_its_tensors(
    tmp_path: Path, config: ModelConfig
) -> None:
    folder, llm = _published(tmp_path / "model", config)
    model = load_model(folder, config=llm)
    assert model.config == config  # the tables' length too: the language model's config says 300
    again = load_model(_saved_again(model, tmp_path / "again"))
    assert again.config == config
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert any(name.startswith("time_embedder.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _saved_again(model: NeoUnify, folder: Path) -> Path:
    save_model(model, folder)
    assert (folder / "__SAVE_COMPLETE").is_file()
    return folder


def test_files_that_lie_together(tmp_path: Path) -> None:
    folder, llm = _published(tmp_path / "model")
    (llm / "config.json").rename(folder / "config.json")
    assert load_model(folder).config == CONFIG


def test_a_folder_without_its_config(tmp_path: Path) -> None:
    folder, _ = _published(tmp_path / "model")
    for load in (load_model, neounify.load):
        with pytest.raises(CheckpointError, match=r"PixelUMM checkpoint without config.json: name"):
            load(folder)
    (folder / "__SAVE_COMPLETE").unlink()
    for load in (load_model, neounify.load):
        with pytest.raises(CheckpointError, match=r"config.json is missing; a checkpoint folder n"):
            load(folder)


def test_weights_of_one_family_with_the_config_of_the_other(tmp_path: Path) -> None:
    folder, llm = _published(tmp_path / "model")
    other = write_checkpoint(tmp_path / "other", SMALL, random_weights(SMALL))
    with pytest.raises(ConfigError, match=r"'neo_chat'; PixelUMM weights need the config\.json of"):
        load_model(folder, config=other)
    with pytest.raises(ConfigError, match="weights are those of a SenseNova-U1 model, but the con"):
        load_model(other, config=llm)


def test_missing_and_foreign_tensors_are_listed(tmp_path: Path) -> None:
    folder, llm = _published(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["time_embedder.mlp.4.weight"] = weights.pop("unpatchify_head.norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        load_model(folder, config=llm)
    assert "1 missing:\n  unpatchify_head.norm.weight" in str(refused.value)
    assert "time_embedder.mlp.4.weight (not a name of this layout)" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling .* is not supported"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole number"),
        ({"neounify": {"family": "pixel"}}, "family 'pixel' is unknown: sensenova-u1, pixelumm"),
        ({"neounify": {"family": PIXELUMM, "model": {"depth": 1}}}, "model.depth is unknown"),
        ({"num_hidden_layers": 10**12}, "num_layers must be at most 1,000"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number, found inf"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        *(
            ({"neounify": {"family": PIXELUMM, part: {name: value}}}, message)
            for part, name, value, message in (
                ("model", "prediction", "v", "model.prediction is unknown"),
                ("model", "template", "chatml", "template 'chatml' is unknown"),
                ("model", "capabilities", ["fly"], "capability 'fly' is unknown"),
                ("model", "video", {"tube_frames": 0}, "tube_frames must be at least 1, got 0"),
                ("model", "video", {"tube_frames": -4}, "tube_frames must be at least 1, got -4"),
                ("model", "video", {"tube_frames": 2.5}, "tube_frames must be a whole number"),
                ("model", "video", {"tube_frames": 2**40}, "tube_frames must be at most 1,024"),
                ("model", "video", {"position_fps": float("nan")}, "position_fps must be a finite"),
                ("model", "video", {"position_fps": 0}, "position_fps must be positive"),
                ("flow", "first_time", float("nan"), "first_time must be a finite number"),
                ("flow", "t_eps_sampling", float("inf"), "t_eps_sampling must be a finite number"),
                ("sampling", "video", {"fps": float("inf")}, "fps must be a finite number"),
                ("sampling", "video", {"solver": "rk4"}, "video.solver 'rk4' is unknown"),
                ("sampling", "video", {"dpm_steps": -1}, "video.dpm_steps must be from 1 to 1000"),
            )
        ),
    ],
)
def test_configs_that_are_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write_config(CONFIG) | change)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 35),
        ({"solver": "unipc"}, 35),
        ({"solver": "dpm2m"}, 50),
        ({"solver": "dpm2m", "steps": 7}, 7),
        ({"solver": "dpm2m", "fast": "half"}, 25),
    ],
)
def test_steps_of_a_video_are_those_of_its_solver(options: dict[str, Any], steps: int) -> None:
    config = read_config(json.loads(json.dumps(write_config(CONFIG))))
    assert ImageSampling(**options).resolve(config, editing=False, video=True).steps == steps


def test_steps_by_a_solver_survive_writing_and_reading() -> None:
    video = VideoDefaults(steps=20, dpm_steps=30)
    config = CONFIG.replace(sampling=dataclasses.replace(CONFIG.sampling, video=video))
    written = json.loads(json.dumps(write_config(config)))
    assert read_config(written) == config
    del written["neounify"]["sampling"]["video"]["dpm_steps"]  # as earlier versions wrote it
    assert read_config(written).sampling.video == VideoDefaults(steps=20, dpm_steps=50)
    assert CheckpointDefaults(video=VideoDefaults(steps=20)).of_video("dpm2m").steps == 20


def test_layers_of_experts_are_counted_before_they_are_listed() -> None:
    document = write_config(U1_A3B)
    document["llm_config"]["num_hidden_layers"] = 10**12
    with pytest.raises(ConfigError, match="num_layers must be at most 1,000"):
        read_config(document)


def test_a_part_that_a_family_has_no_names_for(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    document["neounify"]["model"] = {"image_head": "flow"}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="a part that PixelUMM checkpoints do not have"):
        load_model(folder)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("inner", ["model", "."])
@pytest.mark.parametrize("config", [None, "beside", "inside"])
def test_a_distributed_checkpoint_is_not_opened(
    tmp_path: Path, finished: bool, inner: str, config: str | None
) -> None:
    """Its error says how to convert it, also as it is published, without config.json."""
    folder, llm = tmp_path / "dcp", tmp_path / "llm"
    (folder / inner).mkdir(parents=True)
    (folder / inner / ".metadata").write_bytes(b"\x80\x04")
    if finished:
        (folder / "__SAVE_COMPLETE").touch()
    llm.mkdir()
    if config is not None:
        home = llm if config == "beside" else folder
        (home / "config.json").write_text(json.dumps(write_config(CONFIG)))
    for load in (load_model, neounify.load):
        with pytest.raises(CheckpointError) as refused:
            load(folder, config=llm if config == "beside" else None)
        assert (
            f"{folder} is a torch distributed checkpoint; convert it once, if you trust where it "
            f"came from: neounify convert {folder} OUT --from-dcp --config FOLDER, where FOLDER "
            "holds config.json and the tokenizer of its language model (Qwen3-8B for PixelUMM)"
        ) == str(refused.value)


def test_tensors_beside_a_distributed_checkpoint_are_read(tmp_path: Path) -> None:
    folder, llm = _published(tmp_path / "model")
    (folder / "model").mkdir()
    (folder / "model" / ".metadata").touch()
    assert load_model(folder, config=llm).config == CONFIG


@needs_golden
@pytest.mark.parametrize(("name", "count"), [("tiny-f18", 98), ("tiny-f22", 74)])
def test_recorded_checkpoints_are_written_back_as_they_were(
    name: str, count: int, tmp_path: Path
) -> None:
    folder = checkpoint(name, tmp_path, PIXELUMM)
    opened = CheckpointFolder.open(folder, folder / "llm")
    summary = summarise(opened)
    assert summary.total.tensors == count
    assert [row.stream for row in summary.streams] == ["und", "gen", "shared"]
    model = load_model(opened)
    assert ("chat_video" in model.config.capabilities) == (name == "tiny-f22")
    again = _saved_again(model, tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
