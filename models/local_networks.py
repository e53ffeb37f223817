"""VAEs and encoders in local folders: a model file knows them by name and digest, never by a path of one machine."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import nn

from common.files import read_json, write_text
from common.provenance import weights_sha256
from config import MissingFile, UserError
from models import hub
from models.autoencoder import PUBLISHED
from models.obtain import cache_folder

N = TypeVar("N", bound=nn.Module)


def is_local(name: str) -> bool:
    """Whether the name of a VAE, or of an encoder (also NAME=FILE), is a path."""
    place = name.rpartition("=")[2]
    looks_so = place.startswith(("/", "./", "../", "~")) or place.count("/") > 1  # a repository is OWNER/NAME
    return name not in PUBLISHED and (looks_so or Path(place).exists())


def portable(name: str) -> str:
    """A name that says nothing about this machine: of a path ./ and its last part; others as they are."""
    kind, equals, place = name.rpartition("=")
    return f"{kind}{equals}./{Path(place).expanduser().resolve().name}" if is_local(name) else name


def remember(name: str, digest: str) -> None:
    """Note in the cache of this machine where the network with this digest is, if the name is a folder."""
    path = Path(name).expanduser()
    if digest and path.is_dir() and _recall(digest) != str(path.resolve()):
        with suppress(OSError):
            write_text(cache_folder().with_name("networks") / digest, str(path.resolve()))


def _recall(digest: str) -> str | None:
    """Where the network with this digest was when it was last used, or None."""
    with suppress(OSError):
        return (cache_folder().with_name("networks") / digest).read_text(encoding="utf-8", errors="replace")
    return None


def open_network(
    name: str, digest: str, file: Path, load: Callable[[str], N], flag: str, *, shared: str | None = None
) -> N:
    """Load a network that a model file names.

    A local one is looked for under its name as a path, beside the model file, where the run's config.json says, and where
    it was when something was packed with it on this machine; with a known digest it must be the same network. A folder from
    which it cannot be loaded is skipped.

    Args:
        name: of a VAE or encoder, as in the model file.
        digest: SHA-256 of its weights (see `weights_sha256`), or "" where not known.
        file: the model file.
        load: from a name or path.
        flag: with which the user names another place.
        shared: name of the folder that it has beside a shared model, None if it has none.

    Raises:
        MissingFile: it is nowhere; says why the folders that were tried are not it. Of a name that is not a path,
            what `load` raises.
    """
    if not is_local(name):
        try:
            return load(name)
        except MissingFile as error:
            if "/" not in name or name in PUBLISHED.values():
                raise
            # a relative path on the machine that made the file looks like OWNER/NAME
            raise MissingFile(f"{error}; {flag} gives the folder that {file} means by {name!r}") from error
    seen: dict[str, str] = {}  # place => why it is not the one
    for place in _places(name, digest, file, shared):
        folder = Path(place.rpartition("=")[2]).expanduser()
        if place in seen or not ((folder / "config.json").is_file() or folder.is_file()):
            continue
        seen[place] = "other weights"
        try:
            network = load(place)
        except UserError as error:
            seen[place] = str(error)
            continue
        if not digest or weights_sha256(network, by_name=True) == digest:
            return network
    other = f" ({'; '.join(f'{place}: {why}' for place, why in sorted(seen.items()))})" if seen else ""
    raise MissingFile(
        f"{file} needs {portable(name)}, which is neither beside it nor known on this machine{other}: "
        f"give its folder with {flag}"
    )


def _places(name: str, digest: str, file: Path, shared: str | None) -> Iterator[str]:
    kind, equals, place = name.rpartition("=")
    last = Path(place).name
    yield name
    for folder in (file.parent, *file.parents[1:3]):
        yield f"{kind}{equals}{folder / last}"
    if shared is not None:
        hub.fetch_beside(file, shared)
        yield str(file.parent / shared)
    with suppress(UserError, KeyError, IndexError, TypeError):
        recorded = read_json(file.parents[2] / "config.json")
        for known in (recorded["settings"]["vae"], recorded["facts"]["packed_vae"], *recorded["facts"]["encoders"]):
            if known and Path(known).name == last:
                yield known
    if digest and (known := _recall(digest)):
        yield known
