"""Checkpoint folders: which files are found, what is refused, and the exact list of misfits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neounify.checkpoint import CheckpointFolder, expected_shapes, load_checkpoint, to_published
from neounify.errors import CheckpointError, ConfigError
from support.checkpoint_folders import (
    CONFIGS,
    SMALL,
    random_weights,
    write_checkpoint,
    write_sharded,
)
from support.golden import needs_golden

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "sharded", SMALL, random_weights(SMALL))


def test_one_file(small: Path) -> None:
    folder = CheckpointFolder.open(small)
    weights = random_weights(SMALL)
    assert folder.tensors.keys() == weights.keys()
    info = folder.tensors["language_model.lm_head.weight"]
    assert (info.shape, info.dtype) == ((96, 32), torch.float32)
    assert info.file == small / "model.safetensors"
    assert all(torch.equal(folder.tensor(name), weights[name]) for name in weights)


def test_shards(sharded: Path) -> None:
    folder = CheckpointFolder.open(str(sharded))
    weights = random_weights(SMALL)
    assert len({info.file for info in folder.tensors.values()}) == 3
    assert all(torch.equal(folder.tensor(name), weights[name]) for name in weights)


def test_one_file_of_another_name(small: Path) -> None:
    (small / "model.safetensors").rename(small / "weights.safetensors")
    assert len(CheckpointFolder.open(small).tensors) == len(expected_shapes(SMALL))


def test_the_flow_heads_width_is_that_of_the_weights(small: Path) -> None:
    edit_json(small / "config.json", lambda d: d.pop("neounify", None))
    assert CheckpointFolder.open(small).config == SMALL
    assert SMALL.flow_head_width != 4096


@needs_golden
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead"])
def test_published_checkpoints_fit(golden_checkpoint: Callable[[str], Path], name: str) -> None:
    folder = CheckpointFolder.open(golden_checkpoint(name))
    folder.check(expected_shapes(folder.config))


def test_config_is_checked_against_the_weights(any_config: Any, tmp_path: Path) -> None:
    folder = CheckpointFolder.open(
        write_checkpoint(tmp_path / "any", any_config, random_weights(any_config))
    )
    assert folder.config == any_config
    folder.check(expected_shapes(folder.config))


# What is wrong with the files


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a folder with config"):
        CheckpointFolder.open(tmp_path / "nowhere")


def test_a_file_that_holds_no_weights(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not a model; expected a folder"):
        CheckpointFolder.open(small / "config.json")
    for name, kind in (("model.safetensors", "a whole safetensors"), ("model.gguf", "a GGUF")):
        (small / name).write_text("A text, such as the page of a download that failed.")
        with pytest.raises(CheckpointError, match=f"{name} is not {kind} file"):
            CheckpointFolder.open(small / name)


def test_no_config(small: Path) -> None:
    (small / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        CheckpointFolder.open(small)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (4 * 2**20) + "{}", "larger than 4194304 bytes"),
    ],
)
def test_unreadable_config(small: Path, text: str, message: str) -> None:
    (small / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder.open(small)


def test_config_of_another_architecture(small: Path) -> None:
    edit_json(small / "config.json", lambda d: d.update(model_type="llama"))
    with pytest.raises(ConfigError, match="'llama', this package reads 'neo_chat'"):
        CheckpointFolder.open(small)


def test_no_weights(small: Path) -> None:
    (small / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        CheckpointFolder.open(small)


def test_pickled_weights_only(small: Path) -> None:
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin but no \*\.safetensors"):
        CheckpointFolder.open(small)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"3 weight files but no {INDEX}"):
        CheckpointFolder.open(sharded)


def test_missing_shards_are_listed(sharded: Path) -> None:
    for number in (1, 3):
        (sharded / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 weight files") as caught:
        CheckpointFolder.open(sharded)
    assert "model-00001-of-00003.safetensors" in str(caught.value)
    assert "model-00002" not in str(caught.value)


def test_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-00002.*not a whole safetensors file"):
        CheckpointFolder.open(sharded)


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    def move(document: dict[str, Any]) -> None:
        document["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"

    edit_json(sharded / INDEX, move)
    with pytest.raises(CheckpointError, match="ghost in model-00001"):
        CheckpointFolder.open(sharded)


def test_shard_holds_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda d: d["weight_map"].pop("language_model.lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"not named in the index:\n.*lm_head\.weight in mod"):
        CheckpointFolder.open(sharded)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": 1}, {"a": None}], ids=lambda value: json.dumps(value)
)
def test_malformed_index(sharded: Path, weight_map: object) -> None:
    edit_json(sharded / INDEX, lambda d: d.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match=INDEX):
        CheckpointFolder.open(sharded)


@pytest.mark.parametrize(
    "name",
    ["../small.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "C:x"],
)
def test_index_may_only_name_plain_files(sharded: Path, name: str) -> None:
    edit_json(sharded / INDEX, lambda d: d["weight_map"].update(ghost=name))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        CheckpointFolder.open(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(small: Path, tmp_path: Path, name: str) -> None:
    outside = shutil.move(small / name, tmp_path / name)
    (small / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leads out of the folder"):
        CheckpointFolder.open(small)


def test_dangling_link(small: Path) -> None:
    (small / "config.json").unlink()
    (small / "config.json").symlink_to(small / "gone.json")
    with pytest.raises(CheckpointError, match="link to a file that is not there"):
        CheckpointFolder.open(small)


def test_a_linked_folder_and_a_download_caches_links_are_followed(
    small: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(small.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "link").symlink_to(snapshot)
    assert CheckpointFolder.open(tmp_path / "link").config == SMALL


# What does not fit the model


def test_misfits_are_listed_exactly(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    q_proj = to_published("layers.0.und.qkv.q_proj.weight")
    del weights["language_model.model.norm.weight"]
    weights[q_proj] = torch.zeros(3, 32)
    weights["stray"] = torch.zeros(1)
    weights["language_model.model.layers.7.input_layernorm.weight"] = torch.zeros(32)
    bias = "vision_model.embeddings.dense_embedding.bias"
    weights[bias] = weights[bias].long()
    folder = CheckpointFolder.open(write_checkpoint(tmp_path / "bad", SMALL, weights))
    with pytest.raises(CheckpointError) as caught:
        folder.check(expected_shapes(SMALL))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "1 missing:",
        "  language_model.model.norm.weight",
        "2 unexpected:",
        "  language_model.model.layers.7.input_layernorm.weight",
        "  stray (not a name of this layout)",
        "1 of the wrong shape:",
        f"  {q_proj}: stored [3, 32], expected [32, 32]",
        "1 not floating point:",
        f"  {bias}: I64",
    ]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    missing = len(weights) - 1
    only = {"language_model.lm_head.weight": weights["language_model.lm_head.weight"]}
    folder = CheckpointFolder.open(write_checkpoint(tmp_path / "bad", SMALL, only))
    with pytest.raises(CheckpointError, match=f"… and {missing - 20} more") as caught:
        folder.check(expected_shapes(SMALL))
    assert len(str(caught.value).splitlines()) == 1 + 1 + 20 + 1


def test_a_tied_lm_head_is_accepted_only_when_it_equals_the_embedding(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    weights = random_weights(config)
    head = weights["language_model.model.embed_tokens.weight"].clone()
    weights["language_model.lm_head.weight"] = head
    folder = CheckpointFolder.open(write_checkpoint(tmp_path / "same", config, weights))
    folder.check(expected_shapes(config))
    head[-1, -1] += 1
    folder = CheckpointFolder.open(write_checkpoint(tmp_path / "other", config, weights))
    with pytest.raises(CheckpointError, match="ties it to the embedding, but the two differ"):
        folder.check(expected_shapes(config))


# Fingerprints


def test_fingerprint_does_not_depend_on_shards_or_on_how_config_is_written(
    small: Path, sharded: Path
) -> None:
    edit_json(sharded / "config.json", lambda d: d.update(model_type=d.pop("model_type")))
    first, second = (CheckpointFolder.open(f).fingerprint() for f in (small, sharded))
    assert first == second
    assert len(first) == 64


def test_fingerprints_of_different_checkpoints_differ(small: Path) -> None:
    prints = {CheckpointFolder.open(small).fingerprint()}
    weights = random_weights(SMALL)
    weights["language_model.lm_head.weight"][0, 0] += 1
    save_file(weights, small / "model.safetensors")
    prints.add(CheckpointFolder.open(small).fingerprint())
    half = random_weights(SMALL, torch.float16)
    save_file(half, small / "model.safetensors")
    prints.add(CheckpointFolder.open(small).fingerprint())
    edit_json(small / "config.json", lambda d: d.update(noise_scale=2.0))
    prints.add(CheckpointFolder.open(small).fingerprint())
    assert len(prints) == 4


def test_fingerprint_is_that_of_the_files_not_of_the_model_in_memory(small: Path) -> None:
    model, _, folder, *_ = load_checkpoint(small)
    before = folder.fingerprint()
    model.lm_head.weight.zero_()
    assert not folder.tensor("language_model.lm_head.weight").any()
    assert folder.fingerprint() == before
