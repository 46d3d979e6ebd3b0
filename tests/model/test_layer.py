"""One layer: against the reference, and who sees whom, found out from outside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from neounify.attention import blocks
from neounify.config import ModelConfig
from neounify.model import Layout, NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import Rotation, attention_rotation
from support import reference
from support.attention import plan
from support.models import (
    Maker,
    assert_close,
    by_stream,
    exact,
    facts_of,
    pack,
    random_config,
    random_model,
    weights_of,
)


def _rotation(positions: Tensor, config: ModelConfig) -> Rotation:
    return attention_rotation(
        positions,
        config.head_dim,
        theta=config.rope_theta,
        theta_hw=config.rope_theta_hw,
        dtype=torch.float64,
    )


def _run(
    model: NeoUnify, layout: Layout, und: Tensor | None, gen: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The model's first layer, without embeddings, final norms and heads."""
    streams: tuple[tuple[StreamName, Tensor | None], ...] = ((UND, und), (GEN, gen))
    hidden = {name: x for name, x in streams if x is not None}
    rotations = {name: _rotation(layout[name].positions, model.config) for name in hidden}
    after = model.layers[0](hidden, rotations, plan(layout))
    return after.get(UND), after.get(GEN)


@pytest.mark.parametrize("seed", range(10))
def test_one_layer_equals_the_reference(seed: int) -> None:
    rng = random.Random(100 + seed)
    config = random_config(rng, num_layers=1)
    maker = Maker(rng, config)
    documents = [*maker.showcase(), maker.document(), maker.document()]
    model = random_model(config, seed, torch.float64)
    tokens = reference.tokens_of(documents, config.token_size)
    und_tokens, gen_tokens = by_stream(tokens)
    numbers = np.random.default_rng(seed)
    und = numbers.normal(size=(len(und_tokens), config.hidden_size))
    gen = numbers.normal(size=(len(gen_tokens), config.hidden_size))

    wanted_und: list[reference.Array] = []
    wanted_gen: list[reference.Array] = []
    und_rows, gen_rows = iter(und), iter(gen)
    for document in tokens:
        xs = [next(gen_rows) if token.gen else next(und_rows) for token in document]
        after, _ = reference.layer(xs, document, 0, weights_of(model), facts_of(config))
        for x, token in zip(after, document, strict=True):
            (wanted_gen if token.gen else wanted_und).append(x)

    layout = pack(documents, config, torch.float64).layout
    with exact():
        actual_und, actual_gen = _run(model, layout, torch.from_numpy(und), torch.from_numpy(gen))
    assert actual_und is not None
    assert actual_gen is not None
    assert_close(actual_und, np.stack(wanted_und), 1e-10)
    assert_close(actual_gen, np.stack(wanted_gen), 1e-10)


@pytest.mark.parametrize(("chunk", "seed"), [(256, 0), (3, 1), (1, 2)])
def test_a_token_matters_to_another_iff_the_rule_says_so(
    chunk: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CAUSAL_CHUNK", chunk)
    rng = random.Random(seed)
    config = random_config(rng, num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=2)
    documents = Maker(rng, config).showcase()
    model = random_model(config, seed, torch.float64)
    layout = pack(documents, config, torch.float64).layout
    und_tokens, gen_tokens = by_stream(reference.tokens_of(documents, config.token_size))
    tokens = und_tokens + gen_tokens
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(tokens), 16, generator=generator, dtype=torch.float64)

    def outputs(x: Tensor) -> Tensor:
        und, gen = _run(model, layout, x[: len(und_tokens)], x[len(und_tokens) :])
        assert und is not None
        assert gen is not None
        return torch.cat([und, gen])

    before = outputs(x)
    effective = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for key in range(len(tokens)):
        moved = x.clone()
        moved[key] += torch.randn(16, generator=generator, dtype=torch.float64)
        effective[:, key] = ((outputs(moved) - before).abs().amax(dim=1) > 1e-9).numpy()
    np.testing.assert_array_equal(effective, reference.mask_of(tokens, tokens))


def test_the_rule_of_the_reference_on_an_example() -> None:
    """A check of the checker: the rule's sentences, written out by hand."""
    pixels = np.zeros((3, 8, 16))  # two tokens of side 8
    document: list[reference.Span] = [
        reference.Text([1]),
        reference.Noisy(pixels, "a", 0.5, 0.5),
        reference.Clean(pixels, "a"),
        reference.Text([2, 3]),
        reference.Noisy(pixels, "b", 0.5, 0.5),
    ]
    (tokens,) = reference.tokens_of([document], 8)
    wanted = """
        x........
        xxx......
        xxx......
        x..xx....
        x..xx....
        x..xxx...
        x..xxxx..
        x..xxxxxx
        x..xxxxxx
    """
    rows = ["".join("x" if s else "." for s in row) for row in reference.mask_of(tokens, tokens)]
    assert rows == wanted.split()
    assert [token.position for token in tokens] == [
        (0, 0, 0),
        *((1, 0, 0), (1, 0, 1)),
        *((1, 0, 0), (1, 0, 1)),
        *((2, 0, 0), (3, 0, 0)),
        *((4, 0, 0), (4, 0, 1)),
    ]


@pytest.mark.parametrize("stream", ["und", "gen"])
def test_a_stream_runs_without_the_other(stream: str) -> None:
    """An und stream alone gives what it gives beside gen; a gen stream alone sees only itself."""
    rng = random.Random(5)
    config = random_config(rng, num_layers=1)
    maker = Maker(rng, config)
    model = random_model(config, 5, torch.float64)
    if stream == "und":
        layout = pack(maker.showcase(), config, torch.float64).layout
        und = torch.randn(layout["und"].length, config.hidden_size, dtype=torch.float64)
        gen = torch.randn(layout["gen"].length, config.hidden_size, dtype=torch.float64)
        both, _ = _run(model, layout, und, gen)
        alone, nothing = _run(model, layout, und, None)
        assert both is not None
        assert alone is not None
        assert nothing is None
        assert_close(alone, both, 1e-12)
        return
    documents = [maker.noisy((2, 3)), maker.noisy((1, 1))]
    layout = pack(documents, config, torch.float64).layout
    gen = torch.randn(layout["gen"].length, config.hidden_size, dtype=torch.float64)
    with exact():
        nothing, alone = _run(model, layout, None, gen)
    assert nothing is None
    assert alone is not None
    wanted = []
    for tokens, rows in zip(
        reference.tokens_of(documents, config.token_size), gen.split([6, 1]), strict=True
    ):
        after, _ = reference.layer(
            list(rows.numpy()), tokens, 0, weights_of(model), facts_of(config)
        )
        wanted.extend(after)
    assert_close(alone, np.stack(wanted), 1e-10)
