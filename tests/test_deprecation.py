"""Moved names keep working for one version, with a warning that names the new module."""

import inspect
from collections.abc import Callable
from importlib import import_module

import pytest

from neounify import Pipeline, load

MOVED = [
    ("neounify.checkpoint.lora_save", "convert_lora", "neounify.lora"),
    ("neounify.evaluate.scenebench", "measure", "neounify.scenes.bench"),
]
RENAMED = [
    ("neounify.image", "Source", "neounify.image.io", "ImageSource"),
    ("neounify.scenes.bench", "check_picture", "neounify.scenes.bench.checks", "check_image"),
    ("neounify.checkpoint", "Loaded", "neounify.checkpoint.load", "LoadedCheckpoint"),
    ("neounify.pipeline", "PaintProgress", "neounify.pipeline", "ImageProgress"),
    ("neounify.pipeline", "PaintResult", "neounify.pipeline", "ImageResult"),
    ("neounify.pipeline.results", "PaintResult", "neounify.pipeline.results", "ImageResult"),
    ("neounify.text", "paint_prompt", "neounify.text", "image_prompt"),
]
DOCUMENTED = {
    "neounify": "load Pipeline NeounifyError __version__",
    "neounify.bundled": "bundled_model",
    "neounify.checkpoint": "load_model save_model",
    "neounify.checkpoint.lora_save": "convert_lora",
    "neounify.errors": (
        "Cancelled CheckpointError ConfigError ImageError NeounifyError PromptError RequestError "
        "SizeWarning TokenizerError"
    ),
    "neounify.evaluate.scenebench": "measure quick_scores write_folder",
    "neounify.lora": "LoraConfig add_lora load_lora merged_lora save_lora",
    "neounify.pipeline": "ImagePart PaintProgress PreviewPart TextPart",
    "neounify.runtime": "keep_freed_memory",
    "neounify.serve.safety.hooks": "Refused SafetyHook",
}
"""Every name of the Python API in README.md and docs/ before the packages were rearranged."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_documented_name_works(module: str) -> None:
    for name in DOCUMENTED[module].split():
        assert hasattr(import_module(module), name), f"{module}.{name}"


def test_every_documented_call_works() -> None:
    """And takes the arguments that the documentation names."""
    arguments: dict[Callable[..., object], str] = {
        Pipeline.chat: "prompt images stream cancel options",
        Pipeline.edit: "prompt images noise system think negative_prompt callback cancel sampling",
        Pipeline.generate: (
            "prompt width height seed noise images_per_prompt negative_prompt think "
            "max_think_tokens system callback cancel sampling"
        ),
        Pipeline.interleave: "prompt images max_images max_new_tokens width height seed think",
        load: "folder dtype device lora lora_strength memory verify compile colour_profiles",
    }
    for call, names in arguments.items():
        assert set(names.split()) <= set(inspect.signature(call).parameters), call


@pytest.mark.parametrize(("old", "name", "new"), MOVED)
def test_a_moved_name_works_and_warns(old: str, name: str, new: str) -> None:
    module = import_module(old)
    with pytest.warns(DeprecationWarning, match=rf"{old}\.{name} is deprecated: use {new}\.{name}"):
        value = getattr(module, name)
    assert value is getattr(import_module(new), name)


@pytest.mark.parametrize(("old", "name", "new"), MOVED)
def test_a_name_that_never_was_is_an_attribute_error(old: str, name: str, new: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        _ = import_module(old).nothing


@pytest.mark.parametrize(("package", "name", "module", "new"), RENAMED)
def test_a_renamed_name_works_and_warns(package: str, name: str, module: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{package}\.{name} is deprecated: .*\.{new}"):
        value = getattr(import_module(package), name)
    assert value is getattr(import_module(module), new)
