"""The list of images to pack: names, labels and where their bytes lie, in the order of the records."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.arrays import read_npz
from common.class_names import by_spelling, spelled, split_kinds
from common.contents import Item, is_hidden
from common.files import ReadError, parse_json, read_text
from config import MissingFile, UserError
from packed.format import REPAIR

AS_LISTED = ("parquet", "arrow", "published")  # kinds whose order is the source's; others are ordered by class and name
MOST_CLASSES = 10**6  # numbers beyond this are not those of classes


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
        """Read what `to_bytes` gave. Raises UserError if it is missing or damaged."""
        try:
            data = read_npz(path)
            head = parse_json(data["head"].tobytes(), str(path))
            names = data["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            index = cls(names=names, labels=data["labels"], places=data["places"], **head)
        except MissingFile as error:
            raise MissingFile(f"{path} is missing; {REPAIR}") from error
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {REPAIR}") from error
        labels, places, count = index.labels, index.places, len(names)
        if (labels.shape, places.shape, labels.dtype, places.dtype) != ((count,), (count, 5), np.int64, np.int64) or (
            not 0 <= labels.min() <= labels.max() < len(index.classes)
            or not 0 <= places[:, 0].min() <= places[:, 0].max() < len(index.files)
        ):
            raise UserError(
                f"{path} is damaged (a label or a place for each of {count} images does not exist); {REPAIR}"
            )
        return index


class Listing(NamedTuple):
    """What a source holds, before classes are chosen.

    kind, root, files, ignored: as in Index. items: all images. names: of the classes, where the source gives labels itself.
    path: the source, as people name it. folders: of the source, also those without images. unlabelled: the file that says
    that the images have no labels, if there is one.
    """

    kind: str
    root: Path
    files: list[str]
    items: list[Item]
    names: list[str] | None = None
    ignored: list[str] = []  # noqa: RUF012
    path: Path | None = None
    folders: Sequence[str] = ()
    unlabelled: str = ""


def build(listing: Listing, classes: Path | None, allow_one_class: bool) -> Index:
    """Give every image its class and put the list in order: by class, then by name (tables: as they are).

    Args:
        listing: of a source. Without labels of its own, the folder above an image is its class.
        classes: the file of --classes; None: all classes.
        allow_one_class: accept images that are all of one class.

    Raises:
        UserError: the images cannot be given classes.
    """
    kind, items, ignored = listing.kind, listing.items, listing.ignored
    source = listing.path or listing.root
    if not items:
        raise UserError(f"--source {source}: no images found{f', only files like {ignored[0]}' if ignored else ''}")
    own = items[0].label is not None  # all images have labels, or none
    if own:
        numbers = [item.label for item in items if item.label is not None]
        found = _numbered(source, numbers, items, listing.names)
        chosen = _choose(classes, source, found) if classes else dict(enumerate(found))
    else:
        folders, depth = _class_folders(listing, source, allow_one_class)
        raw = by_spelling(folders, f"--source {source}")
        found = list(raw)
        place = {name: number for number, name in enumerate(raw.values())}
        numbers = [place[folder] for folder in folders]
        split = _split_folder(source, [item.name.split("/") for item in items], depth)
        try:
            chosen = _choose(classes, source, found) if classes else dict(enumerate(found))
        except UserError as error:
            raise (UserError(split) if split else error) from error
        if classes is None and split:
            raise UserError(split)
        if classes is None:
            _refuse_empty_folders(listing, source, folders, depth)
    label_of = {number: label for label, number in enumerate(chosen)}
    kept = [(label_of[number], item) for number, item in zip(numbers, items) if number in label_of]
    empty = chosen.keys() - set(numbers)
    if empty and (classes is not None or not own):
        raise UserError(f"--source {source}: class {found[min(empty, key=label_of.__getitem__)]!r} has no images")
    if len({label for label, _ in kept}) == 1 and not allow_one_class:
        raise UserError(
            f"--source {source}: all images are of one class, {found[list(chosen)[kept[0][0]]]!r}; expected a folder for "
            "each class (--allow-one-class packs it all the same)"
        )
    if kind not in AS_LISTED:
        kept.sort(key=lambda pair: (pair[0], pair[1].name))
    return Index(
        kind,
        str(listing.root.resolve()),
        listing.files,
        [item.name for _, item in kept],
        np.array([label for label, _ in kept], np.int64),
        np.array([item[2:] for _, item in kept], np.int64),
        list(chosen.values()),
        ignored[:20],
    )


def _numbered(source: Path, numbers: list[int], items: list[Item], names: list[str] | None) -> list[str]:
    """The names of all classes of a source that gives numbers. Raises UserError for a number that is not a class's."""
    limit = len(names) if names else MOST_CLASSES
    for number, item in zip(numbers, items):
        if not 0 <= number < limit:
            known = f"the source names {limit} classes" if names else f"labels are numbers from 0 to below {limit:,}"
            raise UserError(f"--source {source}: {item.name} has label {number}, but {known}")
    return names or [str(number) for number in range(max(numbers) + 1)]


