"""Reading images to pack: the published crop, every kind of file, every kind of source, and what is refused."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.crop import center_crop
from common.images import BadImage, decode_image
from config import UserError
from preprocessing.index import Choice, Index
from preprocessing.read import CropDataset, Reader, Request, crop_file
from preprocessing.sources import latent_name, list_source

SHARED = Path(__file__).parents[2] / "shared"
LIMIT = 10**6


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode if mode != "CMYK" else "CMYK")


def encoded(image, kind="PNG", **arguments):
    stream = io.BytesIO()
    image.save(stream, kind, **arguments)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------------------- crop


@pytest.mark.parametrize(
    ("size", "width", "height", "digest"),
    [  # SHA-256 of what the published code gives for the same noise
        (16, 1, 40, "acb055285a3fef42"),
        (16, 40, 1, "040d8d141cc9a40b"),
        (16, 33, 67, "96912f5a0f0ed873"),
        (16, 15, 15, "02986f1f2d1f763c"),
        (16, 16, 16, "2d9e7ae3d7e03513"),
        (16, 31, 100, "71f353e64c65e012"),
        (16, 100, 65, "c75b60e952f0cc85"),
        (16, 17, 16, "e10caef85f17962c"),
        (32, 129, 255, "2b53ca297258b78e"),
        (256, 257, 511, "f776d7f193aa285d"),
    ],
)
def test_crop_of_odd_sizes(size, width, height, digest):
    """The published rule, bit for bit: 1 x N, just above and below the doubling, enlarged, untouched."""
    crop = center_crop(noise(width, height), size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    assert hashlib.sha256(np.ascontiguousarray(crop).tobytes()).hexdigest()[:16] == digest


def test_crop_golden():
    """The published crops of twelve ImageNet files, some tiny, huge or grey, are reproduced exactly."""
    golden = SHARED / "reference" / "crops_256.npz"
    if not golden.is_file():
        pytest.skip("the recorded crops are not here")
    with np.load(golden) as crops:
        for name in crops.files:
            data = (SHARED / "data" / "imagenet-samples" / name).read_bytes()
            assert np.array_equal(crop_file(data, 256, 10**8).pixels, crops[name]), name


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_modes_convert_as_pillow_does(mode):
    """Grey, alpha, palette, bilevel and CMYK become RGB by Pillow's own rule, as in the published code."""
    image = noise(9, 7, "CMYK") if mode == "CMYK" else noise(9, 7).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(image, kind)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(decode_image(data, LIMIT)), np.asarray(opened.convert("RGB")))


def test_sixteen_bits_do_not_saturate():
    """16-bit grey is scaled to 8 bits; Pillow's own conversion would clip all above 255 to white."""
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values)), LIMIT))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255] and pixels.shape == (1, 5, 3)


