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

import numpy as np
from numpy.typing import NDArray

from neounify.curate.executor import Executor
from neounify.curate.judge import INPUT, NUMBERS, TARGET, Judged
from neounify.curate.near import BANDS, Pairs, Words, band_pairs, first_within, sorted_pairs
from neounify.curate.recipe import CurateRecipe, Role
from neounify.curate.texts import BANDS as TEXT_BANDS
from neounify.curate.texts import ROWS, similarity

MAX_PAIRED = 64
"""Texts of one band bucket of which all pairs are compared; of more, all with the first."""
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
    priority: NDArray[np.int64],
    stored: NDArray[np.bool_],
    evaluation: Judged | None,
    recipe: CurateRecipe,
    executor: Executor,
    folder: Path,
) -> Decisions:
    """Reasons of stages 5, 6, 7 and 13. `stored` samples are of earlier curations, and stay."""
    size = len(judged)
    decisions = Decisions(judged.early.copy(), np.full(size, -1), np.full(size, np.nan))
    order = keeping_order(judged, priority, stored)
    rank = np.empty(size, np.int64)
    rank[order] = np.arange(size)
    stages = recipe.stages
    if stages.exact.enabled:
        _drop_exact(judged, rank, decisions, [CODES[role] for role in stages.exact.on])
    pairs = np.zeros((0, 3), np.int64)
    if stages.near.enabled:
        pairs = _near(judged, decisions, recipe, executor, folder)
        on = np.isin(judged.role[pairs[:, 0]], [CODES[role] for role in stages.near.on])
        greedy(pairs[on], rank, decisions, "near.copy")
        earlier = (decisions.copy_of >= 0) & stored[np.maximum(decisions.copy_of, 0)]
        decisions.reason[earlier & ~stored] = NUMBERS["near.stored"]
    late = decisions.alive & (judged.late != 0)
    decisions.reason[late] = judged.late[late]
    if stages.text.enabled:
        like = _text_pairs(judged, decisions, pairs, stages.text.similarity)
        greedy(like, rank, decisions, "text.copy")
        copied = decisions.reason == NUMBERS["text.copy"]
        decisions.distance[copied] = 1 - decisions.distance[copied] / 1000
    if stages.evaluation.enabled and evaluation is not None:
        _drop_evaluation(judged, evaluation, decisions, recipe)
    return decisions


def keeping_order(
    judged: Judged, priority: NDArray[np.int64], stored: NDArray[np.bool_]
) -> Indices:
    """Samples from the one that is kept first: stored, larger, earlier source, smaller id."""
    names = np.array(judged.ids, np.str_)
    place = np.arange(len(judged))
    return np.lexsort((place, names, priority, -judged.file_bytes, -judged.area, ~stored))


def greedy(pairs: Pairs, rank: Indices, decisions: Decisions, reason: str) -> None:
    """Drop the worse of each pair whose better one stays, from the best sample on."""
    better = np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], 0, 1)
    rows = np.arange(len(pairs))
    keepers, others = pairs[rows, better], pairs[rows, 1 - better]
    for at in np.lexsort((rank[others], rank[keepers])):
        keeper, other = keepers[at], others[at]
        if decisions.reason[keeper] == 0 and decisions.reason[other] == 0:
            decisions.drop(other, reason, keeper, pairs[at, 2])


def _drop_exact(judged: Judged, rank: Indices, decisions: Decisions, roles: list[int]) -> None:
    samples = np.flatnonzero(decisions.alive & np.isin(judged.role, roles))
    keys = judged.keys[samples]
    order = np.lexsort((rank[samples], keys[:, 1], keys[:, 0], judged.role[samples]))
    samples = samples[order]
    same = np.zeros(len(samples), np.bool_)
    if len(samples) > 1:
        alike = (judged.keys[samples[1:]] == judged.keys[samples[:-1]]).all(axis=1)
        same[1:] = alike & (judged.role[samples[1:]] == judged.role[samples[:-1]])
    # The best of a group comes first, so its place is the last one that is not the same.
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(samples))))
    decisions.drop(samples[same], "exact.copy", samples[starts[same]], 0.0)