def class_list(file: Path) -> str:
    """The text of the file of --classes. Raises UserError if it cannot be had."""
    if not file.is_file():
        raise UserError(f"--classes {file}: {'is not a file' if file.exists() else 'no such file'}")
    try:
        return read_text(file)
    except ReadError as error:
        raise UserError(f"--classes {error}") from error


def _choose(file: Path, source: Path, found: list[str]) -> dict[int, str]:
    """The classes of --classes, in the order of their labels: number among those found => name to show.

    A line holds the name of a class, and a name to show after a tab or, if the line is not a class's name, after the first
    space (as in LOC_synset_mapping.txt).
    """
    number_of = {spelled(name): number for number, name in enumerate(found)}
    count = Counter(map(spelled, found))
    chosen: dict[int, str] = {}
    for line in filter(None, map(str.strip, spelled(class_list(file)).splitlines())):
        name, _, shown = line.partition("\t")
        if name not in number_of:
            name, _, shown = line.partition(" ")
        if name not in number_of:
            raise UserError(f"--classes {file}: {line!r} is not a class of {source}")
        if count[name] > 1:
            raise UserError(f"--classes {file}: {source} has several classes named {name!r}; leave --classes out")
        if number_of[name] in chosen:
            raise UserError(f"--classes {file}: {name!r} is there twice")
        chosen[number_of[name]] = shown.strip() or name
    if not chosen:
        raise UserError(f"--classes {file}: names no class")
    return chosen


def _class_folders(listing: Listing, source: Path, allow_one_class: bool) -> tuple[list[str], int]:
    """The class of each image, and how many folders wrap the classes: the first folder of its path that is not a wrapper."""
    if listing.unlabelled and not allow_one_class:
        raise UserError(
            f"{listing.unlabelled}: says that these images have no labels (--allow-one-class packs them as one class)"
        )
    names = [item.name for item in listing.items]
    if listing.unlabelled:
        return ["all"] * len(names), -1
    parts = [name.split("/") for name in names]
    depth = 0
    while min(len(p) for p in parts) > depth + 2 and len({p[depth] for p in parts}) == 1:
        depth += 1
    loose = [name for name, p in zip(names, parts) if len(p) == depth + 1]
    if loose and len(loose) == len(names) and allow_one_class:
        return ["all"] * len(names), -1
    if loose:
        raise UserError(
            f"--source {source}: {min(loose)} is not in a class folder; expected CLASS/IMAGE (--allow-one-class takes a "
            "folder of images as one class)"
        )
    return [p[depth] for p in parts], depth


def _split_folder(source: Path, parts: list[list[str]], depth: int) -> str:
    """A sentence if the folders around the images are splits (train, test, ...) and not classes; "" if they are classes."""
    if depth < 0:
        return ""
    below: defaultdict[str, set[str]] = defaultdict(set)
    for p in parts:
        below[p[depth]].add(p[depth + 1] if len(p) > depth + 2 else "")
    kinds = split_kinds(below)
    largest = max(below.values(), key=len)
    if len(kinds) > 1:
        first = min(kinds, key=lambda name: (kinds[name] != "train", name))
        what = "holds splits, not classes"
    elif len(below) > 1 and all(len(names) > 1 and names <= largest for names in below.values()) and "" not in largest:
        images = Counter(p[depth] for p in parts)
        first = max(below, key=lambda name: (kinds.get(name) == "train", images[name]))
        what = f"its folders {', '.join(sorted(below)[:3])} all hold the same folders, as splits do and classes do not"
    else:
        return ""
    where = "/".join([*parts[0][:depth], first])
    return (
        f"--source {source}: {what}; give one of them, such as {source / where} (if they are classes, name them in a file "
        "for --classes)"
    )


def _refuse_empty_folders(listing: Listing, source: Path, folders: list[str], depth: int) -> None:
    """Raise UserError if a folder or archive beside the class folders has no images: that class would vanish."""
    if depth < 0:
        return
    around, known = listing.items[0].name.split("/")[:depth], set(folders)
    tars = {name[:-4]: name for name in listing.ignored if name.lower().endswith(".tar") and not is_hidden(name)}
    for name in sorted({*listing.folders, *tars}):
        parts = name.split("/")
        if name and len(parts) > depth and parts[:depth] == around and parts[depth] not in known:
            what = (
                f"{tars[name]} is not unpacked" if name in tars else f"{'/'.join(parts[: depth + 1])} holds no images"
            )
            raise UserError(
                f"--source {source}: {what}, but lies beside the class folders; remove it, or name the classes to take in a "
                "file for --classes"
            )
