"""What can be packed: a folder of class folders, the published layout, zip, tar, parquet and arrow => an Index."""

import json
import stat
import tarfile
import zipfile
from pathlib import Path

from common.images import is_image, list_images, walk
from config import UserError
from preprocessing import tables
from preprocessing.index import Index, Item, Listing, build

ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
IMAGE_FOLDERS = ("imagenet_256_vae", "images")  # of the published layout: REG's, REPA's
LATENT_FOLDER = "vae-sd"


def list_source(source: Path, classes: Path | None = None, allow_one_class: bool = False) -> Index:
    """Find the images of a source and their classes.

    Args:
        source: what --source names.
        classes: text file of the classes to take; None: all.
        allow_one_class: accept images that are all of one class.

    Raises:
        UserError: names what is wrong.
    """
    try:
        return build(_list(source), classes, allow_one_class)
    except PermissionError as error:
        raise UserError(f"--source {source}: {error.filename} cannot be read ({error.strerror})") from error


def _list(source: Path) -> Listing:
    if not source.exists():
        raise UserError(f"--source {source}: no such file or folder")
    if source.is_dir() and (source / LATENT_FOLDER / "dataset.json").is_file():
        return _list_published(source)
    if tables.is_table(source):
        return tables.list_tables(source)
    if source.is_dir():
        return _list_folder(source)
    if zipfile.is_zipfile(source):
        return _list_zip(source)
    if tarfile.is_tarfile(source):
        return _list_tar(source)
    raise UserError(f"--source {source}: not a folder, zip, tar, parquet or arrow file")


def _list_folder(root: Path) -> Listing:
    items, ignored = [], []
    for name in walk(root):
        if is_image(name):
            items.append(Item(name, None))
        else:
            ignored.append(name)
    if not items and any(name.endswith((".zip", ".tar")) for name in ignored):
        archive = next(name for name in ignored if name.endswith((".zip", ".tar")))
        raise UserError(f"--source {root}: no images, but an archive: give --source {root / archive}")
    labels = root / "dataset.json"
    items = _label(items, labels.read_bytes() if labels.is_file() else None, str(labels))
    return Listing("folder", root, [""], items, ignored=ignored)


def _label(items: list[Item], content: bytes | None, where: str) -> list[Item]:
    """Labels from a `dataset.json` of EDM's kind, {"labels": [[name, number], ...]}, where there is one."""
    labels = _read_labels(content, where) if content else None
    if labels is None:
        return items
    missing = [item.name for item in items if item.name not in labels]
    if missing:
        raise UserError(f"{where}: has no label for {missing[0]}")
    return [item._replace(label=labels[item.name]) for item in items]


def _read_labels(content: bytes, where: str) -> dict[str, int] | None:
    try:
        labels = json.loads(content).get("labels")
        return None if labels is None else {name.replace("\\", "/"): int(number) for name, number in labels}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{where}: expected {{"labels": [[name, number], ...]}} ({error})') from error


# ---------------------------------------------------------------------------------------------------------- archives


def _safe(name: str, source: Path) -> str:
    """A member's name, refused if it points out of the archive. (Nothing is ever extracted; such an archive is a trap.)"""
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/") or plain[1:3] == ":/":
        raise UserError(f"--source {source}: member {name!r} points out of the archive; refused")
    return plain.removeprefix("./")


def _list_zip(source: Path) -> Listing:
    items, ignored, labels = [], [], None
    try:
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                name = _safe(info.filename, source)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"--source {source}: member {name!r} is a link; refused")
                if info.is_dir():
                    continue
                if name == "dataset.json":
                    labels = archive.read(info)
                if not is_image(name):
                    ignored.append(name)
                    continue
                if info.flag_bits & 1:
                    raise UserError(f"--source {source}: member {name!r} is encrypted")
                if info.compress_type not in ZIP_METHODS:
                    raise UserError(f"--source {source}: member {name!r} is compressed in an unusual way; use deflate")
                stored = -1 if info.compress_type == zipfile.ZIP_STORED else info.compress_size
                items.append(Item(name, None, 0, info.header_offset, info.file_size, stored, info.CRC))
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"--source {source}: damaged zip ({error})") from error
    items = _label(items, labels, f"{source}: dataset.json")
    return Listing("zip", source.parent, [source.name], items, ignored=ignored)


