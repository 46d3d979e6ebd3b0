"""Copies over all sources: exact, near and text copies, and samples of evaluation sets.

A sample with targets is compared by them, one without by its inputs; samples with several images
are copies when all images are, in order. Copies are dropped from the best sample on, by area, size
of the files, order of the sources and id: each sample that is still there drops what is like it.
So a chain of near copies loses only what is close to one that stays, and no two that stay are
close. That cuts connected components around their keepers without building them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neounify.curate.executor import Executor
from neounify.curate.judge import INPUT, NUMBERS, TARGET, Judged
from neounify.curate.near import (
    BANDS,
    WORDS,
    Pairs,
    Words,
    band_pairs,
    first_within,
    sorted_pairs,
)
from neounify.curate.recipe import CurateRecipe, Role
from neounify.curate.seconds import Stopwatch
from neounify.curate.texts import BANDS as TEXT_BANDS
from neounify.curate.texts import ROWS, similarities, similarity

MAX_PAIRED = 64
"""The best of a group of candidates that are compared with all others of it."""
MAX_DISTANCE = 31
"""Bits that other images of a sample may differ in, beside the first."""
CODES: dict[Role, int] = {"input": INPUT, "target": TARGET}

Indices = NDArray[np.int64]


@dataclass
class Decisions:
    """The reason of every sample, the sample that it is a copy of (-1), and how far it is."""

    reason: NDArray[np.int16]
    copy_of: Indices
    distance: NDArray[np.float64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Samples without a reason."""
        return self.reason == 0

    def drop(self, samples: Indices, reason: str, keepers: Indices, distance: float) -> None:
        """Drop samples as copies of others."""
        self.reason[samples] = NUMBERS[reason]
        self.copy_of[samples] = keepers
        self.distance[samples] = distance


def decide(
    judged: Judged,
    rank: Indices,
    stored: NDArray[np.bool_],
    evaluation: Judged | None,
    recipe: CurateRecipe,
    executor: Executor,
    folder: Path,
    watch: Stopwatch,
) -> Decisions:
    """Reasons of stages 5, 6, 7 and 13 by `keeping_ranks`.

    `stored` samples are of earlier curations, and stay.
    """
    size = len(judged)
    decisions = Decisions(judged.early.copy(), np.full(size, -1), np.full(size, np.nan))
    stages = recipe.stages
    if stages.exact.enabled:
        on = np.isin(judged.role, [CODES[role] for role in stages.exact.on])
        keys = np.column_stack([judged.role.astype(np.uint64), judged.keys])
        _drop_same(np.flatnonzero(decisions.alive & on), keys, rank, decisions, "exact.copy")
        watch.lap("exact")
    pairs = np.zeros((0, 3), np.int64)
    if stages.near.enabled:
        pairs = _drop_near(judged, rank, decisions, recipe, executor, folder)
        earlier = (decisions.copy_of >= 0) & stored[np.maximum(decisions.copy_of, 0)]
        decisions.reason[earlier & ~stored] = NUMBERS["near.stored"]
        watch.lap("near")
    late = decisions.alive & (judged.late != 0)
    decisions.reason[late] = judged.late[late]
    if stages.text.enabled:
        _drop_texts(judged, rank, decisions, pairs, stages.text.similarity)
        watch.lap("text")
    if stages.evaluation.enabled and evaluation is not None:
        _drop_evaluation(judged, evaluation, decisions, recipe)
        watch.lap("evaluation")
    return decisions


def keeping_ranks(
    judged: Judged, priority: NDArray[np.int64], stored: NDArray[np.bool_]
) -> Indices:
    """The place of every sample in the order of keeping, 0 for the one that is kept first.

    Stored ones come first, then larger areas, larger files, earlier sources, smaller ids. Samples
    whose text is out of bounds come last: they will be dropped, so their copies are not.
    """
    names = np.array(judged.ids, np.str_)
    better = (names, priority, -judged.file_bytes, -judged.area, judged.late != 0, ~stored)
    rank = np.empty(len(judged), np.int64)
    rank[np.lexsort((np.arange(len(judged)), *better))] = np.arange(len(judged))
    return rank


def greedy(
    pairs: Indices,
    distances: NDArray[Any],
    rank: Indices,
    decisions: Decisions,
    reason: str,
) -> None:
    """Drop the worse of each pair whose better one stays, from the best sample on."""
    better = np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], 0, 1)
    rows = np.arange(len(pairs))
    keepers, others = pairs[rows, better], pairs[rows, 1 - better]
    for at in np.lexsort((rank[others], rank[keepers])):
        keeper, other = keepers[at], others[at]
        if decisions.reason[keeper] == 0 and decisions.reason[other] == 0:
            decisions.drop(other, reason, keeper, distances[at])


