"""Recorded steps on the CPU: a tape of operators stands for a CUDA graph, and results are equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neounify.cache import PagedSequence, new_cache, new_paged_cache
from neounify.cache.key_values import text_keys
from neounify.config import MlpConfig, TextSampling, VideoConfig
from neounify.config.presets import TINY
from neounify.engine import graphs
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.engine.graphs import (
    DecodingGraphs,
    cuda_recorder,
    power,
    recordable,
    recorder_for,
    rerun_recorder,
)
from neounify.engine.messages import (
    Decode,
    DecodedToken,
    LocalTransport,
    Prefill,
    TextInput,
    new_number,
)
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import UnderstandingEngine, forward_und
from neounify.flow.sampling import ImageSampling
from neounify.model import Image, NeoUnify, Text
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from support.models import random_config


class Tape(TorchDispatchMode):
    """Operators in order with the very tensors they had, as a CUDA graph has their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a recorded call reads a value on the host")
        result = func(*args, **options)
        self.calls.append((func, args, options, result))
        return result

    def replay(self) -> None:
        for func, args, options, before in self.calls:
            now = func(*args, **options)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                # Views and results in place lie where they lay.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape_recorder(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    run()  # a call before, as for CUDA graphs
    with Tape() as tape:
        result = run()
    return result, tape.replay


RECORDERS = {"tape": tape_recorder, "rerun": rerun_recorder}


def model(**values: Any) -> NeoUnify:
    dense = {"und_mlp": MlpConfig(width=24), "gen_mlp": MlpConfig(width=24)}
    config = random_config(random.Random(1), **(dense | values))
    torch.manual_seed(0)
    return NeoUnify(config).double().requires_grad_(False).eval()


# --- decoding ---


def inputs_of(network: NeoUnify, pool: Any, lengths: Sequence[int], room: int) -> list[ModelInput]:
    """Prefilled sequences in the pool, and the next token of each."""
    items = []
    for number, length in enumerate(lengths):
        keys = text_keys([number * 50 + n for n in range(length)], 0)
        sequence = pool.open(keys, room)
        sequence.expect(keys[sequence.length :])
        ids = [(number + n) % network.config.vocab_size for n in range(length)]
        forward_und(network, [ModelInput(sequence, (Text(length),), ids)])
        items.append(ModelInput(sequence, (Text(1),), [number]))
    return items


