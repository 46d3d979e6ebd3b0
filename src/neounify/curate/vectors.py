"""Stage 11: like vectors inside clusters (Abbas et al., "SemDeDup", 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neounify.curate.copies import Decisions
from neounify.curate.recipe import CurateRecipe

VECTORS_PER_CLUSTER = 1000
ROUNDS = 10
BLOCK = 4096

Vectors = NDArray[np.float32]


def drop_like_vectors(
    vectors: Vectors, owners: NDArray[np.int64], decisions: Decisions, recipe: CurateRecipe
) -> None:
    """Drop samples whose unit vector is like that of an earlier one in its cluster.

    vectors: [n, d]; owners: their samples, [n], in input order, the order of keeping.
    """
    stage = recipe.stages.embeddings
    count = stage.clusters or max(1, len(vectors) // VECTORS_PER_CLUSTER)
    clusters = spherical_means(vectors, min(count, len(vectors)), recipe.seed)
    for cluster in range(int(clusters.max()) + 1):
        members = np.flatnonzero(clusters == cluster)
        for at, keeper, cosine in _like(vectors[members], stage.bound):
            sample = owners[members[at : at + 1]]
            decisions.drop(
                sample, "embeddings.bound", owners[members[keeper : keeper + 1]], 1 - cosine
            )


def spherical_means(vectors: Vectors, count: int, seed: int) -> NDArray[np.int64]:
    """Clusters of unit vectors by cosine, [n]: k-means from `count` of them."""
    rng = np.random.default_rng(seed)
    centres = vectors[np.sort(rng.permutation(len(vectors))[:count])].astype(np.float64)
    nearest = np.zeros(len(vectors), np.int64)
    for _ in range(ROUNDS if count > 1 else 0):
        for start in range(0, len(vectors), BLOCK):
            block = vectors[start : start + BLOCK].astype(np.float64)
            nearest[start : start + BLOCK] = np.argmax(block @ centres.T, axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
    return nearest


def _like(vectors: Vectors, bound: float) -> list[tuple[int, int, float]]:
    """(vector, kept one like it, cosine) of all that are dropped, the first ones kept."""
    kept: list[int] = []
    dropped = []
    for number in range(len(vectors)):
        if kept:
            cosines = vectors[kept] @ vectors[number]
            best = int(np.argmax(cosines))
            if cosines[best] >= bound:
                dropped.append((number, kept[best], float(cosines[best])))
                continue
        kept.append(number)
    return dropped
