"""The list of images to pack: names, labels and where their bytes lie, in the order of the records."""

import io
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError

AS_LISTED = ("parquet", "arrow", "published")  # kinds whose order is the source's; others are ordered by class and name
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Item(NamedTuple):
    """One image; by default a file of its own.

    label: class number; None where a source is listed and gives no numbers itself. file: number of the container in
    Index.files. offset and size: its bytes there (tables: group and row; -1 where unknown). stored: its compressed size in a
    zip, -1 if it is not compressed. crc: its CRC-32, -1 if unknown.
    """

    name: str
    label: int | None
    file: int = 0
    offset: int = 0
    size: int = -1
    stored: int = -1
    crc: int = -1


@dataclass
class Index:
    """The images of a source, in the order of the records.

    kind: folder | zip | tar | parquet | arrow | published. root: absolute path of the source. files: containers, relative to
    root. places: (N, 5) int64, Item's file to crc. ignored: entries that are not images.
    """

    kind: str
    root: str
    files: list[str]
    names: list[str]
    labels: np.ndarray
    places: np.ndarray
    classes: list[str]
    ignored: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int, stop: int) -> list[Item]:
        """Items [start, stop) in the order of the records."""
        places, labels = self.places[start:stop].tolist(), self.labels[start:stop].tolist()
        return [Item(name, label, *place) for name, label, place in zip(self.names[start:stop], labels, places)]

    def to_bytes(self) -> bytes:
        """The same bytes for the same list: its SHA-256 is its identity."""
        content = asdict(self)
        arrays = {name: content.pop(name) for name in ("labels", "places")}
        names = content.pop("names")
        stream = io.BytesIO()
        np.savez(
            stream,
            head=np.frombuffer(json.dumps(content, sort_keys=True).encode(), np.uint8),
            names=np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),
            **arrays,
        )
        return stream.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> "Index":
        """Read what `to_bytes` gave. Raises UserError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                head = json.loads(data["head"].tobytes())
                names = data["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                return cls(names=names, labels=data["labels"], places=data["places"], **head)
        except Exception as error:  # a flipped bit makes zip, numpy and json fail in ways of their own
            raise UserError(f"{path} is damaged ({error})") from error


class Listing(NamedTuple):
    """What a source holds, before classes are chosen.

    kind, root, files, ignored: as in Index. items: all images. names: of the classes, where the source gives labels itself.
    """

    kind: str
    root: Path
    files: list[str]
    items: list[Item]
    names: list[str] | None = None
    ignored: list[str] = []  # noqa: RUF012


def build(listing: Listing, classes: Path | None, allow_one_class: bool) -> Index:
    """Give every image its class and put the list in order: by class, then by name (tables: as they are).

    Args:
        listing: of a source. Without labels of its own, the folder above an image is its class.
        classes: the file of --classes; None: all classes.
        allow_one_class: accept images that are all of one class.

    Raises:
        UserError: the images cannot be given classes.
    """
    kind, root, files, items, names, ignored = listing
    if not items:
        raise UserError(f"--source {root}: no images found{f', only files like {ignored[0]}' if ignored else ''}")
    numbers = [item.label for item in items if item.label is not None]  # of all images, or of none
    own = bool(numbers)
    if own:
        width = max(numbers) + 1
        found = names or [str(number) for number in range(width)]
        if width > len(found) or min(numbers) < 0:
            raise UserError(
                f"--source {root}: label {width - 1} has no name among the {len(found)} classes of the source"
            )
    else:
        folders = _class_folders(root, [item.name for item in items], allow_one_class)
        found = sorted(set(folders))
        if set(found) <= SPLITS and len(found) > 1:
            raise UserError(f"--source {root}: holds splits, not classes; give one of them, such as {root}/{found[0]}")
        place = {name: number for number, name in enumerate(found)}
        numbers = [place[folder] for folder in folders]
    chosen = _choose(classes, root, found) if classes else dict(enumerate(found))
    label_of = {number: label for label, number in enumerate(chosen)}
    kept = [(label_of[number], item) for number, item in zip(numbers, items) if number in label_of]
    empty = chosen.keys() - set(numbers)
    if empty and (classes is not None or not own):
        raise UserError(f"--source {root}: class {found[min(empty, key=label_of.__getitem__)]!r} has no images")
    if len({label for label, _ in kept}) == 1 and not allow_one_class:
        raise UserError(
            f"--source {root}: all images are of one class, {found[list(chosen)[kept[0][0]]]!r}; expected a folder for each "
            "class (--allow-one-class packs it all the same)"
        )
    if kind not in AS_LISTED:
        kept.sort(key=lambda pair: (pair[0], pair[1].name))
        for (_, a), (_, b) in itertools.pairwise(kept):
            if a.name == b.name:
                raise UserError(f"--source {root}: {a.name} is there twice")
    return Index(
        kind,
        str(root.resolve()),
        files,
        [item.name for _, item in kept],
        np.array([label for label, _ in kept], np.int64),
        np.array([item[2:] for _, item in kept], np.int64),
        list(chosen.values()),
        ignored[:20],
    )


def _choose(file: Path, root: Path, found: list[str]) -> dict[int, str]:
    """The classes of --classes, in the order of their labels: number among those found => name to show.

    A line holds the name of a class, and a name to show after a tab or, if the line is not a class's name, after the first
    space (as in LOC_synset_mapping.txt).
    """
    if not file.is_file():
        raise UserError(f"--classes {file}: no such file")
    number_of = {name: number for number, name in enumerate(found)}
    chosen: dict[int, str] = {}
    for line in filter(None, map(str.strip, file.read_text().splitlines())):
        name, _, shown = line.partition("\t")
        if name not in number_of:
            name, _, shown = line.partition(" ")
        if name not in number_of:
            raise UserError(f"--classes {file}: {line!r} is not a class of {root}")
        if found.count(name) > 1:
            raise UserError(f"--classes {file}: {root} has several classes named {name!r}; leave --classes out")
        if number_of[name] in chosen:
            raise UserError(f"--classes {file}: {name!r} is there twice")
        chosen[number_of[name]] = shown.strip() or name
    if not chosen:
        raise UserError(f"--classes {file}: names no class")
    return chosen


def _class_folders(root: Path, names: list[str], allow_one_class: bool) -> list[str]:
    """The class of an image is the first folder of its path; folders that wrap all of the classes are skipped."""
    parts = [name.split("/") for name in names]
    depth = 0
    while min(len(p) for p in parts) > depth + 2 and len({p[depth] for p in parts}) == 1:
        depth += 1
    loose = [name for name, p in zip(names, parts) if len(p) == depth + 1]
    if loose and len(loose) == len(names) and allow_one_class:
        return ["all"] * len(names)
    if loose:
        raise UserError(
            f"--source {root}: {min(loose)} lies in no class folder; expected CLASS/IMAGE (--allow-one-class takes a folder "
            "of images as one class)"
        )
    return [p[depth] for p in parts]
