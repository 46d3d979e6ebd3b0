"""Moved names keep working for one version, with a warning that names the new module."""

from importlib import import_module

import pytest

MOVED = [
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
