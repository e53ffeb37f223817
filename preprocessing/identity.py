"""What makes a source the one that was packed: its list of names, sizes and checksums, wherever it lies by now."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.class_names import spelled
from config import UserError
from preprocessing.index import AS_LISTED, Index

SIZE, CRC = 2, 4  # columns of Index.places
ARCHIVES = ("zip", "tar")


def located(parts: list[Index], fresh: Index, source: Path, out: Path) -> list[Index]:
    """The images of the parts of a dataset where a source has them now.

    Args:
        parts: of the dataset, as they were listed.
        fresh: the source, listed again.
        source: what --source names.
        out: the dataset.

    Returns:
        The parts, with the places of `fresh`.

    Raises:
        UserError: the source lacks an image, or has another one, or another class, under its name.
    """
    place = {name: i for i, name in enumerate(fresh.names)}
    return [_located(part, fresh, place, f"--source {source}: is not what {out} was packed from") for part in parts]


def _located(part: Index, fresh: Index, place: dict[str, int], refused: str) -> Index:
    rows = np.array([place.get(name, -1) for name in part.names])
    if (rows < 0).any():
        raise UserError(f"{refused}: it has no {part.names[int(rows.argmin())]}")
    if part.kind in AS_LISTED or fresh.kind in AS_LISTED:
        same = part.kind == fresh.kind and (part.places[:, 1:] == fresh.places[rows, 1:]).all(1)
        same &= np.ones(len(part), bool)
    else:
        was, now = part.places[:, [SIZE, CRC]], fresh.places[rows][:, [SIZE, CRC]]
        same = ((was == now) | (was < 0) | (now < 0)).all(1)  # -1 is not known
    if not same.all():
        raise UserError(f"{refused}: {part.names[int(same.argmin())]} has another size or checksum")
    classes = [spelled(name) for name in part.classes], [spelled(name) for name in fresh.classes]
    for i, (was, now) in enumerate(zip(part.labels.tolist(), fresh.labels[rows].tolist())):
        if classes[0][was] != classes[1][now]:
            raise UserError(f"{refused}: {part.names[i]} is of class {fresh.classes[now]}, not {part.classes[was]}")
    return replace(part, kind=fresh.kind, root=fresh.root, files=fresh.files, places=fresh.places[rows])


def lies_elsewhere(parts: list[Index], packed_from: str, source: Path) -> bool:
    """Whether a source lies elsewhere than when the dataset was begun or last extended, or lay elsewhere before that.

    Args:
        parts: of the dataset, as they were listed.
        packed_from: the source of the newest part, resolved.
        source: what --source names now.
    """
    # The root of one archive is the folder around it. Parts of a folder of archives name only those that they came from.
    one = [part.kind in ARCHIVES and part.root != packed_from for part in parts]
    places = {(part.root, *(part.files if single else ())) for part, single in zip(parts, one)}
    return packed_from != str(source.resolve()) or len(places) > 1


def forms(index: Index, packed_from: str, source: Path) -> Iterator[Index]:
    """A list of images as it may have been written: at the former place of its source, and without the sizes of files."""
    inside = len(source.resolve().parts) - len(Path(index.root).parts)  # an archive, and a folder in it
    former = Path(packed_from)
    root = str(former.parents[inside - 1]) if inside else packed_from
    files = [former.parts[-inside]] if inside and len(index.files) == 1 else index.files
    for moved in (index, replace(index, root=root, files=files)):
        yield moved
        if moved.kind == "folder":
            yield replace(moved, places=moved.places * [1, 1, 0, 1, 1] + [0, 0, -1, 0, 0])
