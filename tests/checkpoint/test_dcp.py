"""Torch distributed checkpoints become published folders; hostile ones run nothing."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from neounify.checkpoint import load_model, to_published
from neounify.checkpoint.config_json import write_config
from neounify.checkpoint.dcp import convert_dcp, read_dcp
from neounify.checkpoint.load import expected_shapes
from neounify.config import ModelConfig
from neounify.config.families import FAMILIES, PIXELUMM
from neounify.config.presets import TINY
from neounify.errors import CheckpointError, ConfigError
from neounify.text import Tokenizer, byte_tokenizer
from support.checkpoint_folders import SMALL, random_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CONFIG = TINY.replace(**FAMILIES[PIXELUMM].profile, flow_head_width=4096, vision_hidden_size=1024)


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        to_published(name, PIXELUMM): torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(CONFIG).items()
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder in its distributed form, with the language model's config beside it."""
    root = tmp_path_factory.mktemp("dcp")
    dcp.save(_tensors(), checkpoint_id=root / "model", no_dist=True)
    (root / "__SAVE_COMPLETE").touch()
    document = write_config(CONFIG)
    del document["neounify"]
    (root / "llm").mkdir()
    (root / "llm" / "config.json").write_text(json.dumps(document))
    return root


def _tokenizer(config: ModelConfig) -> Tokenizer:
    assert config == CONFIG
    return byte_tokenizer()


def _bytes(_: ModelConfig) -> Tokenizer:
    return byte_tokenizer()


@pytest.mark.parametrize("shard", [5 * 10**9, 200_000])
def test_every_tensor_arrives_as_it_was(stored: Path, tmp_path: Path, shard: int) -> None:
    done: list[int] = []
    target = convert_dcp(
        stored,
        stored / "llm",
        tmp_path / "out",
        tokenizer=_tokenizer,
        max_shard_bytes=shard,
        progress=done.append,
    )
    written = {k: v for f in target.glob("*.safetensors") for k, v in load_file(f).items()}
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard == 200_000)
    wanted = _tensors()
    assert done == list(range(1, len(wanted) + 1))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert load_model(target).config == CONFIG