def test_palette_transparency_and_first_frame():
    """A transparent palette image is as opaque as in the published code; of an animation the first frame counts."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0)
    assert np.asarray(decode_image(data, LIMIT))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored():
    """As in the published code: the pixels as they are stored."""
    image = noise(12, 8)
    exif = Image.Exif()
    exif[274] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif), LIMIT).size == (12, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "unknown format"),
        (b"no image at all", "unknown format"),
        (encoded(noise(64, 64), "JPEG")[:1500], "truncated"),
        (encoded(noise(64, 64))[:3000], "truncated or corrupt"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32 bits"),
        (encoded(noise(1, 60000, "L")), "would be enlarged"),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "float", "enlarged beyond measure"],
)
def test_bad_images(data, message):
    """What cannot be decoded is a BadImage that says why."""
    with pytest.raises(BadImage, match=message):
        crop_file(data, 256, 10**7)


def test_oversized_header_is_refused_before_it_takes_memory():
    """A few bytes that promise gigapixels are refused by their header."""
    data = bytearray(encoded(noise(4, 4)))
    data[16:24] = (60000).to_bytes(4, "big") * 2  # the sizes in PNG's IHDR
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(BadImage, match=r"60000 x 60000|too many pixels"):
        decode_image(bytes(data), 10**8)
    with pytest.raises(BadImage, match="--max-pixels 99"):
        decode_image(encoded(noise(10, 10)), 99)


# ----------------------------------------------------------------------------------------------------------- sources

IMAGES = {f"{folder}/{i}.png": encoded(noise(8 + i, 9)) for folder in ("bee", "ant", "cat") for i in range(3)}


def write_folder(root, images=IMAGES):
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path, images=IMAGES, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_tar_of_tars(path):
    inner = {}
    for folder in ("bee", "ant", "cat"):
        members = {n.split("/")[1]: d for n, d in IMAGES.items() if n.startswith(folder)}
        inner[f"{folder}.tar"] = write_tar(path.with_name("inner.tar"), members).read_bytes()
    path.with_name("inner.tar").unlink()
    return write_tar(path, inner)


def write_table(folder, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    ordered = sorted(IMAGES.items())
    names = ["ant", "bee", "cat"]
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": name} for name, data in ordered],
            "label": [names.index(name.split("/")[0]) for name, _ in ordered],
        }
    )
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(table.slice(0, 5), folder / "train-00000.parquet", row_group_size=2)
        parquet.write_table(table.slice(5), folder / "train-00001.parquet", row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(folder / "data-00000.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    return folder


SOURCES = {
    "folder": lambda tmp: write_folder(tmp / "images"),
    "zip": lambda tmp: write_zip(tmp / "images.zip"),
    "zip, stored": lambda tmp: write_zip(tmp / "images.zip", method=zipfile.ZIP_STORED),
    "zip, wrapped": lambda tmp: write_zip(tmp / "images.zip", {f"set/train/{n}": d for n, d in IMAGES.items()}),
    "tar": lambda tmp: write_tar(tmp / "images.tar", {f"./{n}": d for n, d in IMAGES.items()}),
    "tar of tars": lambda tmp: write_tar_of_tars(tmp / "images.tar"),
    "parquet": lambda tmp: write_table(tmp / "images", "parquet"),
    "arrow": lambda tmp: write_table(tmp / "images", "arrow"),
}


def crops(index, size=8):
    dataset = CropDataset(Reader(index.kind, index.root, index.files), size, LIMIT)
    return dataset[Request(0, index.items(0, len(index)), True)]


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_same_records(tmp_path, make):
    """Whatever the images lie in: sorted classes, images in order, the same crops."""
    index = list_source(make(tmp_path), Choice())
    read = crops(index)
    assert index.classes == ["ant", "bee", "cat"] and read.label.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    expected = [crop_file(data, 8, LIMIT).pixels for _, data in sorted(IMAGES.items())]
    assert np.array_equal(read.pixels.numpy(), np.stack(expected)) and not read.bad


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_index_survives_its_file(tmp_path, make):
    """The list is the same every time, and after being written and read."""
    source = make(tmp_path)
    index = list_source(source, Choice())
    content = index.to_bytes()
    assert content == list_source(source, Choice()).to_bytes()
    (tmp_path / "index.npz").write_bytes(content)
    assert Index.from_file(tmp_path / "index.npz").to_bytes() == content
    for place in range(0, len(content), max(1, len(content) // 40)):
        (tmp_path / "index.npz").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            Index.from_file(tmp_path / "index.npz")
        except ValueError as error:
            assert "is damaged" in str(error)


def test_classes_file_selects_and_orders(tmp_path):
    """--classes: labels follow its lines, classes it leaves out are not packed, names to show are kept."""
    root = write_folder(tmp_path / "images")
    file = tmp_path / "classes.txt"
    file.write_text("cat\na\tof no matter\n".replace("a\tof no matter", "ant red ant, Myrmica"))
    index = list_source(root, Choice(file))
    assert index.classes == ["cat", "red ant, Myrmica"]
    assert index.names[0] == "cat/0.png" and index.labels.tolist() == [0] * 3 + [1] * 3
    for text, message in (("cow\n", "'cow' is no class"), ("cat\ncat\n", "twice"), ("\n", "names no class")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            list_source(root, Choice(file))


def test_labels_from_dataset_json(tmp_path):
    """A dataset.json of EDM's kind gives the labels, as in the published tool."""
    names = ["00000/img0.png", "00000/img1.png"]
    images = {name: encoded(noise(8, 8)) for name in names}
    labels = json.dumps({"labels": [[names[0], 4], [names[1], 2]]}).encode()
    for source in (
        write_folder(tmp_path / "folder", images | {"dataset.json": labels}),
        write_zip(tmp_path / "images.zip", images | {"dataset.json": labels}),
    ):
        index = list_source(source, Choice())
        assert dict(zip(index.names, index.labels.tolist())) == {names[0]: 4, names[1]: 2}
        assert index.classes == ["0", "1", "2", "3", "4"]
    write_folder(tmp_path / "folder", {"00000/img2.png": b""})
    with pytest.raises(UserError, match=r"has no label for 00000/img2\.png"):
        list_source(tmp_path / "folder", Choice())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "no images found"),
        ({"readme.txt": b""}, "no images found, only files like readme"),
        ({"ant/1.png": b""}, "all images are of one class, 'ant'"),
        ({"1.png": b"", "2.png": b""}, "1.png lies in no class folder"),
        ({"ant/1.png": b"", "bee/1.png": b"", "3.png": b""}, "3.png lies in no class folder"),
        ({"train/ant/1.png": b"", "val/ant/1.png": b""}, "holds splits, not classes"),
        ({"images.zip": b""}, "give --source"),
    ],
    ids=["empty", "no images", "one class", "flat", "loose image", "splits", "archive inside"],
)
def test_wrong_folders(tmp_path, images, message):
    """Each wrong folder is one sentence that names it."""
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", images)
    with pytest.raises(UserError, match=message):
        list_source(tmp_path / "images", Choice())


