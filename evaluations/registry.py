"""The metrics: for each one its columns, when it is wanted, what it needs, and the function that computes it.

A new metric is a function and an entry of METRICS. Nothing here imports torch before a metric is computed, so that tables of
results are printed at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.reporting import say
from evaluations.settings import EvaluateConfig

if TYPE_CHECKING:
    from torch import Tensor

    from evaluations.collect import Collected
    from evaluations.image_sets import ImageSet
    from evaluations.reference import Reference

INCEPTION = "inception"  # the space whose metrics have the plain names of the ADM evaluator
# What a metric may need. The first three name the network that has seen the samples.
FEATURES, CLASSIFIER, TOKENS = "feature network", "classifier", "class token encoder"
FIRST = "first feature space"
LOGITS = "logits"
POOLED, SPATIAL = "pooled", "spatial"  # statistics of the reference
ROWS = "reference rows"


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
    """What one network has made of the samples, for all metrics that need it.

    source: FEATURES, CLASSIFIER or TOKENS. out: the results file. tokens: (N, D), the
    generated class tokens. class_means: (C, D), of the encoder's class tokens.
    """

    source: str
    space: str
    settings: EvaluateConfig
    out: Path
    samples: "ImageSet"
    reference_images: "ImageSet | None"
    found: "Collected"
    reference: "Reference | None" = None
    tokens: "Tensor | None" = None
    class_means: "Tensor | None" = None
    first: bool = False

    @cached_property
    def rows(self) -> "tuple[Tensor, Tensor]":
        """Pooled features of the reference (K, D) and of the samples (N, D), on the device of the network."""
        assert self.reference is not None
        device = self.found.moments[POOLED][0].mean.device
        return self.reference.pooled.to(device), self.found.pooled.to(device)

    def offers(self) -> set[str]:
        """What a metric may need and these inputs have."""
        offered = {self.source} | ({FIRST} if self.first else set()) | ({LOGITS} if self.found.score else set())
        return offered if self.reference is None else offered | {ROWS, *self.reference.statistics}


Numbers = Sequence[tuple[float, float | None] | None]  # value and standard error for each column; None: cannot be had


@dataclass(frozen=True)
class Entry:
    """A metric, or several that one function computes together.

    wanted: by the settings, in this feature space. suffix: the key gets the name of the space (but for Inception's).
    """

    name: str
    columns: tuple[Column, ...]
    needs: tuple[str, ...]
    compute: Callable[[Inputs], Numbers]
    wanted: Callable[[EvaluateConfig, str], bool] = lambda settings, space: True
    suffix: bool = False

    def key(self, column: Column, space: str) -> str:
        """The key of a column in results.json."""
        return f"{column.key}_{space}" if self.suffix and space != INCEPTION else column.key

    def measure(self, inputs: Inputs) -> dict[str, Metric]:
        """Compute it, on rank 0."""
        n, n_reference = len(inputs.samples), 0
        if inputs.reference is not None:
            counts = {kind: known.n for kind, known in inputs.reference.statistics.items()}
            counts[ROWS] = len(inputs.reference.pooled)
            n_reference = max(counts.get(need, 0) for need in self.needs)
        say(
            f"{inputs.space}: {self.name} of {n:,} samples"
            + f" and {n_reference:,} reference images" * (n_reference > 0)
        )
        numbers = zip(self.columns, self.compute(inputs))
        return {
            self.key(column, inputs.space): Metric(*number, inputs.space, n, n_reference)
            for column, number in numbers
            if number is not None
        }


def compute(inputs: Inputs) -> dict[str, Metric]:
    """All metrics that are wanted and whose needs the inputs meet, by key."""
    offered = inputs.offers()
    found: dict[str, Metric] = {}
    for entry in METRICS:
        if offered.issuperset(entry.needs) and entry.wanted(inputs.settings, inputs.space):
            found |= entry.measure(inputs)
    return found


def rows_wanted(settings: EvaluateConfig, space: str) -> bool:
    """Whether any metric in this space needs features of single reference images."""
    return any(ROWS in entry.needs and entry.wanted(settings, space) for entry in METRICS)


# ------------------------------------------------------------------------------------------------------------ functions


def _frechet(inputs: Inputs, kind: str) -> Numbers:
    assert inputs.reference is not None
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


def _clip_mmd(inputs: Inputs) -> Numbers:
    from evaluations.metrics import clip_mmd

    return [(clip_mmd(*inputs.rows), None)]


def _authenticity(inputs: Inputs) -> Numbers:
    """Also writes memorization.png beside the results."""
    from evaluations.memorization import closest_pairs, write_pairs

    assert inputs.reference is not None and inputs.reference_images is not None
    pairs = closest_pairs(*inputs.rows, inputs.settings.memorization)
    picture = inputs.out.with_name("memorization.png")
    write_pairs(picture, pairs, inputs.samples, inputs.reference_images, inputs.reference.rows)
    return [(pairs.authenticity, None)]


def _class_accuracy(inputs: Inputs) -> Numbers:
    from evaluations.metrics import share

    labels, predictions = inputs.samples.labels, inputs.found.predictions
    assert labels is not None and predictions is not None
    return [share(float((predictions.numpy() == labels).mean()), len(labels))]


def _class_tokens(inputs: Inputs) -> Numbers:
    from evaluations.coherence import token_metrics

    assert inputs.tokens is not None
    return token_metrics(inputs.tokens, inputs.found.pooled, inputs.class_means)


# -------------------------------------------------------------------------------------------------------------- the list

METRICS = (  # in the order of the columns of tables
    Entry(
        "FID",
        (Column("fid", "FID", 2),),
        (FEATURES, POOLED),
        partial(_frechet, kind=POOLED),
        lambda settings, space: space == INCEPTION,
    ),
    Entry("sFID", (Column("sfid", "sFID", 2),), (FEATURES, SPATIAL), partial(_frechet, kind=SPATIAL)),
    Entry(
        "Frechet distance",
        (Column("fd", "FD", 2),),
        (FEATURES, POOLED),
        partial(_frechet, kind=POOLED),
        lambda settings, space: space != INCEPTION,
        suffix=True,
    ),
    Entry(
        "Inception Score",
        (Column("inception_score", "IS", 1, larger=True),),
        (FEATURES, LOGITS),
        _inception_score,
        lambda settings, space: space == INCEPTION,
    ),
    Entry(
        "precision and recall",
        (Column("precision", "Precision", larger=True), Column("recall", "Recall", larger=True)),
        (FEATURES, ROWS),
        _precision_recall,
        lambda settings, space: settings.precision_recall,
        suffix=True,
    ),
    Entry(
        "density and coverage",
        (Column("density", "Density", larger=True), Column("coverage", "Coverage", larger=True)),
        (FEATURES, ROWS),
        _density_coverage,
        lambda settings, space: settings.density_coverage,
        suffix=True,
    ),
    Entry(
        "kernel distance",
        (Column("kd", "KD", 5),),
        (FEATURES, ROWS),
        _kernel_distance,
        lambda settings, space: settings.kernel_distance and space != INCEPTION,
        suffix=True,
    ),
    Entry(
        "kernel distance (KID)",
        (Column("kid", "KID", 5),),
        (FEATURES, ROWS),
        _kernel_distance,
        lambda settings, space: settings.kernel_distance and space == INCEPTION,
    ),
    Entry("CMMD", (Column("cmmd", "CMMD"),), (FEATURES, ROWS), _clip_mmd, lambda settings, space: space == "clip"),
    Entry(
        "class accuracy",
        (Column("class_accuracy", "Class accuracy", larger=True),),
        (CLASSIFIER,),
        _class_accuracy,
    ),
    Entry(
        "authenticity",
        (Column("authenticity", "Authenticity", larger=True),),
        (FEATURES, FIRST, ROWS),
        _authenticity,
        lambda settings, space: settings.memorization > 0,
    ),
    Entry(
        "agreement of class tokens",
        (
            Column("token_cosine", "Token cosine", larger=True),
            Column("token_cosine_shuffled", "Token cosine, shuffled"),
            Column("token_retrieval", "Token retrieval", larger=True),
            Column("token_class_agreement", "Token class agreement", larger=True),
        ),
        (TOKENS,),
        _class_tokens,
    ),
)
COLUMNS = {column.key: column for entry in METRICS for column in entry.columns}
