"""The members of zips and tars. Nothing is extracted: an item says where its bytes lie (`common.members` reads them)."""

import io
import stat
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

from common.arrays import refuse_joined
from common.contents import MAX_LABELS, Contents, Item, is_hidden
from common.files import read_bounded
from common.images import is_image
from config import UserError

MAX_HEADER = 2**20  # bytes of a header that holds a long name or the like
EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


def list_archive(root: Path, files: list[str]) -> Contents:
    """One archive, or several of one kind: each file is then a folder of its name."""
    kind, read = ("zip", _list_zip) if zipfile.is_zipfile(root / files[0]) else ("tar", _list_tar)
    if kind == "tar" and not tarfile.is_tarfile(root / files[0]):
        raise UserError(f"{root / files[0]}: not a folder, zip, tar or another file that can be used here, or damaged")
    found = Contents(kind, root, files)
    for number, file in enumerate(files):
        folder = file.rpartition(".")[0] if files[1:] else ""
        found.add_folder(folder)
        read(root / file, number, f"{folder}/".removeprefix("/"), found)
    name, count = Counter(item.name for item in found.items).most_common(1)[0] if found.items else ("", 0)
    if count > 1:
        raise UserError(f"{found.path}: {name} is there twice")
    return found


def _safe(name: str, source: Path) -> str:
    """A member's name, refused if it points out of the archive. (Nothing is ever extracted; such an archive is a trap.)"""
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/") or plain[1:3] == ":/":
        raise UserError(f"{source}: member {name!r} points out of the archive; refused")
    return plain.removeprefix("./")


def _list_zip(source: Path, number: int, prefix: str, found: Contents) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            refuse_joined(source, members)
            for info in members:
                name = prefix + _safe(info.filename, source)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{source}: member {name!r} is a link; refused")
                if info.is_dir():
                    found.add_folder(name.rstrip("/"))
                    continue
                if is_image(name) and info.flag_bits & 1:
                    raise UserError(f"{source}: member {name!r} is encrypted")
                if is_image(name) and info.compress_type not in ZIP_METHODS:
                    raise UserError(f"{source}: member {name!r} is compressed in an unusual way; use deflate")
                stored = -1 if info.compress_type == zipfile.ZIP_STORED else info.compress_size
                item = Item(name, None, number, info.header_offset, info.file_size, stored, info.CRC)
                found.add(item, partial(_read_zipped, source, info))
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"{source}: damaged zip ({error})") from error


def _read_zipped(source: Path, member: zipfile.ZipInfo) -> bytes:
    try:
        with zipfile.ZipFile(source) as archive, archive.open(member) as stream:
            return read_bounded(stream, MAX_LABELS, f"{source}: {member.filename}")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{source}: damaged zip ({error})") from error


class _Header(tarfile.TarInfo):
    """A header of a tar that is refused where it lies about its size: tarfile would read that much, or go backwards."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > MAX_HEADER and header.type in EXTENDED):
            raise tarfile.ReadError(f"member {header.name!r} has a size of {header.size}")
        return header


def _list_tar(source: Path, number: int, prefix: str, found: Contents) -> None:
    """Images of a tar, and of the tars inside it (ILSVRC2012_img_train.tar: one for each class, named after it)."""
    try:
        with tarfile.open(source, mode="r:", tarinfo=_Header) as archive:
            _list_members(archive, source, number, prefix, 0, found, nested=False)
    except tarfile.ReadError as error:
        raise UserError(
            f"{source}: damaged or compressed tar ({error}); decompress it once, since its images are read in any order"
        ) from error


def _list_members(
    archive: tarfile.TarFile, source: Path, number: int, prefix: str, start: int, found: Contents, nested: bool
) -> None:
    name = ""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member it has seen
        name = prefix + _safe(member.name, source)
        if member.size < 0:
            raise tarfile.ReadError(f"member {name!r} has a size of {member.size}")
        if member.isdir():
            found.add_folder(name.rstrip("/"))
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{source}: member {name!r} is a link or no regular file; refused")
        if name.lower().endswith(".tar") and not nested and not is_hidden(name):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:", tarinfo=_Header) as inner:
                inner_prefix = name[:-4] + "/"
                found.add_folder(name[:-4])
                _list_members(inner, source, number, inner_prefix, member.offset_data, found, nested=True)
        else:
            item = Item(name, None, number, start + member.offset_data, member.size)
            found.add(item, partial(_read_stretch, source, item))
    stream = archive.fileobj
    stream.seek(archive.offset)  # tarfile stops at a broken header as it does at the end mark, without a word
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark after member {name!r}")
    if any(piece.count(0) < len(piece) for piece in iter(lambda: stream.read(2**20), b"")):
        raise UserError(
            f"{source}: goes on after the end mark that follows member {name!r}: join tars with `tar --concatenate`, not "
            "with cat"
        )


def _read_stretch(source: Path, item: Item) -> bytes:
    with source.open("rb") as stream:
        stream.seek(item.offset)
        return read_bounded(
            io.BytesIO(stream.read(min(item.size, MAX_LABELS + 1))), MAX_LABELS, f"{source}: {item.name}"
        )
