"""The Hugging Face hub: files by name, from its cache or downloaded, and why one is not available."""

import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from config import MissingFile, UserError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[^/]+)*")


def go_offline_if_unreachable() -> None:
    """Without a route to the hub, look in the local cache only: the client would retry for a minute otherwise."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # a proxy resolves names for us
    try:
        socket.getaddrinfo(_host(), 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def is_name(text: str) -> bool:
    """Whether a text that names no local file may be OWNER/NAME or OWNER/NAME/FILE; in an existing folder it is a path."""
    owner = text.split("/")[0]
    return bool(_NAME.fullmatch(text)) and owner not in (".", "..", "~") and not Path(owner).exists()


def download(name: str) -> Path:
    """The weights file that a hub name means, from the cache or downloaded into it.

    Args:
        name: OWNER/NAME where the repository has one weights file, else OWNER/NAME/FILE.

    Returns:
        Its path in the hub's cache.

    Raises:
        MissingFile: it cannot be had; one sentence with the cause.
        UserError: the repository holds several weights files; names them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    owner, repository, *rest = name.split("/")
    repo, file = f"{owner}/{repository}", "/".join(rest)
    go_offline_if_unreachable()
    try:
        names = [file] if file else _weights(repo)
        if len(names) == 1:
            return Path(hf_hub_download(repo, names[0]))
    except Exception as error:  # of many libraries: connections, HTTP, files
        elsewhere = f"`hf download {repo} {file or 'FILE'} --local-dir DIR` and give the file"
        reason, others = cause(error, repo, elsewhere), []
        if file and isinstance(error, EntryNotFoundError):
            with suppress(Exception):
                others = _weights(repo)
        listed = f"; weights that are there: {', '.join(others)}" if others else ""
        raise MissingFile(f"{name} is not a local file or folder, and {reason}{listed}") from error
    if not names:
        raise MissingFile(f"{repo} on {_host()} holds no weights ({', '.join(_WEIGHTS)})")
    raise UserError(f"{repo} holds several weights files, name one: {', '.join(f'{repo}/{file}' for file in names)}")


def snapshot(name: str, patterns: Sequence[str], **options: Any) -> Path:
    """Files of a repository, from the cache or downloaded into it.

    Args:
        name: OWNER/NAME.
        patterns: which files.
        options: revision, token, cache_dir, ... of huggingface_hub's snapshot_download.

    Returns:
        Their folder.

    Raises:
        UserError: the name is not that of a repository.
        MissingFile: the files cannot be had; one sentence with the cause.
    """
    from huggingface_hub import snapshot_download

    if not is_name(name) or name.count("/") != 1:
        raise UserError(f"{', '.join(options)}: only for a repository on {_host()}, OWNER/NAME, which {name} is not")
    go_offline_if_unreachable()
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:  # of many libraries: connections, HTTP, files
        reason = cause(error, name, f"`hf download {name} --local-dir DIR` and give the folder")
        raise MissingFile(f"{name} cannot be downloaded: {reason}") from error


def _weights(repo: str) -> list[str]:
    """Names of a repository's weights files: those on the hub; where it does not answer, those in the cache."""
    from huggingface_hub import constants, list_repo_files

    try:
        names = list_repo_files(repo)
    except Exception:
        cached = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        newest = cached / "refs" / "main"
        if not newest.is_file():
            raise
        snapshot = cached / "snapshots" / newest.read_text(encoding="utf-8").strip()
        names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
        if not names:
            raise
    found = sorted(name for name in names if name.endswith(_WEIGHTS))
    return [name for name in found if "/" not in name] or found  # those in folders are of the VAE beside the model


def timm_repository(name: str) -> str:
    """OWNER/NAME of the repository of a timm network's weights; a name without a tag means timm's default one.

    name: as timm takes it, hf-hub:OWNER/NAME too.
    """
    from timm.models import get_pretrained_cfg

    config = None if name.startswith("hf-hub:") else get_pretrained_cfg(name)
    return (config and config.hf_hub_id) or name.removeprefix("hf-hub:")


def fetch_beside(file: Path, folder: str) -> None:
    """Download a folder of a repository beside a file of it in the hub's cache, if it can be had; else do nothing."""
    from huggingface_hub import snapshot_download

    cache, repo = (file.parents[k] for k in (3, 2)) if len(file.parents) > 3 else (file, file)
    if (
        file.parent.parent.name == "snapshots"
        and repo.name.startswith("models--")
        and not (file.parent / folder).is_dir()
    ):
        owner_name, revision = "/".join(repo.name.split("--")[1:]), file.parent.name
        go_offline_if_unreachable()
        with suppress(Exception):  # what is then missing is said by whoever needs it
            snapshot_download(owner_name, revision=revision, cache_dir=cache, allow_patterns=[f"{folder}/*"])


def cached_sha256(path: Path) -> str | None:
    """The SHA-256 that a large file of the hub's cache must have, which names its blob; None for other files."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def cause(error: Exception, repo: str, elsewhere: str) -> str:
    """Why a file of a repository is not available, as a clause.

    Args:
        error: what huggingface_hub, or a library that called it, raised.
        repo: OWNER/NAME.
        elsewhere: what to do on a machine with network, named where this one has none.
    """
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, errors.LocalEntryNotFoundError):
            continue  # what lies behind it says why
        if isinstance(link, errors.GatedRepoError):
            return (
                f"{repo} on {_host()} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in with "
                "`hf auth login`"
            )
        if isinstance(link, errors.RepositoryNotFoundError):
            return f"{_host()} has no repository {repo}: check the spelling, or log in with `hf auth login` if it is private"
        if isinstance(link, errors.HFValidationError):
            return f"{repo!r} is not a repository name (OWNER/NAME)"
        if isinstance(link, errors.EntryNotFoundError):
            return f"{repo} on {_host()} has no such file ({first_line(error).split(' (Request')[0]})"
        if isinstance(link, errors.HfHubHTTPError):
            return f"{_host()} answered for {repo}: {first_line(link).split(' (Request')[0]}"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    clients = ("httpx", "httpx2", "requests")  # by version of huggingface_hub
    if not any(isinstance(link, unreachable) or type(link).__module__.split(".")[0] in clients for link in chain):
        return f"{repo} cannot be loaded: {first_line(error)}"
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if asked else f"{_host()} cannot be reached"
    detail = "" if constants.HF_HUB_OFFLINE else f" ({first_line(chain[-1])})"
    return (
        f"the cache {constants.HF_HUB_CACHE} has no such file of {repo} and {why}{detail}: on a machine with network run "
        f"{elsewhere}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _host() -> str:
    from huggingface_hub import constants

    return str(urlparse(constants.ENDPOINT).hostname)