@pytest.mark.parametrize("inner", ["", "model"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_that_may_be_unfinished_is_noted(
    stored: Path, tmp_path: Path, inner: str, finished: bool
) -> None:
    source, notes = _copy(stored, tmp_path / "dcp"), list[str]()
    if not finished:
        (source / "__SAVE_COMPLETE").unlink()
    convert_dcp(
        source / inner, stored / "llm", tmp_path / "out", tokenizer=_bytes, note=notes.append
    )
    wanted = f"{source / inner} lacks __SAVE_COMPLETE, which PixelUMM checkpoints have once"
    assert [note.startswith(wanted) for note in notes] == [True] * (not finished)


def test_a_folder_without_config_says_where_to_get_it(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"holds no config.json: name the folder with config.json and the tokenizer of "
        r"Qwen3-8B, as --config",
    ):
        convert_dcp(stored, stored, tmp_path / "out", tokenizer=_bytes)
    assert not (tmp_path / "out").exists()


def test_weights_of_the_first_family_are_converted_with_its_config(
    stored: Path, tmp_path: Path
) -> None:
    weights = random_weights(SMALL)
    dcp.save(weights, checkpoint_id=tmp_path / "model", no_dist=True)
    with pytest.raises(ConfigError, match="weights are those of a SenseNova-U1 model, but the con"):
        convert_dcp(tmp_path, stored / "llm", tmp_path / "out", tokenizer=_bytes)
    (tmp_path / "config.json").write_text(json.dumps(write_config(SMALL)))
    target = convert_dcp(tmp_path, tmp_path, tmp_path / "out", tokenizer=_bytes)
    assert load_model(target).config == SMALL


def test_the_folder_of_the_files_itself(stored: Path) -> None:
    assert [t.name for t in read_dcp(stored / "model")] == sorted(_tensors())


def test_parts_and_other_objects(tmp_path: Path) -> None:
    """A tensor in two parts; what is no tensor is left out."""
    dcp.save({"a": torch.arange(12.0).view(4, 3), "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    (whole,) = read_dcp(tmp_path)
    (chunk,) = whole.chunks
    part = whole.tensors()["a"]
    for name, values in (("x.distcp", part[:1].clone()), ("y.distcp", part[1:].clone())):
        torch.save(values, tmp_path / name)
    chunks = tuple(
        type(chunk)(start, shape, tmp_path / name, 0, (tmp_path / name).stat().st_size)
        for start, shape, name in (((0, 0), (1, 3), "x.distcp"), ((1, 0), (3, 3), "y.distcp"))
    )
    cut = type(whole)(whole.name, whole.shape, whole.dtype, chunks)
    assert torch.equal(cut.tensors()["a"], part)
    twice = type(whole)(whole.name, whole.shape, whole.dtype, (*chunks[:1], *chunks[:1]))
    with pytest.raises(CheckpointError, match="a: its parts overlap and leave values out"):
        twice.tensors()


def _copy(stored: Path, folder: Path) -> Path:
    shutil.copytree(stored, folder)
    return folder


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_hostile_pickle_runs_nothing(stored: Path, tmp_path: Path) -> None:
    folder, mark = _copy(stored, tmp_path / "bad"), tmp_path / "ran"
    command = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    for content in (pickle.dumps(_Runs(mark)), command):
        (folder / "model" / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="which no checkpoint needs; it is not read"):
            read_dcp(folder)
    assert not mark.exists()


def test_a_hostile_tensor_runs_nothing(stored: Path, tmp_path: Path) -> None:
    folder, mark = _copy(stored, tmp_path / "bad"), tmp_path / "ran"
    first = read_dcp(folder)[0]
    (chunk,) = first.chunks
    buffer = io.BytesIO()
    torch.save(_Runs(mark), buffer)
    data = bytearray(chunk.file.read_bytes())
    changed = bytes(data[: chunk.offset]) + buffer.getvalue().ljust(chunk.length, b"\0")
    chunk.file.write_bytes(changed + bytes(data[chunk.offset + chunk.length :]))
    with pytest.raises(CheckpointError, match=f"{first.name}: its values in .* cannot be read"):
        first.tensors()
    assert not mark.exists()


def test_a_compressed_tensor_is_not_unpacked(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(1000)}, checkpoint_id=tmp_path, no_dist=True)
    (tensor,) = read_dcp(tmp_path)
    (chunk,) = tensor.chunks
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(chunk.file.read_bytes())) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.namelist():
            small.writestr(entry, plain.read(entry))
    chunk.file.write_bytes(packed.getvalue().ljust(chunk.length, b"\0"))
    with pytest.raises(CheckpointError, match=r"a: its values in .* compressed"):
        tensor.tensors()


def _metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Rewrite the metadata by torch's own classes."""

    def apply(folder: Path) -> None:
        path = folder / "model" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return apply


def _leads_out(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../__SAVE_COMPLETE"


def _far(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = 2**40


def _before(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -8


def _absolute(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "/etc/passwd"


def _twice(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).chunks *= 2


def _beside(metadata: Any) -> None:
    chunk = next(iter(metadata.state_dict_metadata.values())).chunks[0]
    chunk.sizes = torch.Size([n + 1 for n in chunk.sizes])


def _half_numbers(metadata: Any) -> None:
    entry = next(iter(metadata.state_dict_metadata.values()))
    entry.size = tuple(n / 2 for n in entry.size)


def _no_places(metadata: Any) -> None:
    metadata.storage_data = dict.fromkeys(metadata.storage_data, "x")


def _huge(metadata: Any) -> None:
    entry = next(iter(metadata.state_dict_metadata.values()))
    entry.size = torch.Size([2**40, 2**10])


def _many_sides(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([1] * 65)


def _unnamed(metadata: Any) -> None:
    metadata.storage_data.clear()


def _foreign(metadata: Any) -> None:
    metadata.state_dict_metadata["x"] = ("neither", "of both")


def _doubled(depth: int) -> bytes:
    """A pickle of a dictionary whose key is a tuple that is twice the same tuple, and so on."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return b"\x80\x04}" + pickle.dumps(value, protocol=4)[11:-1] + b"K\x01s."


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda f: (f / "model" / ".metadata").unlink(), "holds no torch distributed"),
    "half a pickle": (
        lambda f: (f / "model" / ".metadata").write_bytes(b"\x80\x04\x95"),
        "is damaged or of another version",
    ),
    "a number for an object that takes gigabytes": (
        lambda f: (f / "model" / ".metadata").write_bytes(b"\x80\x04]r\xff\xff\xff\x7f."),
        "an object is numbered 2147483647, in 9 bytes",
    ),
    "a key that takes ages": (
        lambda f: (f / "model" / ".metadata").write_bytes(_doubled(60)),
        "a tuple holds more than 10,000 values",
    ),
    "a copy of a copy of a copy": (
        lambda f: (f / "model" / ".metadata").write_bytes(
            b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s."
        ),
        "a tuple holds more than 10,000 values",
    ),
    "bytes that are not there": (
        lambda f: (f / "model" / ".metadata").write_bytes(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f"),
        "is damaged or of another version",
    ),
    "not a checkpoint": (
        lambda f: (f / "model" / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "describes no checkpoint",
    ),
    "no shard": (lambda f: next((f / "model").glob("*.distcp")).unlink(), "is missing; download"),
    "half a shard": (
        lambda f: next((f / "model").glob("*.distcp")).write_bytes(b"PK"),
        r"are not in .*, which has 2",
    ),
    "a path that leads out": (_metadata(_leads_out), r"is not the name of a \*.distcp file"),
    "bytes beyond the end": (_metadata(_far), r"bytes at 1099511627776 are not in"),
    "a huge tensor": (_metadata(_huge), "its parts do not make up"),
    "a shape that goes on and on": (_metadata(_many_sides), "a tensor has 65 sides"),
    "bytes before the beginning": (_metadata(_before), "are not sizes or places"),
    "a path of the system": (_metadata(_absolute), r"'/etc/passwd' is not the name of a \*.distcp"),
    "a part twice": (_metadata(_twice), "its parts do not make up"),
    "a part beyond the tensor": (_metadata(_beside), "is not inside"),
    "sizes that are no counts": (_metadata(_half_numbers), "are not sizes or places"),
    "places that are text": (_metadata(_no_places), "is damaged or of another version"),
    "no places": (_metadata(_unnamed), "no file holds its part"),
    "an unknown entry": (_metadata(_foreign), "'x' is neither a tensor nor an object"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_has_one_clear_error(kind: str, stored: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    folder = _copy(stored, tmp_path / "bad")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_dcp(folder)


def test_tensors_of_another_model_leave_nothing_behind(stored: Path, tmp_path: Path) -> None:
    tensors = _tensors()
    del tensors["unpatchify_head.linear.bias"]
    dcp.save(tensors, checkpoint_id=tmp_path / "model", no_dist=True)
    with pytest.raises(CheckpointError, match=r"1 missing:\n  unpatchify_head\.linear\.bias"):
        convert_dcp(tmp_path, stored / "llm", tmp_path / "out", tokenizer=_bytes)
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.json").write_text('{"model_type": "neo_chat"}')
    with pytest.raises(ConfigError, match="PixelUMM weights need the config"):
        convert_dcp(stored, tmp_path, tmp_path / "out", tokenizer=_bytes)