def _drop_same(
    samples: Indices,
    keys: NDArray[Any],
    rank: Indices,
    decisions: Decisions,
    reason: str,
) -> None:
    """Of these samples with equal keys [n, k] drop all but the best."""
    order = np.lexsort((rank[samples], *keys[samples].T))
    samples = samples[order]
    same = np.zeros(len(samples), np.bool_)
    same[1:] = (keys[samples[1:]] == keys[samples[:-1]]).all(axis=1)
    # The best of a group comes first, so its place is the last one that is not the same.
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(samples))))
    decisions.drop(samples[same], reason, samples[starts[same]], 0.0)


def _drop_near(
    judged: Judged,
    rank: Indices,
    decisions: Decisions,
    recipe: CurateRecipe,
    executor: Executor,
    folder: Path,
) -> Pairs:
    """Drop near copies; the pairs of samples whose images are, of the same role and number."""
    near, first = recipe.stages.near, judged.first
    able = decisions.alive & (judged.count > 0)
    able[able] &= judged.qualities[first[able]] >= near.min_quality
    on = np.isin(judged.role, [CODES[role] for role in near.on])
    hashes = np.zeros((len(judged), WORDS), np.uint64)
    hashes[able] = judged.hashes[first[able]]
    # What is close to one of some equal hashes is so to all: one stands for many.
    single = np.flatnonzero(able & on & (judged.count == 1))
    keys = np.column_stack([judged.role.astype(np.uint64), hashes])
    _drop_same(single, keys, rank, decisions, "near.copy")
    samples = np.flatnonzero(able & decisions.alive)
    unique, inverse = np.unique(hashes[samples], axis=0, return_inverse=True)
    path = folder / "hashes.npy"
    try:
        np.save(path, unique)
        tasks = [(path, band, near.distance, near.probe) for band in range(BANDS)]
        parts: list[Pairs] = [np.zeros((0, 3), np.int64)] * BANDS
        for band, part in executor.run(_band, tasks):
            parts[band] = part
    finally:
        path.unlink(missing_ok=True)
    pairs = _spread(sorted_pairs(parts), samples, inverse.reshape(-1), rank, judged)
    rows = pairs[on[pairs[:, 0]]]
    greedy(rows, rows[:, 2], rank, decisions, "near.copy")
    return pairs


def _band(path: Path, band: int, distance: int, probe: int) -> Pairs:
    return band_pairs(np.load(path), band, distance, probe)


def _spread(
    pairs: Pairs, samples: Indices, inverse: Indices, rank: Indices, judged: Judged
) -> Pairs:
    """Pairs of samples from those of unique hashes, and of samples that share one."""
    order = np.lexsort((rank[samples], inverse))
    starts = np.searchsorted(inverse[order], np.arange(inverse.max(initial=-1) + 2))
    sizes = np.diff(starts)
    members = samples[order]
    single = (sizes[pairs[:, :2]] == 1).all(axis=1)
    alone = pairs[single].copy()
    alone[:, :2] = members[starts[alone[:, :2]]]
    parts = [alone]
    for one, other, distance in pairs[~single]:
        first, second = (members[starts[n] : starts[n + 1]] for n in (one, other))
        parts.append(_with_distance(_crossed(first, second), int(distance)))
        if len(first) > MAX_PAIRED < len(second):
            rest = _crossed(second[:MAX_PAIRED], first[MAX_PAIRED:])
            parts.append(_with_distance(rest, int(distance)))
    for group in np.flatnonzero(sizes > 1):
        shared = members[starts[group] : starts[group + 1]]
        heads = range(min(MAX_PAIRED, len(shared) - 1))
        paired = [_crossed(shared[n : n + 1], shared[n + 1 :]) for n in heads]
        parts.append(_with_distance(np.concatenate(paired), 0))
    return _alike(np.concatenate(parts), judged)


def _with_distance(pairs: Indices, distance: int) -> Pairs:
    return np.column_stack([pairs, np.full(len(pairs), distance)])


def _alike(pairs: Pairs, judged: Judged) -> Pairs:
    """Pairs, whose first images are alike, of one role and number of images that all are."""
    one, other = pairs[:, 0], pairs[:, 1]
    keep = (judged.role[one] == judged.role[other]) & (judged.count[one] == judged.count[other])
    first = judged.first
    for at in np.flatnonzero(keep & (judged.count[one] > 1)):
        rows = [first[n] + np.arange(judged.count[n]) for n in pairs[at, :2]]
        bits = np.bitwise_count(judged.hashes[rows[0]] ^ judged.hashes[rows[1]]).sum(axis=1)
        keep[at] = bool((bits <= MAX_DISTANCE).all())
    return pairs[keep]


