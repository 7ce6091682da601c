"""Decoding: every kind of file comes out upright, in uint8, with the channels asked for."""

import importlib.resources
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from ijepa.data.decode import EncodedImage, ImageError
from ijepa.data.pillow_pixels import pillow_pixels

PHOTOS = Path(str(importlib.resources.files("sklearn"))) / "datasets" / "images"


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 160 x 107."""
    return Image.open(PHOTOS / "china.jpg").convert("RGB").resize((160, 107))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_agree_with_pillow(name, channels):
    data = (PHOTOS / name).read_bytes()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    image = EncodedImage(data, channels)
    pixels = image.decode()
    assert pixels.shape == (427, 640, channels) == (image.height, image.width, channels)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.squeeze().astype(int) - expected)
    assert difference.mean() < 0.5 and difference.max() < 40


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG"])
def test_formats(photo, kind):
    data = encode(photo, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    pixels = EncodedImage(data).decode()
    assert np.abs(pixels - expected).mean() < 0.5


def test_reduced_jpeg_is_the_smaller_photograph():
    data = (PHOTOS / "china.jpg").read_bytes()
    small = EncodedImage(data).decode(reduce=4)
    assert small.shape == (107, 160, 3)
    expected = np.asarray(Image.open(io.BytesIO(data)).reduce(4)).astype(int)
    assert np.abs(small - expected).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(photo, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    image = EncodedImage(data)
    assert (image.height, image.width) == upright.shape[:2]
    assert upright.shape[:2] == ((160, 107) if orientation >= 5 else (107, 160))
    pixels = image.decode()
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).mean() < 0.5
    if kind == "JPEG":
        height, width = upright.shape[:2]
        assert image.decode(reduce=2).shape == (-(-height // 2), -(-width // 2), 3)


def test_grayscale_jpeg(photo):
    gray = encode(photo.convert("L"), "JPEG", quality=95)
    color = EncodedImage(gray, 3).decode()
    assert color.shape == (107, 160, 3)
    assert (color[..., 0] == color[..., 1]).all() and (color[..., 0] == color[..., 2]).all()
    np.testing.assert_array_equal(EncodedImage(gray, 1).decode()[..., 0], color[..., 0])


def test_cmyk_jpeg_has_the_right_colours():
    red = Image.new("RGB", (32, 32), (250, 10, 20)).convert("CMYK")
    pixels = EncodedImage(encode(red, "JPEG")).decode()
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels.astype(int) - (250, 10, 20)).max() < 12
    assert EncodedImage(encode(red, "TIFF"), 1).decode().shape == (32, 32, 1)


def test_palette_and_bilevel(photo):
    palette = photo.quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(EncodedImage(encode(palette, "PNG")).decode(), expected)
    bilevel = photo.convert("1")
    expected = np.asarray(bilevel.convert("RGB"))
    np.testing.assert_array_equal(EncodedImage(encode(bilevel, "PNG")).decode(), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    image = Image.new("RGBA", (8, 8), (100, 100, 100, 255))
    image.paste((100, 100, 100, 0), (0, 0, 8, 4))
    if mode == "P":
        image = image.convert("P")
        data = encode(image, "PNG", transparency=bytes([0] + [255] * 255))
        index = np.asarray(image) == 0
        pixels = EncodedImage(data).decode()
        assert (pixels[index] == 255).all()
        return
    pixels = EncodedImage(encode(image.convert(mode), "PNG")).decode()
    assert (pixels[:4] == 255).all() and (pixels[4:] == 100).all()


def test_sixteen_bits_keep_their_range():
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        pixels = EncodedImage(encode(Image.fromarray(values), kind)).decode()
        assert pixels.shape == (64, 64, 3)
        np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257).astype(np.uint8))
    floats = (values / 65535).astype(np.float32)
    pixels = EncodedImage(encode(Image.fromarray(floats), "TIFF"), 1).decode()
    np.testing.assert_allclose(pixels[..., 0], floats * 255, atol=0.51)


def test_stray_bytes_are_forgiven(photo):
    """libjpeg-turbo's strict mode refuses bytes between segments; such files are common."""
    data = encode(photo, "JPEG")
    table = data.index(b"\xff\xdb")
    stray = data[:table] + b"\x00\x00" + data[table:]
    assert EncodedImage(stray).decode().shape == (107, 160, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files_raise_image_error(photo, kind, keep):
    data = encode(photo, kind)
    with pytest.raises(ImageError):
        EncodedImage(data[: int(len(data) * keep)]).decode()


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_rubbish_raises_image_error(data):
    with pytest.raises(ImageError):
        EncodedImage(data).decode()


def test_postscript_is_not_run(monkeypatch):
    """Pillow would start Ghostscript on it, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not an image that Pillow can read"):
        EncodedImage(data).decode()


def test_flipped_bytes_never_crash(photo):
    rng = np.random.default_rng()
    for kind in ("JPEG", "PNG"):
        data = np.frombuffer(encode(photo, kind), dtype=np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
            try:
                pixels = EncodedImage(damaged.tobytes(), max_pixels=10**6).decode()
            except ImageError:
                continue
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_bombs_are_refused_before_memory_is_taken(photo):
    with pytest.raises(ImageError, match="160x107 pixels, more than the limit of 17119"):
        EncodedImage(encode(photo, "JPEG"), max_pixels=160 * 107 - 1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    with pytest.raises(ImageError):
        EncodedImage(bomb)


def _damaged_tiff(photo) -> bytes:
    """LZW data in which libtiff meets a code that its table does not have."""
    data = bytearray(encode(photo, "TIFF", compression="tiff_lzw"))
    data[40:60] = b"\xff" * 20
    return bytes(data)


def test_decoders_say_nothing_on_the_terminal(photo, capfd, recwarn):
    with pytest.raises(ImageError):
        EncodedImage(_damaged_tiff(photo)).decode()
    palette = photo.quantize(8)
    palette.info["transparency"] = bytes(range(0, 256, 32))
    EncodedImage(encode(palette, "PNG")).decode()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(huge := io.BytesIO(), "PNG")
    header = bytearray(huge.getvalue())
    header[16:24] = struct.pack(">II", 10_000, 10_000)  # Pillow warns of a bomb
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    with pytest.raises(ImageError, match="10000x10000 pixels, more than the limit"):
        EncodedImage(bytes(header))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def with_chunk_last(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with a further chunk between its pixels and its end."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:-12] + chunk + png[-12:]


def test_opening_decodes_no_pixels(photo, monkeypatch):
    """256 images are open at once; for PNG, Pillow reads the pixels to get at the EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "plain": encode(photo, "PNG"),
        "exif before": encode(photo, "PNG", exif=exif),
        "exif after": with_chunk_last(encode(photo, "PNG"), b"eXIf", exif.tobytes()[6:]),
    }
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        opened = {name: EncodedImage(content) for name, content in data.items()}
    assert [(image.height, image.width) for image in opened.values()] == [
        (107, 160), (160, 107), (160, 107),
    ]  # fmt: skip
    upright = np.rot90(np.asarray(photo), 3)
    for name in ("exif before", "exif after"):
        np.testing.assert_array_equal(opened[name].decode(), upright)
        np.testing.assert_array_equal(opened[name].decode(), upright)  # and again


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16", "F", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bands_are_the_whole(photo, monkeypatch, mode, channels):
    if mode in ("I;16", "F"):
        values = np.asarray(photo)[..., 0].astype(np.uint16 if mode == "I;16" else np.float32)
        image = Image.fromarray(values * (200 if mode == "I;16" else 1))
    elif mode == "P":
        image = photo.quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16)) + bytes([255] * 240)
    else:
        image = photo.convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(photo.convert("L").rotate(90).resize(photo.size))
    whole = pillow_pixels(image, channels)
    monkeypatch.setattr("ijepa.data.pillow_pixels._BAND", 160 * 16)  # seven of them
    np.testing.assert_array_equal(pillow_pixels(image, channels), whole)
    monkeypatch.setattr("ijepa.data.pillow_pixels.LARGE", 1000)
    reduced = pillow_pixels(image, channels, reduce=4)
    assert reduced.shape == (27, 40, channels)
    picture = Image.fromarray(whole.squeeze()).reduce(4)
    np.testing.assert_array_equal(reduced.squeeze(), np.asarray(picture))


