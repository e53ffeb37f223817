"""Labels: what --labels and --classes mean, and the label of sample i as a function of (seed, i) alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.arrays import members, read_npy
from common.class_names import class_number
from common.files import ReadError, parse_json, read_text
from common.presets import spread_labels
from config import MissingFile, UserError
from models import philox
from models.noise import Stream

_FEW = 20  # class names that fit into an error


@dataclass(frozen=True)
class Labels:
    """The label of sample i, a function of i (and the seed) alone.

    kind: random, balanced (classes in turn, so that they interleave in the file), spread, list, null, or token (the class
    nearest to the given class token). values: the classes to draw from, or to take in turn.
    """

    kind: str
    values: np.ndarray  # (K,) int64

    def at(self, seed: int, index: Tensor) -> Tensor:
        """index: (N,) int64 sample numbers => (N,) int64 labels on the CPU."""
        index = index.cpu()
        count = len(self.values)
        if self.kind == "random":
            chosen = (philox.uniform(seed, Stream.SAMPLE_LABEL, 0, index, 1)[:, 0] * count).long()
        else:
            chosen = index % count
        return torch.from_numpy(self.values)[chosen]


def read_labels(
    source: Sequence[str], classes: Sequence[str], num_classes: int, names: Sequence[str], count: int
) -> Labels:
    """The labels that --labels and --classes mean.

    Args:
        source: of --labels: one of random, balanced, spread, null; numbers or names; or a file of numbers (.npy, .npz with
            arr_1, .json, or text). A list is used in turn.
        classes: of --classes: those to draw from, numbers or names; given alone they are balanced.
        num_classes: of the model.
        names: of its classes, or empty.
        count: samples in all, on which `spread` depends.

    Raises:
        UserError: names the word that is not a class, or the file that cannot be used.
    """
    chosen = [class_label(word, num_classes, names, "--classes") for word in classes]
    everything = np.array(chosen or range(num_classes), dtype=np.int64)
    if not source:
        return Labels("balanced" if chosen else "random", everything)
    if tuple(source) in (("random",), ("balanced",)):
        return Labels(source[0], everything)
    if tuple(source) == ("spread",):
        return Labels("spread", everything[spread_labels(len(everything), min(count, len(everything)))])
    if chosen:
        raise UserError("--classes goes with --labels random, balanced or spread, not with a list of labels")
    if tuple(source) == ("null",):
        return Labels("null", np.array([num_classes], dtype=np.int64))
    if (
        len(source) == 1
        and class_number(source[0], names, num_classes, "--labels") is None
        and not source[0].isdecimal()
    ):
        return Labels("list", _read_label_file(Path(source[0]).expanduser(), num_classes, names))
    numbers = [class_label(word, num_classes, names, "--labels") for word in source]
    return Labels("list", np.array(numbers, dtype=np.int64))


def class_label(word: str, num_classes: int, names: Sequence[str], flag: str) -> int:
    """A name of a class, or a number (see `common.class_names.class_number`)."""
    number = class_number(word, names, num_classes, flag)
    if number is None and word.isdecimal():
        raise UserError(f"{flag} {word}: the model has classes 0 to {num_classes - 1}")
    if number is None:
        raise UserError(
            f"{flag} {word}: neither a class number below {num_classes} nor one of the model's class names"
            + _known_names(word, names)
        )
    return number


def _known_names(word: str, names: Sequence[str]) -> str:
    """The end of a sentence about a word that is not a class: all names if they are few, else those spelled alike."""
    if not names:
        return "; this model has no class names, give numbers"
    if len(names) <= _FEW:
        return f": {', '.join(names)}"

    def likeness(name: str) -> float:
        words = (name, *name.replace("_", " ").replace(",", " ").split())
        return max(SequenceMatcher(None, word.lower(), part.lower()).ratio() for part in words)

    scores = {name: likeness(name) for name in names}
    close = [name for name in sorted(names, key=lambda name: -scores[name]) if scores[name] >= 0.6][:5]
    return f"; the closest of its {len(names)} names: {'; '.join(close)}" if close else ""


def _read_label_file(path: Path, num_classes: int, names: Sequence[str]) -> np.ndarray:
    if not path.is_file():
        raise MissingFile(
            f"--labels {path}: neither random, balanced, spread, null, a class number, an existing file, nor one of "
            f"the model's class names{_known_names(str(path), names)}"
        )
    try:
        if path.suffix == ".npz":
            labels = members(path)["arr_1"].all()
        elif path.suffix == ".npy":
            labels = read_npy(path)
        else:
            text = read_text(path)
            labels = np.array(parse_json(text, str(path)) if path.suffix == ".json" else [int(w) for w in text.split()])
    except ReadError as error:
        raise UserError(f"--labels {error}") from error
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"--labels {path}: not a list of class numbers ({error})") from error
    if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"--labels {path}: holds {labels.dtype} {labels.shape}, not a list of class numbers")
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise UserError(f"--labels {path}: label {bad[0]}, but the model has classes 0 to {num_classes - 1}")
    return labels.astype(np.int64)
