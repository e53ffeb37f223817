"""The reference set: its statistics from the file itself, from the cache, or from its images."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.arrays import read_npz
from common.files import WriteError, replacing
from common.processes import rank, share
from common.reporting import say
from config import UserError
from evaluations.collect import collect, kept_rows
from evaluations.features import Extractor
from evaluations.image_sets import ImageSet
from evaluations.settings import EvaluateConfig
from evaluations.statistics import Statistics

CACHE_SCHEMA = 1


class Reference(NamedTuple):
    """The reference in one feature space, on rank 0; elsewhere, and without one, EMPTY.

    statistics: by kind ("pooled", "spatial"). pooled: (K, D) features for neighbour and kernel metrics, of the images
    with the indices `rows` (K,).
    """

    statistics: dict[str, Statistics]
    pooled: torch.Tensor
    rows: np.ndarray


EMPTY = Reference({}, torch.zeros(0, 0), np.zeros(0, dtype=np.int64))


def read_reference(
    reference: ImageSet | None, extractor: Extractor, settings: EvaluateConfig, *, rows: bool
) -> Reference:
    """The reference as one extractor sees it. `rows`: whether features of single images are needed."""
    if reference is None:
        return EMPTY
    given = reference.statistics or {} if extractor.space == "inception" else {}
    if not len(reference) and (rows or not given):
        left_out = "metrics of single reference images are" if given else "all metrics against the reference are"
        say(f"{reference.name} holds Inception statistics and no images: in {extractor.space} {left_out} left out")
    if (given and not rows) or not len(reference):
        return EMPTY._replace(statistics=given)
    file, cached = None, None
    if settings.cache and rank() == 0:
        chosen = (settings.pr_reference, bool(given), *(("evenly",) if reference.grouped else ()))
        parts = (CACHE_SCHEMA, reference.digest(), extractor.digest, settings.dtype, *chosen)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        file = _place(settings.cache_dir, f"{key}.npz")
        cached = None if file is None else _read_cache(file, given)
    if share(cached is not None):
        return cached or EMPTY
    images = reference
    if given and not reference.grouped:  # the statistics are known: only features of the kept images are missing
        images = reference.first(settings.pr_reference)
    found = collect(
        images,
        extractor,
        batch_size=settings.batch_size,
        keep=settings.pr_reference,
        progress=f"reference, {extractor.space}",
    )
    if rank() > 0:
        return EMPTY
    statistics = given or {kind: found.statistics(kind) for kind in found.moments}
    kept = kept_rows(images, settings.pr_reference, torch.arange(len(images))).nonzero()[:, 0].numpy()
    known = Reference(statistics, found.pooled, kept)
    if file is not None:
        _write_cache(file, known, given)
    return known


def _place(folder: Path, name: str) -> Path | None:
    """The file of that name in the cache; None where its place is the home folder of a user who has none."""
    try:
        return folder.expanduser() / name
    except RuntimeError as error:
        say(f"warning: the statistics of the reference are not kept ({error}); --cache-dir names another folder")
        return None


def _write_cache(file: Path, known: Reference, given: dict[str, Statistics]) -> None:
    arrays = {"pooled_features": known.pooled.numpy(), "rows": known.rows}
    for kind, stats in {} if given else known.statistics.items():
        arrays |= {f"{kind}_n": np.array(stats.n), f"{kind}_mean": stats.mean, f"{kind}_covariance": stats.covariance}
    try:
        with replacing(file, shared=True) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)
    except WriteError as error:  # the numbers do not depend on it
        say(f"warning: the statistics of the reference are not kept ({error}); --cache-dir names another folder")


def _read_cache(file: Path, given: dict[str, Statistics]) -> Reference | None:
    """None when there is no such file, or when it cannot be read: it will be written again."""
    if not file.is_file():
        return None
    try:
        stored = read_npz(file)
        kinds = [name.removesuffix("_mean") for name in stored if name.endswith("_mean")]
        computed = {
            kind: Statistics(int(stored[f"{kind}_n"]), stored[f"{kind}_mean"], stored[f"{kind}_covariance"])
            for kind in kinds
        }
        return Reference(given | computed, torch.from_numpy(stored["pooled_features"]), stored["rows"])
    except (OSError, UserError, KeyError, TypeError) as error:
        say(f"the cached statistics {file} cannot be read ({error}): they are computed again")
        return None
