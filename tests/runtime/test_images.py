"""Odd but valid pictures are opened as upright RGB; anything else is one line that names the file."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.pictures.images import open_picture
from mcv_runtime.pictures.picture import slice_picture

RED, BLUE = (250, 10, 20), (0, 0, 255)


def two_colours(mode="RGB", size=(60, 40)):
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def near(pixel, colour, by=12):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= by


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def palette_with_transparency():
    picture = two_colours().quantize(4)
    picture.info["transparency"] = bytes([0, 255, 128, 7])
    return encoded(picture, "PNG", transparency=bytes([0, 255, 128, 7]))


@pytest.mark.parametrize(
    "data",
    [
        encoded(two_colours(), "PNG"),
        encoded(two_colours(), "JPEG", quality=95, subsampling=0),
        encoded(two_colours(), "WEBP", lossless=True),
        encoded(two_colours(), "BMP"),
        encoded(two_colours(), "TIFF"),
        encoded(two_colours("CMYK"), "JPEG", quality=95, subsampling=0),
        encoded(two_colours("CMYK"), "TIFF"),
        encoded(two_colours().quantize(4), "GIF"),
        encoded(two_colours("RGBA"), "PNG"),
        palette_with_transparency(),
    ],
    ids=["png", "jpeg", "webp", "bmp", "tiff", "cmyk-jpeg", "cmyk-tiff", "gif", "rgba", "palette-transparent"],
)
def test_kinds_of_files(data):
    picture = open_picture(data)
    assert (picture.mode, picture.size) == ("RGB", (60, 40))
    assert near(picture.getpixel((5, 20)), RED)
    assert near(picture.getpixel((55, 20)), BLUE)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(form):
    levels = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    picture = open_picture(encoded(Image.fromarray(levels), form))
    assert np.asarray(picture)[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize(("mode", "levels"), [("1", [0, 255]), ("L", [0, 255]), ("F", [0.0, 1.0]), ("I", [0, 65535])])
def test_grey_modes(mode, levels):
    picture = Image.new(mode, (2, 1))
    for x, level in enumerate(levels):
        picture.putpixel((x, 0), level)
    assert np.asarray(open_picture(picture))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"), [(1, (60, 40), (5, 20)), (3, (60, 40), (55, 20)), (6, (40, 60), (20, 5))]
)
def test_exif_orientation_is_applied(orientation, size, red_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(encoded(two_colours(), "JPEG", exif=exif, quality=95))
    assert picture.size == size
    assert near(picture.getpixel(red_at), RED)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_a_picture():
    data = encoded(two_colours(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_picture(data).size == (60, 40)


def test_transparency_is_dropped_not_blended():
    picture = Image.new("RGBA", (3, 3), (*RED, 0))
    assert open_picture(picture).getpixel((1, 1)) == RED


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 4)])
def test_arrays(shape):
    assert open_picture(np.zeros(shape, np.uint8)).size == (6, 4)


def test_a_given_picture_is_left_alone():
    given = two_colours("P")
    open_picture(given)
    assert given.mode == "P"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2000, 10), (10, 2000)])
def test_odd_shapes_can_be_sliced(size):
    sliced = slice_picture(two_colours(size=size), ImageSpec())
    assert [piece.size for piece in sliced.slices] == list(sliced.grid.sizes)


def test_absurdly_narrow_picture_is_refused():
    with pytest.raises(ImageError, match="too long and narrow"):
        slice_picture(Image.new("RGB", (60_000, 1)), ImageSpec())


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + bytes(4) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture", "not a picture"),
        (encoded(two_colours(size=(600, 400)), "PNG")[:700], "cannot be decoded"),
        (encoded(two_colours(size=(600, 400)), "JPEG")[:1500], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "EPS"),
        (png_header(9000, 9000), "too large"),
        (png_header(12000, 9000), "too large"),
        (png_header(65000, 65000), "too large"),
    ],
    ids=["empty", "text", "cut-png", "cut-jpeg", "eps", "81MP", "108MP", "4GP"],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, data, reason):
    path = tmp_path / "the picture.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        open_picture(path)
    assert "the picture.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["no/such/file.jpg", ".", "nul\0l.png", 5, np.zeros((2, 2, 3)), np.zeros((0, 2, 3), np.uint8)]
)
def test_what_is_no_picture(source):
    with pytest.raises(ImageError) as caught:
        open_picture(source)
    assert "\n" not in str(caught.value)


def test_the_limit_can_be_set():
    assert open_picture(two_colours(), max_pixels=2400).size == (60, 40)
    with pytest.raises(ImageError, match="2,399 pixels"):
        open_picture(two_colours(), max_pixels=2399)
    with pytest.raises(OptionError):
        open_picture(two_colours(), max_pixels=0)
