"""Names of classes: one spelling for comparison, and apart from the numbers of classes."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from config import UserError

SPLITS = {"train", "val", "valid", "validation", "trainval", "test", "dev", "eval", "evaluation", "holdout"}


def spelled(name: str) -> str:
    """A class name as text that can be compared, shown and written: in NFC; bytes that are not UTF-8 count as Latin-1."""
    if not name.isprintable():  # os.fsdecode keeps such bytes as surrogates, which no file or terminal takes
        name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), name)
    return unicodedata.normalize("NFC", name)


def by_spelling(names: Iterable[str], where: str) -> dict[str, str]:
    """Each name by its spelling, in the order of the spellings.

    Args:
        names: as the source has them.
        where: begins the error.

    Raises:
        UserError: two different names are spelled alike, and would look like one class.
    """
    found: dict[str, str] = {}
    for name in sorted(set(names)):
        if found.setdefault(spelled(name), name) != name:
            raise UserError(
                f"{where}: two classes are both called {spelled(name)!r}, in different encodings or Unicode forms "
                f"({found[spelled(name)]!a} and {name!a}); rename one, or put their images into one folder"
            )
    return dict(sorted(found.items(), key=lambda pair: unicodedata.normalize("NFC", pair[1])))


def class_number(word: str, names: Sequence[str], count: int, flag: str) -> int | None:
    """The class that a word of the command line means; None if it means none.

    A class's name means that class; upper and lower case differ only where one of the names is spelled exactly so. Anything
    else may be a number below `count`. `name:WORD` and `number:WORD` are for words that are both.

    Args:
        word: what was given.
        names: of all classes, or empty.
        count: of all classes.
        flag: where it was given, for the error.

    Raises:
        UserError: the word is the name of one class and the number of another, or the name of several.
    """
    wanted = spelled(word)
    spellings = [spelled(name) for name in names]
    kind = ""
    if wanted not in spellings and wanted.partition(":")[0] in ("name", "number"):
        kind, _, wanted = wanted.partition(":")
    named = [number for number, name in enumerate(spellings) if name == wanted]
    named = named or [number for number, name in enumerate(spellings) if name.casefold() == wanted.casefold()]
    if not named and wanted.isdecimal():  # 1 and 01 are one word to people
        named = [number for number, name in enumerate(spellings) if name.isdecimal() and int(name) == int(wanted)]
    number = int(wanted) if wanted.isdecimal() and int(wanted) < count else None
    if kind == "number":
        return number
    if len(named) > 1:
        raise UserError(
            f"{flag} {word}: {len(named)} classes have this name, those with the numbers {', '.join(map(str, named))}; give "
            "the number"
        )
    if not named:
        return None if kind == "name" else number
    if kind == "" and number is not None and number != named[0]:
        raise UserError(
            f"{flag} {word}: {names[named[0]]!r} is the name of class number {named[0]}, and number {number} is the class "
            f"named {names[number]!r}; give name:{wanted} for the former or number:{wanted} for the latter"
        )
    return named[0]


def split_kinds(names: Iterable[str]) -> dict[str, str]:
    """Those names that are splits of a dataset and not classes, with what they are: {"Training_set": "train", ...}."""
    kinds = {name: re.sub(r"\d+x\d+|[^a-z]", "", name.lower()) for name in names}
    kinds = {name: re.sub(r"(ing|sets?|images?|imgs?|data)*$", "", kind) for name, kind in kinds.items()}
    return {name: kind for name, kind in kinds.items() if kind in SPLITS}


def order_note(names: Sequence[str]) -> str | None:
    """A sentence where names that count do not have the numbers that they say (0, 1, 10, 2, ...); None elsewhere."""
    split = [re.fullmatch(r"(\D*)(\d+)(\D*)", name) for name in names]
    found = [match for match in split if match]
    if len(found) < len(names) or len({(match[1], match[3]) for match in found}) > 1:
        return None
    values = [int(match[2]) for match in found]
    if values == sorted(values):
        return None
    odd = next(number for number, (name, value) in enumerate(zip(names, sorted(values))) if values[number] != value)
    return f"classes are numbered in the order of text: number {odd} is the class named {names[odd]!r}"