def test_one_class_when_asked_for(tmp_path):
    """--allow-one-class takes one class folder, or a flat folder of images."""
    index = list_source(write_folder(tmp_path / "a", {"ant/1.png": b""}), Choice(allow_one_class=True))
    assert index.classes == ["ant"]
    flat = list_source(write_folder(tmp_path / "b", {"2.png": b"", "1.png": b""}), Choice(allow_one_class=True))
    assert flat.classes == ["all"] and flat.names == ["1.png", "2.png"]


def test_missing_and_foreign_sources(tmp_path):
    (tmp_path / "x.txt").write_text("no archive")
    for source, message in ((tmp_path / "nowhere", "no such file"), (tmp_path / "x.txt", "not a folder, zip, tar")):
        with pytest.raises(UserError, match=message):
            list_source(source, Choice())


def test_what_is_no_image_is_passed_over(tmp_path):
    """Hidden files, what macOS leaves in archives, and other files are not packed, and a few are named."""
    extra = {"ant/._1.png": b"", "__MACOSX/ant/1.png": b"", "ant/notes.txt": b"", "ant/.DS_Store": b""}
    for source in (write_folder(tmp_path / "a", IMAGES | extra), write_zip(tmp_path / "b.zip", IMAGES | extra)):
        index = list_source(source, Choice())
        assert len(index) == 9 and "ant/notes.txt" in index.ignored


def test_links_in_a_folder_are_followed_but_not_in_a_circle(tmp_path):
    """A class folder may be a link; a link to a folder above itself is not followed."""
    root = write_folder(tmp_path / "images")
    (root / "dog").symlink_to(root / "cat")
    (root / "cat" / "again").symlink_to(root)
    index = list_source(root, Choice())
    assert len(index) == 12 and index.classes == ["ant", "bee", "cat", "dog"]


# ------------------------------------------------------------------------------------------------------------ safety


