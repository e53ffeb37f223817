"""The metrics: where each is measured, what it needs, the flag that asks for it, the function, and its columns in tables.

A new metric is a function and a line of METRICS. Nothing here imports torch before a metric is computed, so that tables of
results are printed at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.files import WriteError
from common.reporting import say
from evaluations.settings import EvaluateConfig

if TYPE_CHECKING:
    from torch import Tensor

    from evaluations.collect import Collected
    from evaluations.image_sets import ImageSet
    from evaluations.reference import Reference

# Where a metric is measured: with a classifier, with the encoder of class tokens, or in feature spaces: in all of them (its
# key gets the name of the space, but for Inception's), in all but Inception's, in the first one, or in the one of that name.
CLASSIFIER, TOKENS = "with the classifier", "with the class token encoder"
ANY_SPACE, OTHER_SPACE, FIRST_SPACE = "in any space", "in any space but inception", "in the first space"
INCEPTION, CLIP = "inception", "clip"
# What a metric needs besides: logits, statistics of the reference, or features of its single images.
LOGITS, POOLED, SPATIAL, ROWS = "logits", "pooled", "spatial", "rows"


class Metric(NamedTuple):
    """One number. `error`: its standard error, or None. `space`: the features it was measured in."""

    value: float
    error: float | None = None
    space: str = ""
    n_samples: int = 0
    n_reference: int = 0


class Column(NamedTuple):
    """A metric in tables: `key` in results.json, title, decimal places, and whether larger is better."""

    key: str
    title: str
    digits: int = 3
    larger: bool = False


@dataclass(frozen=True)
class Inputs:
    """What one network has made of the samples, for all metrics that are measured with it.

    places: see `places`. out: the results file. reference: EMPTY without one. tokens: (N, D) generated class tokens.
    class_means: (C, D) of the encoder's tokens. training: (T, D) pooled features of the images trained on.
    """

    places: set[str]
    space: str
    settings: EvaluateConfig
    out: Path
    samples: "ImageSet"
    reference_images: "ImageSet | None"
    reference: "Reference"
    found: "Collected"
    tokens: "Tensor | None" = None
    class_means: "Tensor | None" = None
    training: "Tensor | None" = None

    @cached_property
    def rows(self) -> "tuple[Tensor, Tensor]":
        """Pooled features of the reference (K, D) and of the samples (N, D), on the device of the network."""
        device = self.found.moments[POOLED][0].mean.device
        return self.reference.pooled.to(device), self.found.pooled.to(device)

    def available(self) -> dict[str, int]:
        """What a metric may need and can have, with the number of reference images behind it."""
        counts = {kind: known.n for kind, known in self.reference.statistics.items()} | {"": 0}
        counts |= {ROWS: len(self.reference.pooled)} if len(self.reference.pooled) else {}
        return counts | ({LOGITS: 0} if self.found.score else {})


Numbers = Sequence[
    tuple[float, float | None] | None
]  # value and standard error of each column; None: cannot be computed


class Entry(NamedTuple):
    """A metric, or several that one function computes together. flag: the setting that asks for it; empty: always."""

    compute: Callable[[Inputs], Numbers]
    place: str
    need: str
    flag: str
    columns: tuple[Column, ...]

    def wanted(self, settings: EvaluateConfig, places: set[str]) -> bool:
        """Whether it is asked for in one of these places."""
        return self.place in places and bool(not self.flag or getattr(settings, self.flag))


def places(space: str, *, first: bool) -> set[str]:
    """Where a metric is, that is measured in this feature space."""
    return {ANY_SPACE, space} | ({OTHER_SPACE} if space != INCEPTION else set()) | ({FIRST_SPACE} if first else set())


def rows_wanted(settings: EvaluateConfig, places: set[str]) -> bool:
    """Whether any metric here needs features of single reference images."""
    return any(entry.need == ROWS and entry.wanted(settings, places) for entry in METRICS)


def compute(inputs: Inputs) -> dict[str, Metric]:
    """All metrics that are wanted and whose needs the inputs meet, by their keys in results.json."""
    found: dict[str, Metric] = {}
    n, available = len(inputs.samples), inputs.available()
    for entry in METRICS:
        if entry.need not in available or not entry.wanted(inputs.settings, inputs.places):
            continue
        n_reference = available[entry.need]
        against = f" and {n_reference:,} reference images" if n_reference else ""
        say(f"{inputs.space}: {', '.join(column.title for column in entry.columns)} of {n:,} samples{against}")
        suffix = f"_{inputs.space}" if entry.place in (ANY_SPACE, OTHER_SPACE) and inputs.space != INCEPTION else ""
        for column, number in zip(entry.columns, entry.compute(inputs)):
            if number is not None:
                found[column.key + suffix] = Metric(*number, inputs.space, n, n_reference)
    return found


def _frechet(inputs: Inputs, kind: str) -> Numbers:
    return [inputs.found.frechet(inputs.reference.statistics[kind], kind, inputs.settings.error_groups)]


def _inception_score(inputs: Inputs) -> Numbers:
    assert inputs.found.score is not None
    return [inputs.found.score.estimate()]


def _precision_recall(inputs: Inputs) -> Numbers:
    from evaluations.metrics import share
    from evaluations.neighbours import precision_recall

    reference, samples = inputs.rows
    both = precision_recall(reference, samples, rule=inputs.settings.pr_dtype)
    return share(both.precision, len(samples)), share(both.recall, len(reference))


def _density_coverage(inputs: Inputs) -> Numbers:
    from evaluations.metrics import share
    from evaluations.neighbours import density_coverage

    density, coverage = density_coverage(*inputs.rows)
    return (density, None), share(coverage, len(inputs.rows[0]))


def _kernel_distance(inputs: Inputs) -> Numbers:
    from evaluations.metrics import kernel_distance

    return [kernel_distance(*inputs.rows, seed=inputs.settings.seed)]


def _mind(inputs: Inputs) -> Numbers:
    from evaluations.sliced import Mind

    reference, samples = inputs.rows
    return [Mind(reference, seed=inputs.settings.seed)(samples)]


def _clip_mmd(inputs: Inputs) -> Numbers:
    from evaluations.metrics import clip_mmd

    return [(clip_mmd(*inputs.rows), None)]


def _authenticity(inputs: Inputs) -> Numbers:
    """Also writes memorization.png beside the results."""
    from evaluations.memorization import closest_pairs, write_pairs

    assert inputs.reference_images is not None
    pairs = closest_pairs(*inputs.rows, inputs.settings.memorization)
    picture = inputs.out.with_name("memorization.png")
    try:
        write_pairs(picture, pairs, inputs.samples, inputs.reference_images, inputs.reference.rows)
    except WriteError as error:
        say(f"warning: the closest pairs are not shown ({error})")
    return [(pairs.authenticity, None)]


def _nearness(inputs: Inputs) -> Numbers:
    from evaluations.memorization import copying

    assert inputs.training is not None
    held_out, samples = inputs.rows
    return [copying(inputs.training.to(samples.device), held_out, samples)]


def _class_accuracy(inputs: Inputs) -> Numbers:
    from evaluations.metrics import share

    assert inputs.found.predictions is not None
    hits = inputs.found.predictions.numpy() == inputs.samples.labels
    return [share(float(hits.mean()), len(hits))]


def _class_tokens(inputs: Inputs) -> Numbers:
    from evaluations.coherence import token_metrics

    assert inputs.tokens is not None
    return token_metrics(inputs.tokens, inputs.found.pooled, inputs.class_means)


_fid, _sfid = partial(_frechet, kind=POOLED), partial(_frechet, kind=SPATIAL)
LARGER = True  # is better
METRICS = (  # in the order of the columns of tables
    Entry(_fid, INCEPTION, POOLED, "", (Column("fid", "FID", 2),)),
    Entry(_sfid, INCEPTION, SPATIAL, "", (Column("sfid", "sFID", 2),)),
    Entry(_fid, OTHER_SPACE, POOLED, "", (Column("fd", "FD", 2),)),
    Entry(_inception_score, INCEPTION, LOGITS, "", (Column("inception_score", "IS", 1, LARGER),)),
    Entry(
        _precision_recall,
        ANY_SPACE,
        ROWS,
        "precision_recall",
        (Column("precision", "Precision", 3, LARGER), Column("recall", "Recall", 3, LARGER)),
    ),
    Entry(
        _density_coverage,
        ANY_SPACE,
        ROWS,
        "density_coverage",
        (Column("density", "Density", 3, LARGER), Column("coverage", "Coverage", 3, LARGER)),
    ),
    Entry(_kernel_distance, OTHER_SPACE, ROWS, "kernel_distance", (Column("kd", "KD", 5),)),
    Entry(_kernel_distance, INCEPTION, ROWS, "kernel_distance", (Column("kid", "KID", 5),)),
    Entry(_mind, ANY_SPACE, ROWS, "mind", (Column("mind", "MIND"),)),
    Entry(_clip_mmd, CLIP, ROWS, "", (Column("cmmd", "CMMD"),)),
    Entry(_class_accuracy, CLASSIFIER, "", "", (Column("class_accuracy", "Class accuracy", 3, LARGER),)),
    Entry(_nearness, FIRST_SPACE, ROWS, "training_images", (Column("nearer_to_training", "Nearer to training"),)),
    Entry(_authenticity, FIRST_SPACE, ROWS, "memorization", (Column("authenticity", "Authenticity", 3, LARGER),)),
    Entry(
        _class_tokens,
        TOKENS,
        "",
        "",
        (
            Column("token_cosine", "Token cosine", 3, LARGER),
            Column("token_cosine_shuffled", "Token cosine, shuffled"),
            Column("token_retrieval", "Token retrieval", 3, LARGER),
            Column("token_class_agreement", "Token class agreement", 3, LARGER),
        ),
    ),
)
RATIOS = (Column("fdr", "FDr"),)  # compare.py's: a Frechet distance over that of held-out images
COLUMNS = {column.key: column for column in (*(c for entry in METRICS for c in entry.columns), *RATIOS)}
