"""The reference set: its statistics from the file itself, from the cache, or from its images."""

import hashlib
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common.reporting import say
from evaluations.collect import collect, kept_rows
from evaluations.features import Extractor
from evaluations.images import ImageSet
from evaluations.statistics import Statistics

if TYPE_CHECKING:
    from evaluations.evaluate import EvaluateConfig

CACHE_SCHEMA = 1


class Reference(NamedTuple):
    """The reference in one feature space, on rank 0; elsewhere empty.

    statistics: by kind ("pooled", "spatial"). pooled: (K, D) features for neighbour and kernel metrics, of the images
    `rows` (K,). n: images the set has.
    """

    n: int
    statistics: dict[str, Statistics]
    pooled: torch.Tensor
    rows: np.ndarray


def read_reference(reference: ImageSet, extractor: Extractor, settings: "EvaluateConfig") -> Reference:
    """Statistics of the reference: from the file itself (ADM's mu, sigma), the cache, or its images."""
    empty = Reference(len(reference), {}, torch.zeros(0, 0), np.zeros(0, dtype=np.int64))
    given = reference.statistics or {} if extractor.space == "inception" else {}
    neighbours_wanted = (
        settings.precision_recall
        or settings.density_coverage
        or settings.kernel_distance
        or settings.memorization
        or extractor.space == "clip"
    )
    if given and not neighbours_wanted:
        return empty._replace(statistics=given)
    file, cached = None, None
    if settings.cache and _rank() == 0:
        parts = (CACHE_SCHEMA, reference.digest(), extractor.digest, settings.dtype, settings.pr_reference, bool(given))
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        file = settings.cache_dir.expanduser() / f"{key}.npz"
        cached = _read_cache(file, empty, given)
    hit = torch.tensor(float(cached is not None))
    if dist.is_initialized():
        dist.broadcast(hit, 0)
    if hit:
        return cached or empty
    images = reference
    if given and len(reference) > settings.pr_reference:  # the statistics are there: only neighbours are missing
        images = reference.first(settings.pr_reference)
    found = collect(
        images,
        extractor,
        batch_size=settings.batch_size,
        keep=settings.pr_reference,
        progress=f"reference, {extractor.space}",
    )
    if _rank() > 0:
        return empty
    statistics = given or {kind: found.statistics(kind) for kind in found.moments}
    rows = kept_rows(images, settings.pr_reference, torch.arange(len(images))).nonzero()[:, 0].numpy()
    known = Reference(len(reference), statistics, found.pooled, rows)
    if file is not None:
        _write_cache(file, known, given)
    return known


def _write_cache(file: Path, known: Reference, given: dict) -> None:
    arrays = {"pooled_features": known.pooled.numpy(), "rows": known.rows}
    for kind, stats in {} if given else known.statistics.items():
        arrays |= {f"{kind}_n": np.array(stats.n), f"{kind}_mean": stats.mean, f"{kind}_covariance": stats.covariance}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        temporary.replace(file)
    except OSError as error:  # the numbers do not depend on it
        say(
            f"the reference's statistics are not kept: {file.parent} cannot be written ({error.strerror}); see --cache-dir"
        )


def _read_cache(file: Path, empty: Reference, given: dict) -> Reference | None:
    """None when there is no such file, or when it cannot be read: it will be written anew."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            statistics = dict(given)
            for name in stored.files:
                if name.endswith("_mean"):
                    kind = name.removesuffix("_mean")
                    statistics[kind] = Statistics(int(stored[f"{kind}_n"]), stored[name], stored[f"{kind}_covariance"])
            return Reference(empty.n, statistics, torch.from_numpy(stored["pooled_features"]), stored["rows"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        sys.stderr.write(f"cached reference statistics {file} cannot be read ({error}): they are computed again\n")
        return None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