@pytest.mark.parametrize("name", ["/etc/1.png", "../1.png", "ant/../../1.png", "C:\\ant\\1.png", "..\\1.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_point_out_are_refused(tmp_path, kind, name):
    """Absolute paths and .. in an archive are refused by name."""
    write = write_zip if kind == "zip" else write_tar
    with pytest.raises(UserError, match="points out of the archive"):
        list_source(write(tmp_path / f"x.{kind}", {name: b"", **IMAGES}), Choice())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("ant/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="is a link or no regular file"):
        list_source(tmp_path / "x.tar", Choice())


def test_links_and_encryption_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("ant/1.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        list_source(tmp_path / "x.zip", Choice())
    data = bytearray(write_zip(tmp_path / "y.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        list_source(tmp_path / "y.zip", Choice())


@pytest.mark.parametrize("make", ["tar", "tar of tars"])
def test_a_truncated_tar_is_told_wherever_it_ends(tmp_path, make):
    """Half a download, cut between members or within one, never passes for a smaller archive; nor does a broken header."""
    path = SOURCES[make](tmp_path)
    content = path.read_bytes().rstrip(b"\0")
    for end in range(1, len(content), 389):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"images\.tar: (damaged|not a folder|no images)"):
            list_source(path, Choice(allow_one_class=True))
    headers = [i - 257 for i in range(len(content)) if content[i : i + 5] == b"ustar"]
    path.write_bytes(content[: headers[2] + 10] + b"X" + content[headers[2] + 11 :] + bytes(10240))
    with pytest.raises(UserError, match="no end mark"):
        list_source(path, Choice())


def test_damaged_and_compressed_archives_are_told(tmp_path):
    """A zip without its directory and a compressed tar are one sentence each."""
    path = write_zip(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"x\.zip"):
        list_source(path, Choice())
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(write_folder(tmp_path / "images"), "images")
    with pytest.raises(UserError, match="decompress it once"):
        list_source(tmp_path / "x.tar.gz", Choice())


def test_a_zip_bomb_stays_small(tmp_path):
    """A member that inflates to more than its directory says, or whose bytes were changed, is a bad image."""
    path = write_zip(tmp_path / "x.zip", {"ant/1.png": b"\0" * 10**7, **IMAGES})
    index = list_source(path, Choice())
    item = next(item for item in index.items(0, len(index)) if item.name == "ant/1.png")
    reader = Reader(index.kind, index.root, index.files)
    with pytest.raises(BadImage, match="not what its directory says"):
        reader.read(item._replace(size=1000))
    with pytest.raises(BadImage, match="not what its directory says"):
        reader.read(item._replace(crc=item.crc ^ 1))
    with pytest.raises(BadImage, match="no image to train on"):
        reader.read(item._replace(size=2**40))


# -------------------------------------------------------------------------------------------------- published layout


def write_published(root, images="imagenet_256_vae", count=4):
    rng = np.random.default_rng(0)
    labels = {"vae-sd": [], images: []}
    for i in range(count):
        crop, latent = f"00000/img{i:08d}.png", f"00000/img-mean-std-{i:08d}.npy"
        write_folder(root / images, {crop: encoded(noise(16, 16 + 0 * i))})
        (root / "vae-sd" / "00000").mkdir(parents=True, exist_ok=True)
        np.save(root / "vae-sd" / latent, np.abs(rng.normal(size=(8, 2, 2))).astype(np.float32))
        labels["vae-sd"].append([latent, i % 2])
        labels[images].append([crop, i % 2])
    for folder, pairs in labels.items():
        (root / folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return root


@pytest.mark.parametrize("images", ["imagenet_256_vae", "images"])
def test_published_layout(tmp_path, images):
    """Crops and moments are paired by name and taken over as they are."""
    root = write_published(tmp_path / "data", images)
    index = list_source(root, Choice())
    read = crops(index, 16)
    assert index.kind == "published" and read.label.tolist() == [0, 1, 0, 1]
    assert np.array_equal(read.moments[3], np.load(root / "vae-sd" / latent_name(index.names[3])))
    assert np.array_equal(read.pixels[0], np.asarray(noise(16, 16)))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda r: (r / "vae-sd/00000/img-mean-std-00000002.npy").unlink(),
            "img00000002.png of imagenet_256_vae/ has no",
        ),
        (
            lambda r: (r / "imagenet_256_vae/00000/img00000001.png").unlink(),
            "img-mean-std-00000001.npy of vae-sd/ has no",
        ),
        (lambda r: (r / "vae-sd/dataset.json").write_text('{"labels": []}'), "has no label for"),
        (lambda r: (r / "vae-sd/dataset.json").write_text('{"labels": null}'), "holds no labels"),
        (lambda r: (r / "imagenet_256_vae").rename(r / "pictures"), "neither imagenet_256_vae/ nor images/"),
        (lambda r: _swap_labels(r / "imagenet_256_vae/dataset.json"), "do not belong together"),
    ],
    ids=["latent missing", "image missing", "label missing", "no labels", "no images", "labels disagree"],
)
def test_published_pairs_that_do_not_match_are_refused(tmp_path, harm, message):
    root = write_published(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError, match=message):
        list_source(root, Choice())


def _swap_labels(path):
    path.write_text(path.read_text().replace(", 1]", ", 0]"))