def test_small_images_are_not_reduced(photo):
    assert EncodedImage(encode(photo, "PNG")).decode(reduce=8).shape == (107, 160, 3)


MEMORY_OF_ONE = """
import resource, sys
from ijepa.data.decode import EncodedImage
data = open(sys.argv[1], "rb").read()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
before = peak()
image = EncodedImage(data)
pixels = image.decode(reduce=8)
assert pixels.shape == (875, 875, 3), pixels.shape
print(peak() - before)
"""


def test_one_image_costs_no_more_than_its_pixels_in_pillow(tmp_path):
    """49 million with alpha took 1.1 GB; Pillow's own pixels are 196 MB of it."""
    Image.new("RGBA", (7000, 7000), (10, 20, 30, 128)).save(tmp_path / "large.png")
    command = [sys.executable, "-c", MEMORY_OF_ONE, str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert float(done.stdout) < 300, done.stdout + done.stderr


def test_what_is_decoded_whole_has_a_lower_limit(monkeypatch, photo):
    monkeypatch.setattr("ijepa.data.decode.MAX_WHOLE_PIXELS", 160 * 107 - 1)
    with pytest.raises(ImageError, match="more than the limit of 17119: make it smaller or a JPEG"):
        EncodedImage(encode(photo, "PNG"))
    assert EncodedImage(encode(photo, "JPEG")).decode().shape == (107, 160, 3)
