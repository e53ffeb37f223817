"""The list of images to pack: names, labels and where their bytes lie, in the order of the records."""

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError

AS_LISTED = ("parquet", "arrow", "published")  # kinds whose order is the source's; others are ordered by class and name
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Item(NamedTuple):
    """One image. file: number of the container in Index.files. offset and size: its bytes there (tables: group and row;
    -1 where unknown). stored: its compressed size in a zip, -1 if it is not compressed. crc: its CRC-32, -1 if unknown."""

    name: str
    label: int
    file: int
    offset: int
    size: int
    stored: int
    crc: int


@dataclass
class Index:
    """kind: folder | zip | tar | parquet | arrow | published. root: absolute path of the source. files: containers, relative
    to root. places: (N, 5) int64, Item's file to crc. ignored: entries that are no images."""

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
        """Read what `to_bytes` gave. Raises ValueError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                head = json.loads(data["head"].tobytes())
                names = data["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                return cls(names=names, labels=data["labels"], places=data["places"], **head)
        except Exception as error:  # a flipped bit makes zip, numpy and json fail in ways of their own
            raise UserError(f"{path} is damaged ({error})") from error


WHOLE_FILE = (0, 0, -1, -1, -1)  # the place of an image that is a file of its own


class Entry(NamedTuple):
    """An image as a source lists it, before classes are known. label: number given by the source itself, or None."""

    name: str
    label: int | None
    place: tuple[int, int, int, int, int]


def build(
    kind: str,
    root: Path,
    files: Sequence[str],
    entries: list[Entry],
    names: Sequence[str] | None,
    choice: "Choice",
    ignored: Sequence[str] = (),
) -> Index:
    """Give every entry its class and put the list in order: by class, then by name (tables: as they are).

    names: of the labels the source gives itself; otherwise the folder above an image is its class. Raises UserError.
    """
    if not entries:
        raise UserError(f"--source {root}: no images found{f', only files like {ignored[0]}' if ignored else ''}")
    if entries[0].label is not None:
        width = max(entry.label for entry in entries) + 1
        found = list(names) if names else [str(number) for number in range(width)]
        if width > len(found) or min(entry.label for entry in entries) < 0:
            raise UserError(
                f"--source {root}: label {width - 1} has no name among the {len(found)} classes of the source"
            )
        folders = [found[entry.label] for entry in entries]
    else:
        folders = _class_folders(root, [entry.name for entry in entries], choice.allow_one_class)
        found = sorted(set(folders))
        if set(found) <= SPLITS and len(found) > 1:
            raise UserError(f"--source {root}: holds splits, not classes; give one of them, such as {root}/{found[0]}")
    classes, display = choice.select(root, found)
    number = {name: label for label, name in enumerate(classes)}
    kept = [i for i, folder in enumerate(folders) if folder in number]
    labels = [number[folders[i]] for i in kept]
    empty = [name for name in classes if name not in {folders[i] for i in kept}]
    if empty and (choice.file is not None or entries[0].label is None):
        raise UserError(f"--source {root}: class {empty[0]!r} has no images")
    if len(set(labels)) == 1 and not choice.allow_one_class:
        raise UserError(
            f"--source {root}: all images are of one class, {folders[kept[0]]!r}; expected a folder for each class "
            "(--allow-one-class packs it all the same)"
        )
    order = range(len(kept))
    if kind not in AS_LISTED:
        order = sorted(order, key=lambda i: (labels[i], entries[kept[i]].name))
        twice = [a for a, b in itertools.pairwise(order) if entries[kept[a]].name == entries[kept[b]].name]
        if twice:
            raise UserError(f"--source {root}: {entries[kept[twice[0]]].name} is there twice")
    return Index(
        kind,
        str(root.resolve()),
        list(files),
        [entries[kept[i]].name for i in order],
        np.array([labels[i] for i in order], np.int64),
        np.array([entries[kept[i]].place for i in order], np.int64),
        display,
        list(ignored)[:20],
    )


@dataclass(frozen=True)
class Choice:
    """file: `--classes`, one class a line, in the order of the labels: the folder's name, and a name to show after a tab
    or, if the line is no folder's name, after the first space (as in LOC_synset_mapping.txt)."""

    file: Path | None = None
    allow_one_class: bool = False

    def select(self, root: Path, found: Sequence[str]) -> tuple[list[str], list[str]]:
        """Classes found => (classes in the order of the labels, their names to show)."""
        if self.file is None:
            return list(found), list(found)
        if not self.file.is_file():
            raise UserError(f"--classes {self.file}: no such file")
        known, folders, display = set(found), [], []
        for line in self.file.read_text().splitlines():
            if not line.strip():
                continue
            folder, _, shown = line.strip().partition("\t")
            if folder not in known:
                folder, _, shown = line.strip().partition(" ")
            if folder not in known:
                raise UserError(f"--classes {self.file}: {line.strip()!r} is no class of {root}")
            if folder in folders:
                raise UserError(f"--classes {self.file}: {folder!r} is there twice")
            folders.append(folder)
            display.append(shown.strip() or folder)
        if not folders:
            raise UserError(f"--classes {self.file}: names no class")
        return folders, display


def _class_folders(root: Path, names: list[str], allow_one_class: bool) -> list[str]:
    """The class of an image is the first folder of its path; folders that wrap all of the classes are passed over."""
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
