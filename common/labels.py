"""Labels that a dataset.json of EDM's kind gives to images, {"labels": [[name, number], ...]}, or says that they lack."""

from collections import Counter
from typing import NamedTuple

from common.class_names import spelled
from common.contents import LABELS, Contents
from common.files import parse_json
from common.reporting import say
from config import UserError


class Announced(NamedTuple):
    """where: the file. numbers: a label for each image of the contents; None: the file says that they have none."""

    where: str
    numbers: list[int] | None


def announced_labels(contents: Contents) -> Announced | None:
    """The labels of all images of a folder or archive; None where no file announces any.

    Raises:
        UserError: the file is damaged, or lacks an image.
    """
    found = contents.announced()
    if found is None:
        return None
    file, content = found
    where, folder = str(contents.path / file), file.removesuffix(LABELS)
    labels = read_labels(content, where)
    if labels is None:
        return Announced(where, None) if b'"labels"' in content else None  # without the key it is some other file
    labels = {spelled(name): number for name, number in labels.items()}
    names = [spelled(item.name.removeprefix(folder)) for item in contents.items]
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise UserError(f"{where}: has no label for {missing}")
    gone = sorted(labels.keys() - set(names))
    if gone:
        say(f"{where}: {len(gone):,} of its labels are of images that are not there, such as {gone[0]}")
    return Announced(where, [labels[name] for name in names])


def read_labels(content: bytes, where: str) -> dict[str, int] | None:
    """The content of such a file => label by name; None if it gives no labels. Raises UserError if it is something else."""
    wanted = '{"labels": [[name, number], ...]}'
    parsed = parse_json(content, where)
    try:
        labels = parsed.get("labels")
        if labels is None:
            return None
        pairs = [(name.replace("\\", "/"), int(number)) for name, number in labels]
        odd = next((number for _, number in labels if isinstance(number, bool) or int(number) != float(number)), None)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: expected {wanted} ({error})") from error
    if odd is not None:
        raise UserError(f"{where}: expected {wanted}, found the number {odd}")
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in set(pairs)).most_common(1)[0]
        if name[1] > 1:
            raise UserError(f"{where}: gives {name[0]} several labels")
    return found
