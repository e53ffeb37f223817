"""The images of a folder, zip or tar: one listing for packing, evaluation and --like. What it leaves out is counted.

A folder that holds nothing but archives is read as one class for each. Nothing is ever extracted: an item says where its
bytes lie (`common.members` reads them).
"""

import os
import re
import stat
from collections import defaultdict
from functools import partial
from pathlib import Path

from common.archives import list_archive
from common.class_names import split_kinds
from common.contents import CIRCLES, HIDDEN, MAX_LABELS, OURS, SHEETS, SPECIAL, Contents, Item, is_hidden
from common.files import read_bounded
from common.images import is_image
from config import MissingFile, UserError


def list_contents(path: Path) -> Contents:
    """Find all images of a folder, zip, tar, folder of archives, or of a folder inside an archive (`images.zip/train`).

    Raises:
        UserError: names what cannot be read, or what must not be skipped.
    """
    place = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    inside = "/".join(path.parts[len(place.parts) :])
    if not place.exists() or (inside and place.is_dir()):
        raise MissingFile(f"{path}: no such file or folder")
    try:
        contents = _list_folder(place) if place.is_dir() else list_archive(place.parent, [place.name])
    except PermissionError as error:
        raise UserError(f"{path}: {error.filename or place} cannot be read ({error.strerror})") from error
    return contents.below(inside) if inside else contents


# ----------------------------------------------------------------------------------------------------------- folders


def _list_folder(root: Path) -> Contents:
    """Links are followed, but never in a circle. A link whose target is missing may have been a class: it is an error."""
    found = Contents("folder", root, [""])
    dead: list[str] = []
    top = os.path.realpath(root)
    stack = [("", top, frozenset((top,)))]  # folders: name, real path, real paths of itself and of those above it
    while stack:
        below, real_folder, above = stack.pop()
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                mode = _mode(entry)
                if stat.S_ISDIR(mode):
                    real = os.path.realpath(entry.path) if entry.is_symlink() else f"{real_folder}/{entry.name}"
                    if is_hidden(entry.name):
                        found.left_out[HIDDEN].append(name)
                    elif real in above:
                        found.left_out[CIRCLES].append(name)
                    else:
                        found.folders.append(name)
                        stack.append((name, real, above | {real}))
                elif mode and not stat.S_ISREG(mode):
                    found.left_out[SPECIAL].append(name)
                elif entry.name in SHEETS and (root / below / SHEETS[entry.name]).is_file():
                    found.left_out[OURS].append(name)
                elif mode or is_image(name):
                    size = entry.stat().st_size if mode else -1
                    found.add(Item(name, None, 0, 0, size), partial(_read_labels, entry.path))
                    if not mode:
                        found.unreadable.append((name, f"a link to {_target(entry)}, which does not exist"))
                elif is_hidden(entry.name):
                    found.left_out[HIDDEN].append(name)
                else:
                    dead.append(f"{name} to {_target(entry)}")
    if dead:
        raise UserError(
            f"{root}: {len(dead):,} link{'s lead' if dead[1:] else ' leads'} nowhere, such as {min(dead)}; restore what it "
            "pointed to, or remove it"
        )
    archives = sorted(name for name in found.ignored if _is_archive(name) and not is_hidden(name))
    return found if found.items or not archives else _list_archives_of(found, archives)


def _read_labels(path: str) -> bytes:
    with open(path, "rb") as stream:
        return read_bounded(stream, MAX_LABELS, path)


def _mode(entry: os.DirEntry) -> int:
    """Type and permissions of what an entry of a folder is or points to; 0 if that does not exist."""
    try:
        return entry.stat().st_mode
    except PermissionError:
        raise
    except OSError:  # the link is dead, points to itself or through a file, or the entry is gone by now
        return 0


def _target(entry: os.DirEntry) -> str:
    return os.readlink(entry.path) if entry.is_symlink() else "a file"


def _list_archives_of(folder: Contents, archives: list[str]) -> Contents:
    """A folder without images: each of its archives is a class, as in a folder of the 1,000 tars of ImageNet."""
    suffixes = {name.rpartition(".")[2].lower() for name in archives}
    stems = [re.split(r"[\W_]+|\d+", name.rpartition("/")[2].lower()) for name in archives]
    splits = [name for name, words in zip(archives, stems) if split_kinds(words)]
    if suffixes - {"zip", "tar"}:
        raise UserError(
            f"{folder.root}: no images, but compressed archives, such as {archives[0]}; unpack them into folders"
        )
    if len(archives) == 1 or 2 * len(splits) >= len(archives) or len(suffixes) > 1:
        first = min(splits or archives, key=lambda name: "train" not in name.lower())
        raise UserError(f"{folder.root}: no images, but an archive: give {folder.root / first}")
    found = list_archive(folder.root, archives)
    for why, names in folder.left_out.items():
        if others := sorted(set(names) - set(archives)):
            found.left_out[why] += others
    within: defaultdict[int, set[str]] = defaultdict(set)
    for item in found.items:
        within[item.file].add(item.name.rpartition("/")[0])
    images = {item.name.rpartition(".")[0] for item in found.items}
    several = next(
        (f"{archives[file]} holds several folders" for file, names in within.items() if len(names) > 1), None
    )
    note = next((f"{name} describes an image" for name in found.ignored if name.rpartition(".")[0] in images), None)
    if several or note:
        raise UserError(
            f"{folder.root}: its archives are not one class each, since {several or note}; unpack them into class folders"
        )
    return found


def _is_archive(name: str) -> bool:
    return name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))
