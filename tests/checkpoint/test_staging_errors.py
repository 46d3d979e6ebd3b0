"""Errors while layers are staged: what they leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.test_staging import (
    DEEP,
    LAYERS,
    SLOTS,
    check_layer,
    feed_of,
    one_pass,
    threads,
)
from neounify.checkpoint import load_checkpoint
from neounify.checkpoint.names import layer_of
from neounify.checkpoint.residency import StoredWeight
from neounify.checkpoint.staging import Event, HostCopies
from support.checkpoint_folders import random_weights, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "deep", DEEP, random_weights(DEEP))


def test_a_layer_that_could_not_be_taken_can_be_taken_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_checkpoint(folder, dtype="bfloat16").model
    feed, model, copies = feed_of(folder, "bfloat16")
    decode, failing = StoredWeight.decode, [True]

    def out_of_memory(source: StoredWeight, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if failing[0] and "down_proj" in source.name:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(source, stored, dtype)

    monkeypatch.setattr(StoredWeight, "decode", out_of_memory)
    feed.open()
    for number in (0, 3):
        failing[0] = True
        with pytest.raises(torch.OutOfMemoryError):
            feed.take(number)
        weights = [p for n, p in model.named_parameters() if layer_of(n) == (number, "gen")]
        assert all(weight.numel() == 0 for weight in weights)
        failing[0] = False
        before = copies.copied
        feed.take(number)
        check_layer(model, expected, number)
        feed.give_back(number)
        assert copies.copied <= before + SLOTS  # it was in its slot still
    for _ in range(2):
        for number in range(LAYERS):
            feed.take(number)
            check_layer(model, expected, number)
            feed.give_back(number)
            assert all(slot.users == 0 for slot in feed._session.slots)  # type: ignore[union-attr]
    feed.close()
    assert threads() == []


def test_copies_end_before_an_error_frees_the_buffers(folder: Path) -> None:
    feed, _, copies = feed_of(folder)
    ended: list[int] = []

    class Moving(HostCopies.Done):
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            ended.append(self.number)

    def copy(slot: Tensor, buffer: Tensor, after: Event | None) -> Event:
        if copies.copied == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        copies.copied += 1
        slot.copy_(buffer)
        return Moving(copies.copied)

    copies.copy = copy  # type: ignore[method-assign]
    feed.open()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        one_pass(feed)
    feed.close()
    assert {1, 2} <= set(ended)