def _list_tar(source: Path) -> Listing:
    """Images of a tar, and of the tars inside it (ILSVRC2012_img_train.tar: one for each class, named after it)."""
    items: list[Item] = []
    ignored: list[str] = []
    try:
        with tarfile.open(source, mode="r:") as archive:
            _list_members(archive, source, "", 0, items, ignored)
    except tarfile.ReadError as error:
        raise UserError(
            f"--source {source}: damaged or compressed tar ({error}); decompress it once, since its images are read in "
            "any order"
        ) from error
    return Listing("tar", source.parent, [source.name], items, ignored=ignored)


def _list_members(
    archive: tarfile.TarFile, source: Path, prefix: str, start: int, items: list[Item], ignored: list[str]
) -> None:
    name = ""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member it has seen
        name = prefix + _safe(member.name, source)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"--source {source}: member {name!r} is a link or no regular file; refused")
        if name.endswith(".tar") and not prefix:
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                inner_prefix = name.removesuffix(".tar") + "/"
                _list_members(inner, source, inner_prefix, member.offset_data, items, ignored)
        elif is_image(name):
            items.append(Item(name, None, 0, start + member.offset_data, member.size))
        else:
            ignored.append(name)
    archive.fileobj.seek(archive.offset)  # tarfile stops at a broken header as it does at the end mark, without a word
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark after member {name!r}")


# -------------------------------------------------------------------------------------------------- published layout


def _list_published(root: Path) -> Listing:
    """Crops as PNG and moments as npy, as the published preprocessing leaves them; pairs are matched by name."""
    images = next((name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        wanted = " nor ".join(f"{name}/" for name in IMAGE_FOLDERS)
        raise UserError(f"--source {root}: has {LATENT_FOLDER}/ but neither {wanted}")
    crops = list_images(root / images)
    latents = sorted(name for name in walk(root / LATENT_FOLDER) if name.endswith(".npy"))
    labels = _read_published_labels(root / LATENT_FOLDER / "dataset.json")
    unpaired = {latent_name(crop): crop for crop in crops}
    unpaired = {name: unpaired.get(name, name) for name in unpaired.keys() ^ set(latents)}
    if unpaired:
        name = unpaired[min(unpaired)]
        has, lacks = (LATENT_FOLDER, images) if name.endswith(".npy") else (images, LATENT_FOLDER)
        raise UserError(
            f"--source {root}: {name} of {has}/ has no partner in {lacks}/; the two folders do not belong together"
        )
    beside = root / images / "dataset.json"
    crop_labels = _read_published_labels(beside) if beside.is_file() else {}
    items = []
    for crop in crops:
        latent = latent_name(crop)
        if latent not in labels:
            raise UserError(f"{root / LATENT_FOLDER / 'dataset.json'}: has no label for {latent}")
        if crop_labels.get(crop, labels[latent]) != labels[latent]:
            raise UserError(
                f"--source {root}: {crop} has label {crop_labels[crop]} and {latent} has {labels[latent]}; the two folders "
                "do not belong together"
            )
        items.append(Item(crop, labels[latent]))
    return Listing("published", root, [images], items)


def latent_name(crop: str) -> str:
    """Published naming: 00000/img00000000.png => 00000/img-mean-std-00000000.npy."""
    folder, _, file = crop.rpartition("/")
    stem = file.rpartition(".")[0]
    return f"{folder}/img-mean-std-{stem.removeprefix('img')}.npy".removeprefix("/")


def _read_published_labels(path: Path) -> dict[str, int]:
    labels = _read_labels(path.read_bytes(), str(path))
    if labels is None:
        raise UserError(f"{path}: holds no labels; the published preprocessing had lost them")
    return labels
