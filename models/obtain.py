"""Model files by name: local, or published weights from disk or from the Hugging Face hub, converted once into a cache."""

import atexit
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.files import fingerprint, sha256, write_text
from common.reporting import say
from config import UserError
from models import autoencoder, hub
from models.model_file import ModelInfo, find_model, is_safetensors, read_header, read_info, save_model
from models.published import convert_published
from models.sit import PRESETS, preset

CONVERSION = 1  # raised when models/published.py makes another model file of the same weights
_STALE = 24 * 3600.0  # seconds; a conversion that has not finished by then was killed


class Source(NamedTuple):
    """A file that a name means. name: for messages, a path or OWNER/NAME/FILE."""

    path: Path
    name: str


def obtain(name: Path | str) -> Path:
    """Resolve a name to a model file; say what it is, and convert it first where it is a published checkpoint.

    Args:
        name: a model file, checkpoint folder or run folder; a published file of REG, REPA or SiT, whatever its suffix; or
            OWNER/NAME or OWNER/NAME/FILE on the Hugging Face hub. A local path comes first.

    Returns:
        A file for `load_model`. Converted ones are kept in $REG_CACHE/models, by the SHA-256 of what they come from.

    Raises:
        UserError: it cannot be had or is something else; one sentence with the cause.
    """
    source = locate(name)
    try:
        ours = is_safetensors(source.path) and "reg" in read_header(source.path)
        path = source.path if ours else _converted(source)
    except PermissionError as error:
        raise UserError(f"{source.path} cannot be read ({error.strerror})") from error
    say(f"{source.name}: {describe(read_info(path))}{'' if ours else f'; converted to {path}'}")
    return path


def locate(name: Path | str) -> Source:
    """Resolve a name to a file, as `obtain` does, without converting it."""
    path = Path(name).expanduser()
    if path.exists() or not hub.is_name(str(name)):
        found = find_model(path)
        return Source(found, str(found))
    found = hub.download(str(name))
    return Source(found, f"{name}" if str(name).endswith(f"/{found.name}") else f"{name}/{found.name}")


def describe(info: ModelInfo) -> str:
    """One line on a model: size, method, step, classes, pixels, VAE."""
    network = info.network
    shape = ("depth", "hidden_size", "num_heads", "patch_size")
    size = next(
        (name for name in PRESETS if all(getattr(preset(name), key) == getattr(network, key) for key in shape)),
        f"SiT (depth {network.depth}, width {network.hidden_size}, {network.num_heads} heads, patch {network.patch_size})",
    )
    method = ""
    if network.class_token_dim:
        method = " + REG" if network.align_dims else " + class token"
    elif network.align_dims:
        method = " + REPA"
    vae = info.vae
    if vae in autoencoder.PUBLISHED:
        vae = f"{vae} ({autoencoder.PUBLISHED[vae].split('/')[1]})"
    step = [f"step {info.step:,}"] if info.step else []
    classes = f"{network.num_classes} class{'es' if network.num_classes > 1 else ''}"
    return ", ".join([size + method, *step, classes, f"{info.resolution} px", f"VAE {vae}"])


def cache_folder() -> Path:
    """Folder of converted weights: $REG_CACHE/models, by default ~/.cache/reg/models. Raises OSError without a home."""
    try:
        return Path(os.environ.get("REG_CACHE") or "~/.cache/reg").expanduser() / "models"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _converted(source: Source) -> Path:
    """The converted copy of a published file: from the cache, or made now, in the cache or in a temporary folder."""
    file: Path | None = None
    problem: OSError | None = None
    try:
        folder = cache_folder()
        file = folder / f"{_digest(source.path, folder)[:32]}-{CONVERSION}.safetensors"
        if _is_whole(file):
            return file
    except OSError as error:
        problem = error
    state_dict, info = convert_published(source.path)
    if file:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in file.parent.glob("converting-*"):
                if time.time() - abandoned.stat().st_mtime > _STALE:
                    shutil.rmtree(abandoned, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="converting-", dir=file.parent) as own:  # others may convert it too
                save_model(Path(own) / file.name, state_dict, info)
                shutil.move(Path(own) / file.name, file)
            return file
        except OSError as error:
            problem = error
    temporary = Path(tempfile.mkdtemp(prefix="reg-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    try:
        save_model(temporary / "model.safetensors", state_dict, info)
    except OSError as error:
        raise UserError(f"{source.name}: the converted weights fit neither in the cache nor in {temporary}") from error
    reason = hub.first_line(problem) if problem else ""
    say(
        f"the cache of converted weights cannot be written ({reason}): this copy is deleted at the end; REG_CACHE names "
        "another folder"
    )
    return temporary / "model.safetensors"


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        read_info(file)
    except ValueError:  # shorter than its header says, or of an older schema: it is converted again
        return False
    return True


def _digest(path: Path, folder: Path) -> str:
    """The SHA-256 of a file, remembered in the cache for as long as path, size and times stay.

    Raises:
        UserError: it is a file of the hub's cache and not what was downloaded.
    """
    stat = path.stat()
    known = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    memory = folder / "digests" / fingerprint(known)[:32]
    if memory.is_file() and re.fullmatch("[0-9a-f]{64}", text := memory.read_text(encoding="utf-8")):
        return text
    if stat.st_size > 1e9:
        say(f"reading {path.name} ({stat.st_size / 1e9:.3g} GB) for the first time")
    digest = sha256(path)
    expected = hub.cached_sha256(path)
    if expected and digest != expected:
        raise UserError(f"{path} is damaged (its SHA-256 differs): delete {path.resolve()} to have it downloaded again")
    with suppress(OSError):  # it is computed again next time
        write_text(memory, digest)
    return digest
