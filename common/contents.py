"""What a folder or an archive holds: its images, and what is not one."""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.images import is_image, unread_format
from config import UserError

LABELS = "dataset.json"  # announces labels, as in EDM's and the published tools
MAX_LABELS = 2**28  # bytes of that file: three times those of ImageNet
CLUTTER = {
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}  # made by systems, not people
SHEETS = {
    "grid.png": "samples.json",
    "memorization.png": "results.json",
    "contact_sheet.png": LABELS,
}  # ours: beside what
HIDDEN, CIRCLES, SPECIAL = "hidden or system entries", "links in a circle", "sockets, pipes or devices"
OURS, OTHERS = "pictures of these programs", "files that are not images"


class Item(NamedTuple):
    """One image; by default a file of its own.

    label: class number; None where a source is listed and gives no numbers itself. file: number of the container in
    Contents.files. offset and size: its bytes there (tables: group and row; -1 where unknown). stored: its compressed size
    in a zip, -1 if it is not compressed. crc: its CRC-32, -1 if unknown.
    """

    name: str
    label: int | None
    file: int = 0
    offset: int = 0
    size: int = -1
    stored: int = -1
    crc: int = -1


@dataclass
class Contents:
    """What a folder or an archive holds.

    kind: folder | zip | tar. root, files: containers (archives), relative to the root; [""] for a folder. items: images, in
    the order of the container. folders: their names. labels: reads a file LABELS by its name. ignored: names of files that
    are not images. left_out: why => names of what is not looked at. unreadable: images of `items` that cannot be read,
    with the reason.
    """

    kind: str
    root: Path
    files: list[str]
    items: list[Item] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    labels: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, item: Item, read: Callable[[], bytes]) -> None:
        """Take a file: an image, or one that is counted. read: gives its content."""
        hidden = is_hidden(item.name)
        if is_image(item.name) and not hidden:
            self.items.append(item)
            if reason := unread_format(item.name):
                self.unreadable.append((item.name, reason))
            return
        self.ignored.append(item.name)
        if hidden:
            self.left_out[HIDDEN].append(item.name)
            return
        folder, _, file = item.name.rpartition("/")
        self.folders.append(folder)
        if file == LABELS:
            self.labels[folder] = read
        else:
            self.left_out[OTHERS].append(item.name)

    def add_folder(self, name: str) -> None:
        """Take a folder, which may be empty."""
        if not is_hidden(name):  # "." too, the first member of many tars
            self.folders.append(name)

    def refusal(self) -> str:
        """The images that cannot be read: their number, the first one, and why; empty if there are none."""
        if not self.unreadable:
            return ""
        name, reason = min(self.unreadable)
        count = len(self.unreadable)
        return f"{count:,} image{'s' * (count > 1)} cannot be read, such as {name}: {reason}"

    def note(self) -> str:
        """What was left out, for people: "hidden or system entries: 3 (ant/.DS_Store, ...)"; empty if nothing was."""
        parts = []
        for why, names in self.left_out.items():
            first = ", ".join([names[0], *(["..."] if len(names) > 1 else [])])
            parts.append(f"{why}: {len(names):,} ({first})")
        return "; ".join(parts)

    def announced(self) -> tuple[str, bytes] | None:
        """The file LABELS of the innermost folder around all images, or of one above that: its name and its content."""
        names = [item.name for item in self.items]
        folder = os.path.commonpath([os.path.dirname(find(names, default="")) for find in (min, max)])
        while folder and folder not in self.labels:
            folder = folder.rpartition("/")[0]
        return (f"{folder}/{LABELS}".removeprefix("/"), self.labels[folder]()) if folder in self.labels else None

    def below(self, folder: str) -> "Contents":
        """What lies in one of its folders, with names relative to that. Raises UserError if there is none."""
        start = folder.removesuffix(".tar") + "/"
        inside = [item._replace(name=item.name[len(start) :]) for item in self.items if item.name.startswith(start)]
        if not inside:
            top = sorted({item.name.split("/")[0] for item in self.items})
            raise UserError(
                f"{self.path / folder}: no images there; {self.path} holds {', '.join(top[:5])}{', ...' if top[5:] else ''}"
            )

        def cut(names: list[str]) -> list[str]:
            return [name[len(start) :] for name in names if name.startswith(start)]

        return Contents(
            self.kind,
            self.root,
            self.files,
            inside,
            cut(self.folders),
            {name[len(start) :]: read for name, read in self.labels.items() if f"{name}/".startswith(start)},
            cut(self.ignored),
            defaultdict(list, {why: kept for why, names in self.left_out.items() if (kept := cut(names))}),
            [(name[len(start) :], why) for name, why in self.unreadable if name.startswith(start)],
        )

    @property
    def path(self) -> Path:
        """The folder, or the archive."""
        return self.root / self.files[0] if len(self.files) == 1 else self.root


def is_hidden(name: str) -> bool:
    """Whether a file or one of the folders around it is hidden, or made by a system."""
    return any(part.startswith(".") or part in CLUTTER for part in name.split("/"))
