"""Append images that a source has gained to a finished dataset: the packed records keep their numbers and their bytes."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.class_names import spelled
from config import UserError
from preprocessing.index import AS_LISTED, Index
from preprocessing.settings import PackConfig
from preprocessing.sources import LATENT_FOLDER, latent_name


def new_images(packed: list[Index], listed_at: list[int], fresh: Index, settings: PackConfig) -> Index:
    """The images of a source that are not packed yet, in the order of their records.

    Known classes keep their labels, new ones follow in the order of the source (by name, or as in --classes).

    Args:
        packed: the parts of the dataset so far.
        listed_at: when each of them was listed (mtime in ns): files modified later are changed.
        fresh: the source, listed again.
        settings: source and classes.

    Raises:
        UserError: if packed images are gone, changed, or of another class now.
    """
    source = settings.images
    packed = [replace(part, classes=[spelled(name) for name in part.classes]) for part in packed]
    classes = _merged(packed[-1].classes, fresh.classes, settings)
    place = {name: i for i, name in enumerate(fresh.names)}
    gone, moved, changed = [], [], []
    for part, then in zip(packed, listed_at, strict=True):
        for i, name in enumerate(part.names):
            now = place.get(name)
            if now is None:
                gone.append(name)
            elif fresh.classes[fresh.labels[now]] != part.classes[part.labels[i]]:
                moved.append(name)
            elif not _same_bytes(fresh, now, part, i) or _modified(part, name, then):
                changed.append(name)
    for names, what in ((gone, "are gone"), (moved, "have another class now"), (changed, "were changed after packing")):
        if names:
            raise UserError(
                f"--source {source}: images that are packed already {what} ({len(names):,}, such as {names[0]}); --extend "
                "only adds images: restore them, or pack into another --out"
            )
    return remaining(fresh, packed, classes)


def remaining(fresh: Index, known: Iterable[Index], classes: list[str]) -> Index:
    """The images of a listing that the parts `known` do not hold, labelled by their place in `classes`.

    Raises KeyError for an image of another class.
    """
    names = {name for part in known for name in part.names}
    number = {name: label for label, name in enumerate(classes)}
    kept = [i for i, name in enumerate(fresh.names) if name not in names]
    labels = dict(enumerate(fresh.labels.tolist()))
    if fresh.classes[: len(classes)] != classes:
        labels = {i: number[fresh.classes[labels[i]]] for i in kept}
    if fresh.kind not in AS_LISTED:
        kept.sort(key=labels.__getitem__)  # by name within a class, as they are listed
    places = fresh.places[kept]
    used, places[:, 0] = np.unique(places[:, 0], return_inverse=True)  # only the files that hold these images
    return Index(
        fresh.kind,
        fresh.root,
        [fresh.files[file] for file in used],
        [fresh.names[i] for i in kept],
        np.array([labels[i] for i in kept], np.int64),
        places,
        classes,
        fresh.ignored,
    )


def joined(parts: list[Index]) -> Index:
    """All parts as one list, in the order of the records; the classes are those of the newest part."""
    if len(parts) == 1:
        return parts[0]
    files: list[str] = []
    places = []
    for part in parts:
        places.append(part.places + np.array([len(files), 0, 0, 0, 0]))
        files += part.files
    newest = parts[-1]
    return Index(
        newest.kind,
        newest.root,
        files,
        [name for part in parts for name in part.names],
        np.concatenate([part.labels for part in parts]),
        np.concatenate(places),
        newest.classes,
        newest.ignored,
    )


def merged_classes(known: list[str], found: list[str]) -> list[str]:
    """Known classes in their order, then the new ones in theirs."""
    present = set(known)
    return [*known, *(name for name in found if name not in present)]


def _merged(known: list[str], found: list[str], settings: PackConfig) -> list[str]:
    if found[: len(known)] == known:
        return found
    if settings.classes is not None or len(set(found)) < len(found):
        where = f"--classes {settings.classes}" if settings.classes else f"--source {settings.source}"
        raise UserError(f"{where}: must begin with the {len(known)} classes that are packed, in their order")
    return merged_classes(known, found)


def _same_bytes(fresh: Index, now: int, part: Index, then: int) -> bool:
    """Whether an image lies where it lay; the size of a file is compared where both lists have it."""
    (file, *place), (file_then, *place_then) = fresh.places[now].tolist(), part.places[then].tolist()
    if -1 in (place[1], place_then[1]):
        place[1] = place_then[1]
    return fresh.files[file] == part.files[file_then] and place == place_then


def _modified(index: Index, name: str, then: int) -> bool:
    """Whether a file of its own was modified later than `then`. (Archives have sizes and checksums in their places.)"""
    if index.kind not in ("folder", "published"):
        return False
    root = Path(index.root)
    paths = [root / index.files[0] / name]
    if index.kind == "published":
        paths.append(root / LATENT_FOLDER / latent_name(name))
    return any(os.stat(path).st_mtime_ns > then for path in paths)