def decoded(network: NeoUnify, lengths: Sequence[int], steps: int, recorded: Any) -> list[Tensor]:
    """States of some steps; a sequence leaves in each, down to the last."""
    pool = new_paged_cache(network, 64, 4)
    items = inputs_of(network, pool, lengths, 20)
    drawn = DecodingGraphs(network, recorded) if recorded else None
    outputs = []
    for step in range(steps):
        now = items[min(step // 3, len(items) - 1) :]
        for item in now:
            assert isinstance(item.cache, PagedSequence)
            item.cache.expect(text_keys([step], item.cache.next_t))
        now = [ModelInput(i.cache, i.spans, [step + n]) for n, i in enumerate(now)]
        if drawn is not None:
            assert drawn.serves(now)
        outputs.append(drawn.step(now) if drawn is not None else forward_und(network, now))
    pool.check()
    return outputs


@pytest.mark.parametrize("name", RECORDERS)
@pytest.mark.parametrize("lengths", [[1], [3, 9, 4], [7, 7, 2, 12, 5]], ids=str)
def test_decoding_is_the_same(name: str, lengths: list[int]) -> None:
    network = model()
    with torch.inference_mode():
        plain = decoded(network, lengths, 14, None)
        recorded = decoded(network, lengths, 14, RECORDERS[name])
    for one, two in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


def test_recordings_are_for_powers_of_two() -> None:
    assert [power(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert power(3, 64) == 64
    network, recordings = model(), []

    def counting(run: Callable[[], Tensor]) -> Any:
        recordings.append(run)
        return rerun_recorder(run)

    with torch.inference_mode():
        decoded(network, [3, 3, 3], 9, counting)
    # Of 3, 2 and 1 sequences in 1 to 3 blocks: 4 by 1 and 2, 2 by 2 and 4, 1 by 4.
    assert len(recordings) == 5


def test_only_single_tokens_of_one_pool_are_recorded() -> None:
    network = model()
    pools = [new_paged_cache(network, 16, 4) for _ in range(2)]
    one, two = (inputs_of(network, pool, [3], 8)[0] for pool in pools)
    drawn = DecodingGraphs(network)
    assert drawn.serves([one])
    assert not drawn.serves([one, two])
    assert not drawn.serves([ModelInput(one.cache, (Text(2),), [1, 2])])
    assert not drawn.serves([ModelInput(one.cache, (Image(1, 1),), [])])
    assert not drawn.serves([ModelInput(new_cache(network, 4), (Text(1),), [1])])


def engine_tokens(network: NeoUnify, attention: str, temperature: float) -> list[list[int]]:
    """Tokens of three prompts that an engine with a paged cache decodes together."""
    plan = ExecutionPlan(attention=attention, kv_blocks=64, kv_block_size=4)
    engine = UnderstandingEngine(network, LocalTransport(), plan)
    assert (engine._graphs is not None) == (attention == "graphs")
    calls = {}
    for number in range(3):
        call, name = new_number(), (new_number(), "cond")
        sampling = TextSampling(temperature=temperature, seed=number)
        then = Decode(call, name, sampling, frozenset(), 6 + 2 * number)
        prompt = (TextInput(tuple(range(1, 4 + number))),)
        engine.submit(Prefill(call, {name: prompt}, {name: 12}, then))
        calls[call] = list[int]()
    while engine.busy:
        engine.step()
    for reply in engine.replies:
        if isinstance(reply.answer, DecodedToken):
            calls[reply.call].append(reply.answer.id)
    return list(calls.values())


def test_an_engine_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NeoUnify(TINY).requires_grad_(False).eval()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: tape_recorder)
    assert engine_tokens(network, "graphs", 1.0) == engine_tokens(network, "auto", 1.0)


# --- denoising ---


def jobs_of(network: NeoUnify, grids: Sequence[Grid], seed: int, **values: Any) -> list[DenoiseJob]:
    rng = random.Random(seed)
    jobs = []
    for number, grid in enumerate(grids):
        prefixes: dict[Any, Any] = {}
        for branch in ("cond", "uncond"):
            length = rng.randint(1, 9)
            cache = new_cache(network, length)
            ids = [rng.randrange(network.config.vocab_size) for _ in range(length)]
            forward_und(network, [ModelInput(cache, (Text(length),), ids)])
            prefixes[branch] = cache
        settings = {"steps": 5, "guidance": 3.0, **values}
        sampling = ImageSampling(**settings).resolve(network.config, editing=False)
        generator = torch.Generator().manual_seed(seed + number)
        width = network.config.tube_width if grid.tubes else network.config.token_width
        noise = torch.randn(grid.length, width, generator=generator)
        jobs.append(make_job(network, noise, grid, prefixes, sampling))
    return jobs


@pytest.mark.parametrize("name", RECORDERS)
def test_denoising_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several requests in turn, which share a recording, and whose guidance ends."""
    monkeypatch.setattr(graphs, "recorder_for", lambda device: RECORDERS[name])
    network = NeoUnify(TINY).requires_grad_(False).eval()
    outputs = []
    for attention in ("auto", "graphs"):
        runner = Denoiser(network, ExecutionPlan(attention=attention))
        finals = []
        with torch.inference_mode():
            for seed, grids in enumerate([[Grid(2, 3)], [Grid(2, 3)], [Grid(2, 2), Grid(2, 2)]]):
                jobs = jobs_of(network, grids, seed, guidance_interval=(0.0, 0.3))
                while not jobs[0].done:
                    runner.step(jobs)
                finals += [job.z for job in jobs]
        outputs.append(finals)
        if attention == "graphs":
            assert runner._graphs is not None
            assert len(runner._graphs._kept._recordings) == 4
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_clips_images_of_two_sizes_and_large_ones_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = NeoUnify(TINY.replace(video=VideoConfig())).requires_grad_(False).eval()
    runner = Denoiser(network, ExecutionPlan(attention="graphs"))
    assert runner._graphs is not None
    with torch.inference_mode():
        runner.step(jobs_of(network, [Grid(2, 3), Grid(1, 2)], 0))
        runner.step(jobs_of(network, [Grid(1, 2, 2, 0.8)] * 2, 0))
        monkeypatch.setattr(graphs, "MAX_ROWS", 11)
        runner.step(jobs_of(network, [Grid(2, 3)], 0))
        runner.step(jobs_of(network, [Grid(1, 2)], 0, step_cache=0.1))
    assert not runner._graphs._kept._recordings


# --- the choice ---


def test_what_can_be_recorded() -> None:
    assert recordable(model())
    hooked = model()
    hooked.layers[0].register_forward_pre_hook(lambda *_: None)
    assert not recordable(hooked)
    apart = model()
    apart.embed_tokens.to("meta")
    assert not recordable(apart)
    layers = TINY.num_layers
    sparse = MlpConfig(
        width=16, num_experts=4, experts_per_token=2, expert_width=16, sparse=(True,) * layers
    )
    experts = NeoUnify(replace(TINY, und_mlp=sparse)).requires_grad_(False)
    assert not recordable(experts)
    experts.stack_experts()
    assert recordable(experts)
    experts.compute_dtype = torch.float64
    assert not recordable(experts)


def test_a_moved_weight_is_recorded_again() -> None:
    network, recordings = model(), []

    def counting(run: Callable[[], Tensor]) -> Any:
        recordings.append(run)
        return rerun_recorder(run)

    with torch.inference_mode():
        pool = new_paged_cache(network, 16, 4)
        item = inputs_of(network, pool, [1], 12)[0]
        drawn = DecodingGraphs(network, counting)
        drawn.step([item])
        drawn.step([item])
        assert len(recordings) == 1
        network.und_norm.weight = nn.Parameter(network.und_norm.weight.clone(), False)
        drawn.step([item])
    assert len(recordings) == 2


def test_a_gpu_has_cuda_graphs() -> None:
    assert recorder_for(torch.device("cuda")) is cuda_recorder
    assert recorder_for(torch.device("cpu")) is rerun_recorder
