"""Image files: the published crop, every kind of file, what is refused, and which files are listed."""

import hashlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from common.crop import center_crop
from common.images import BadImage, decode_image, image_size
from common.listing import list_contents
from preprocessing.read import crop_file
from tests.packs import LIMIT, SHARED, encoded, noise, write_folder


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
            assert np.array_equal(crop_file(data, 256, 10**8)[0], crops[name]), name


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

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(BadImage, match=r"60000 x 60000|too many pixels"):
        decode_image(bytes(data), 10**8)
    with pytest.raises(BadImage, match="--max-pixels 99"):
        decode_image(encoded(noise(10, 10)), 99)


def test_still_images_of_8_bits(tmp_path):
    """What measures images refuses animations and 16 bits; both name the reason, and a plain image is the same."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="animated"):
        decode_image(animation, still_8_bit=True)
    with pytest.raises(BadImage, match="pixels of type I;16"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), still_8_bit=True)
    plain = encoded(noise(9, 7))
    assert decode_image(plain, still_8_bit=True) == decode_image(plain)


def test_files_are_read_by_path(tmp_path):
    """A path gives the image of its bytes, its size without decoding, and a BadImage where it cannot be read."""
    (tmp_path / "a.png").write_bytes(encoded(noise(9, 7)))
    assert decode_image(tmp_path / "a.png") == decode_image(encoded(noise(9, 7)))
    assert image_size(tmp_path / "a.png") == (7, 9)
    (tmp_path / "b.png").write_bytes(b"text")
    for read in (decode_image, image_size):
        with pytest.raises(BadImage, match=r"cannot be read \(No such file or directory\)"):
            read(tmp_path / "none.png")
        with pytest.raises(BadImage, match="unknown format"):
            read(tmp_path / "b.png")


def test_images_of_a_folder(tmp_path):
    """Whatever the case of the suffix; links are followed; hidden and other files are left out."""
    write_folder(tmp_path / "a", {"x/2.JPG": b"", "x/1.png": b"", "x/.3.png": b"", ".y/4.png": b"", "notes.txt": b""})
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "x")
    found = sorted(item.name for item in list_contents(tmp_path / "a").items)
    assert found == ["link/1.png", "link/2.JPG", "x/1.png", "x/2.JPG"]