def _near(
    judged: Judged, decisions: Decisions, recipe: CurateRecipe, executor: Executor, folder: Path
) -> Pairs:
    """Pairs of samples whose images are near copies, of the same role and number."""
    near = recipe.stages.near
    first = judged.first
    able = decisions.alive & (judged.count > 0)
    able[able] &= judged.qualities[first[able]] >= near.min_quality
    samples = np.flatnonzero(able)
    words = judged.hashes[first[samples]]
    # Samples of one hash are one: many copies of an image would make pairs without number.
    unique, inverse = np.unique(words, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    path = folder / "hashes.npy"
    np.save(path, unique)
    tasks = [(path, band, near.distance, near.probe) for band in range(BANDS)]
    parts: list[Pairs] = [np.zeros((0, 3), np.int64)] * BANDS
    for band, part in executor.run(_band, tasks):
        parts[band] = part
    path.unlink()
    return _spread(sorted_pairs(parts), samples, inverse, judged)


def _band(path: Path, band: int, distance: int, probe: int) -> Pairs:
    return band_pairs(np.load(path), band, distance, probe)


def _spread(pairs: Pairs, samples: Indices, inverse: Indices, judged: Judged) -> Pairs:
    """Pairs of samples from those of unique hashes, and of samples that share one."""
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(inverse.max(initial=-1) + 2))
    sizes = np.diff(starts)
    members = samples[order]
    single = (sizes[pairs[:, :2]] == 1).all(axis=1)
    alone = pairs[single].copy()
    alone[:, :2] = members[starts[alone[:, :2]]]
    parts = [alone]
    for one, other, distance in pairs[~single]:
        first, second = (members[starts[n] : starts[n + 1]] for n in (one, other))
        product = np.column_stack([np.repeat(first, len(second)), np.tile(second, len(first))])
        parts.append(_with_distance(product, int(distance)))
    for group in np.flatnonzero(sizes > 1):
        parts.append(_with_distance(_paired(members[starts[group] : starts[group + 1]]), 0))
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


def _text_pairs(judged: Judged, decisions: Decisions, images: Pairs, bound: float) -> Pairs:
    """Pairs of texts at least `bound` alike: of samples without images, or with like ones.

    The third column is the similarity in thousandths.
    """
    alive = decisions.alive & judged.has_text
    documents = np.flatnonzero(alive & (judged.role == 0) & (judged.count == 0))
    candidates = [_band_candidates(judged.signatures[documents], documents)]
    if len(images):
        both = alive[images[:, 0]] & alive[images[:, 1]]
        candidates.append(images[both][:, :2])
    pairs = np.unique(np.concatenate(candidates), axis=0)
    if not len(pairs):
        return np.zeros((0, 3), np.int64)
    alike = similarity(judged.signatures[pairs[:, 0]], judged.signatures[pairs[:, 1]])
    rows = np.column_stack([pairs, np.round(alike * 1000).astype(np.int64)])
    return rows[alike >= bound]


def _band_candidates(signatures: NDArray[np.uint32], samples: Indices) -> Indices:
    """Pairs of samples that agree in all values of some band, [n, 2]."""
    candidates: list[Indices] = [np.zeros((0, 2), np.int64)]
    for band in range(TEXT_BANDS if len(samples) > 1 else 0):
        keys = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        _, inverse = np.unique(keys, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        order = np.argsort(inverse, kind="stable")
        cuts = np.flatnonzero(np.diff(inverse[order])) + 1
        for group in np.split(order, cuts):
            if len(group) > 1:
                candidates.append(samples[_paired(np.sort(group))])
    return np.concatenate(candidates)


def _paired(group: Indices) -> Indices:
    if len(group) > MAX_PAIRED:
        return np.column_stack([np.full(len(group) - 1, group[0]), group[1:]])
    one, other = np.triu_indices(len(group), 1)
    return np.column_stack([group[one], group[other]])


def _drop_evaluation(
    judged: Judged, evaluation: Judged, decisions: Decisions, recipe: CurateRecipe
) -> None:
    """Drop samples with an image near one of the evaluation sets, or with a like text."""
    near = recipe.stages.near
    listed: Words = evaluation.hashes[evaluation.qualities >= near.min_quality]
    owner = np.repeat(np.arange(len(judged)), judged.count)
    able = decisions.alive[owner] & (judged.qualities >= near.min_quality)
    rows = np.flatnonzero(able)
    hits = rows[first_within(judged.hashes[rows], listed, near.distance) >= 0]
    decisions.reason[np.unique(owner[hits])] = NUMBERS["evaluation.image"]
    samples = np.flatnonzero(decisions.alive & judged.has_text)
    theirs = evaluation.signatures[evaluation.has_text]
    both = np.concatenate([judged.signatures[samples], theirs])
    pairs = _band_candidates(both, np.arange(len(both)))
    cross = (pairs < len(samples)).sum(axis=1) == 1
    pairs = np.sort(pairs[cross], axis=1)
    alike = similarity(both[pairs[:, 0]], both[pairs[:, 1]]) >= recipe.stages.text.similarity
    decisions.reason[samples[np.unique(pairs[alike, 0])]] = NUMBERS["evaluation.text"]