def _drop_texts(
    judged: Judged, rank: Indices, decisions: Decisions, images: Pairs, bound: float
) -> None:
    """Drop texts at least `bound` alike: of samples without images, or with like ones."""
    texts = decisions.alive & judged.has_text
    alone = texts & (judged.role == 0) & (judged.count == 0)
    # Equal texts, of equal images, are like the same others: one stands for many.
    equal = np.flatnonzero(alone | (texts & (judged.count > 0)))
    prints = _fingerprints(judged.signatures)
    keys = np.column_stack([judged.role.astype(np.uint64), judged.keys, prints])
    _drop_same(equal, keys, rank, decisions, "text.copy")
    documents = np.flatnonzero(alone & decisions.alive)
    documents = documents[np.argsort(rank[documents])]
    both = texts[images[:, 0]] & texts[images[:, 1]]
    like = documents[_like_texts(judged.signatures[documents], bound)]
    pairs = np.unique(np.concatenate([like, images[both][:, :2]]), axis=0)
    alike = similarities(judged.signatures, pairs)
    rows = alike >= bound
    greedy(pairs[rows], 1 - alike[rows], rank, decisions, "text.copy")


def _fingerprints(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A hash of 64 bits of each signature (FNV-1a over its values), [n]."""
    prints = np.full(len(signatures), 0xCBF29CE484222325, np.uint64)
    for column in signatures.T:
        prints = (prints ^ column) * np.uint64(0x100000001B3)
    return prints


def _like_texts(signatures: NDArray[np.uint32], bound: float, split: int = 0) -> Indices:
    """Pairs of texts that agree in all values of some band and are at least `bound` alike, [n, 2].

    Of a group that agrees, the first MAX_PAIRED are compared with all others; with `split`, all
    texts from it on with those before it.
    """
    pairs: list[Indices] = [np.zeros((0, 2), np.int64)]
    for band in range(TEXT_BANDS if len(signatures) > 1 else 0):
        keys = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        _, inverse, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        ends = np.cumsum(sizes)
        for number in np.flatnonzero(sizes > 1):
            group = order[ends[number] - sizes[number] : ends[number]]
            at = int(np.searchsorted(group, split))
            for place, text in enumerate(group[at:] if split else group[:MAX_PAIRED]):
                others = group[:at] if split else group[place + 1 :]
                alike = similarity(signatures[text], signatures[others]) >= bound
                pairs.append(_crossed(np.array([text]), others[alike]))
    return np.unique(np.concatenate(pairs), axis=0)


def _crossed(some: Indices, others: Indices) -> Indices:
    """Pairs of the first MAX_PAIRED of some samples with others, [n, 2]."""
    some = some[:MAX_PAIRED]
    return np.column_stack([np.repeat(some, len(others)), np.tile(others, len(some))])


def _drop_evaluation(
    judged: Judged, evaluation: Judged, decisions: Decisions, recipe: CurateRecipe
) -> None:
    """Drop samples with an image near one of the evaluation sets, or with a like text."""
    near = recipe.stages.near
    same = (judged.count > 0) & np.isin(_whole(judged.keys), _whole(evaluation.keys))
    decisions.reason[decisions.alive & same] = NUMBERS["evaluation.image"]
    listed: Words = evaluation.hashes[evaluation.qualities >= near.min_quality]
    owner = np.repeat(np.arange(len(judged)), judged.count)
    able = decisions.alive[owner] & (judged.qualities >= near.min_quality)
    rows = np.flatnonzero(able)
    hits = rows[first_within(judged.hashes[rows], listed, near.distance) >= 0]
    decisions.reason[np.unique(owner[hits])] = NUMBERS["evaluation.image"]
    samples = np.flatnonzero(decisions.alive & judged.has_text)
    theirs = np.unique(evaluation.signatures[evaluation.has_text], axis=0)
    both = np.concatenate([judged.signatures[samples], theirs])
    if len(samples):
        pairs = _like_texts(both, recipe.stages.text.similarity, len(samples))
        decisions.reason[samples[np.unique(pairs[:, 1])]] = NUMBERS["evaluation.text"]


def _whole(keys: NDArray[np.uint64]) -> NDArray[np.void]:
    """Keys [n, 2] as one value each."""
    return np.ascontiguousarray(keys).view("V16").reshape(-1)
