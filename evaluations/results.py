"""What a run of evaluate.py leaves: numbers with their protocol, warnings, one row of Markdown."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import MissingFile, UserError

SCHEMA = 1
PAPER_IMAGES = 50_000  # FID and IS depend on the number of images; papers use this one

# key: (column title, digits); larger is better for those in LARGER, smaller for the rest
TITLES = {
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "fd": ("FD", 2),
    "inception_score": ("IS", 1),
    "precision": ("Precision", 3),
    "recall": ("Recall", 3),
    "density": ("Density", 3),
    "coverage": ("Coverage", 3),
    "kd": ("KD", 5),
    "kid": ("KID", 5),
    "cmmd": ("CMMD", 3),
    "class_accuracy": ("Class accuracy", 3),
    "authenticity": ("Authenticity", 3),
    "token_cosine": ("Token cosine", 3),
    "token_cosine_shuffled": ("Token cosine, shuffled", 3),
    "token_retrieval": ("Token retrieval", 3),
    "token_class_agreement": ("Token class agreement", 3),
}
LARGER = frozenset(
    {
        "inception_score",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_accuracy",
        "authenticity",
        "token_cosine",
        "token_retrieval",
        "token_class_agreement",
    }
)


@dataclass(frozen=True)
class Metric:
    """One number. `error`: its standard error, or None. `space`: the features it was measured in."""

    value: float
    error: float | None = None
    space: str = ""
    n_samples: int = 0
    n_reference: int = 0


@dataclass
class Results:
    """metrics: by key, `fid` or `fd_SPACE`. protocol: everything that decides whether two rows may be compared."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    name: str = ""

    def save(self, path: Path) -> None:
        """Write JSON (values and errors flat, by key), and the Markdown row beside it with the suffix .md."""
        content = {
            "schema": SCHEMA,
            "name": self.name,
            "metrics": {key: metric.value for key, metric in self.metrics.items()},
            "errors": {key: metric.error for key, metric in self.metrics.items()},
            "measured": {
                key: {"space": metric.space, "n_samples": metric.n_samples, "n_reference": metric.n_reference}
                for key, metric in self.metrics.items()
            },
            "protocol": self.protocol,
            "warnings": self.warnings,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((path, json.dumps(content, indent=2) + "\n"), (path.with_suffix(".md"), markdown([self]))):
            temporary = file.with_name(file.name + ".tmp")
            temporary.write_text(text)
            temporary.replace(file)


def check_writable(path: Path) -> None:
    """Make the folder of a results file before the work begins. Raises ValueError if the file could not be written."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file, such as {path / 'results.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}); give another --out") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"results cannot be written to {path.parent} (it is read-only); give another --out")


def load(path: Path) -> Results:
    """Read results.json. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist")
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
        if schema != SCHEMA:
            raise UserError(f"{path} has schema {schema}, this program reads {SCHEMA}")
        errors, measured = content["errors"], content["measured"]
        metrics = {key: Metric(value, errors[key], **measured[key]) for key, value in content["metrics"].items()}
        return Results(metrics, content["protocol"], content["warnings"], content["name"])
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by evaluations/evaluate.py ({error})") from error


def title(key: str) -> str:
    """Column title of a metric, e.g. "FD dinov2"."""
    stem = _stem(key)
    space = key[len(stem) + 1 :]
    return f"{TITLES[stem][0]} {space}".strip() if stem in TITLES else key


def format_value(key: str, metric: Metric | None) -> str:
    """Value with the metric's digits and, where known, its standard error."""
    if metric is None:
        return "-"
    digits = TITLES.get(_stem(key), ("", 4))[1]
    text = f"{metric.value:.{digits}f}"
    return text if metric.error is None else f"{text} ± {metric.error:.{digits}f}"


def larger_is_better(key: str) -> bool:
    return _stem(key) in LARGER


def _stem(key: str) -> str:
    return max((stem for stem in TITLES if key == stem or key.startswith(stem + "_")), key=len, default=key)


def columns(results: list[Results]) -> list[str]:
    """Keys of all metrics in any result, in the order of TITLES."""
    keys = dict.fromkeys(key for result in results for key in result.metrics)
    order = list(TITLES)
    return sorted(keys, key=lambda key: order.index(_stem(key)) if _stem(key) in order else len(order))


def markdown(results: list[Results]) -> str:
    """One table, one row for each result, with the settings that define it."""
    keys = columns(results)
    head = ["Samples", "n", "Sampler", "Guidance", *map(title, keys)]
    lines = [" | ".join(head), "|".join(["-"] * len(head))]
    for result in results:
        cells = [result.name, str(result.protocol.get("n_samples", "-")), *sampler_cells(result.protocol)]
        cells += [format_value(key, result.metrics.get(key)) for key in keys]
        lines.append(" | ".join(cell.replace("|", "/") for cell in cells))
    return "\n".join(lines) + "\n"


def sampler_cells(protocol: Mapping[str, Any]) -> tuple[str, str]:
    """("sde euler 250", "2.3 / 2.3 in [0, 0.85]") from the sidecar's settings; "-" where it does not say."""
    sampling = protocol.get("sampling", {})
    sampler = (
        " ".join(str(sampling[key]) for key in ("mode", "solver", "steps") if sampling.get(key) is not None) or "-"
    )
    scale = sampling.get("cfg_scale")
    if scale is None:
        return sampler, "-"
    if scale == 1 and sampling.get("cls_cfg_scale", 1) in (0, 1, None):
        return sampler, "none"
    guidance = f"{scale:g}" if isinstance(scale, int | float) else str(scale)
    if sampling.get("cls_cfg_scale") is not None:
        guidance += f" / {sampling['cls_cfg_scale']}"
    if sampling.get("guidance_low") is not None and sampling.get("guidance_high") is not None:
        guidance += f" in [{sampling['guidance_low']}, {sampling['guidance_high']}]"
    return sampler, guidance


def sorted_share(classes: np.ndarray) -> float:
    """How far equal classes stand together in file order: 0 for a random order, 1 for a sorted one.

    (share of neighbours with equal class - share expected by chance) / (1 - that).
    """
    if len(classes) < 2:
        return 0.0
    _, counts = np.unique(classes, return_counts=True)
    if len(counts) < 2:
        return 0.0
    n = len(classes)
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    largest = (n - len(counts)) / (n - 1)  # what a sorted file reaches
    equal = float((classes[1:] == classes[:-1]).mean())
    return (equal - chance) / (largest - chance) if largest > chance else 0.0


def sample_warnings(
    n: int, classes: np.ndarray | None, audit: Any | None, n_reference: int | None, split: int
) -> list[str]:
    """What makes the numbers of these samples differ from a paper's, one sentence each.

    classes: labels, or predicted classes. audit: collect.Audit of the samples. n_reference: images whose Inception
    statistics are the reference; None without.
    """
    warnings = []
    if n < PAPER_IMAGES:
        warnings.append(f"{n} samples: FID falls with the number of images, papers use {PAPER_IMAGES}")
    if n_reference is not None and 0 < n_reference < 2048:
        warnings.append(f"the reference has {n_reference} images, fewer than Inception's 2048 dimensions")
    if classes is not None and sorted_share(classes) > 0.5:
        consequence = f"IS uses chunks of {split} in file order and comes out wrong" if n > split else "shuffle them"
        warnings.append(f"the samples are sorted by class: {consequence}")
    if audit is not None:
        if audit.constant:
            warnings.append(f"{audit.constant} of {n} samples are a single colour")
        if audit.duplicates:
            warnings.append(f"{audit.duplicates} of {n} samples are copies of others")
        if audit.highest <= 1:
            warnings.append(f"pixels span {audit.lowest} to {audit.highest}: values in [0, 1] cast to uint8?")
        elif audit.highest - audit.lowest < 128:
            warnings.append(f"pixels span {audit.lowest} to {audit.highest} of 0 to 255")
    return warnings
