"""Pictures' files as people and strangers make them: metadata does no harm, damage is named, only pixels are decoded."""

import io
import logging
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.errors import ImageError, McvError
from mcv_runtime.pictures import formats, images, levels
from mcv_runtime.pictures.images import open_picture

RED, BLUE = (250, 10, 20), (0, 0, 255)


def two_colours(mode="RGB", size=(60, 40)):
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*before_pixels, picture=None):
    """A PNG with these chunks between its header and its pixels."""
    data = encoded(picture or two_colours(), "PNG")
    return data[:33] + b"".join(before_pixels) + data[33:]


def is_two_colours(picture):
    near = np.abs(np.asarray(picture, np.int16)[20, [5, 55]] - [RED, BLUE]).max()
    return picture.mode == "RGB" and picture.size == (60, 40) and near < 12


@pytest.mark.parametrize("offset", range(0, 100, 7))
def test_damaged_pixels_of_a_png_are_no_picture(offset):
    data = bytearray(encoded(Image.effect_noise((64, 64), 50), "PNG"))
    data[data.index(b"IDAT") + 10 + offset] ^= 0x20
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_picture(bytes(data))


def test_a_png_whose_checksums_are_right_and_whose_pixels_are_not():
    data = encoded(Image.effect_noise((64, 64), 50), "PNG")
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4])
    content = bytearray(data[start + 8 : start + 8 + length])
    content[length // 2] ^= 0x55
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_picture(data[:start] + chunk(b"IDAT", bytes(content)) + data[start + 12 + length :])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "PCX", "SGI", "TGA"])
@pytest.mark.parametrize("given", ["bytes", "image"])
def test_half_a_picture_is_none(form, given):
    noise = Image.effect_noise((90, 90), 60)
    data = encoded(noise if form in ("PCX", "SGI", "TGA") else noise.convert("RGB"), form)[:2500]
    with pytest.raises(ImageError):
        open_picture(data if given == "bytes" or form in ("AVIF", "WEBP") else Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("kind", [b"tEXt", b"gAMA", b"iCCP", b"eXIf", b"tRNS", b"sBIT", b"abCd"])
def test_a_chunk_that_nobody_needs_may_be_damaged(kind):
    assert is_two_colours(open_picture(png(chunk(kind, b"nonsense\0", checksum=1))))
    assert is_two_colours(open_picture(png(chunk(kind, b"\0"))))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 90,
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_large_metadata_of_a_png_does_not_matter(metadata):
    assert is_two_colours(open_picture(png(metadata)))


def test_chunks_that_pixels_need_are_whole_and_known():
    for kind in (b"IHDR", b"IDAT"):
        data = bytearray(png())
        data[data.index(kind) - 4 + 8 + int.from_bytes(data[data.index(kind) - 4 : data.index(kind)])] ^= 1
        with pytest.raises(ImageError, match=f"chunk {kind.decode()} is damaged"):
            open_picture(bytes(data))
    with pytest.raises(ImageError, match="no standard PNG"):
        open_picture(png(chunk(b"CgBI", b"")))


def exif(orientation, odd):
    """EXIF with an orientation and a resolution of an odd kind: type, count, and its four bytes or what they point to."""
    kind, count, value = odd
    inline = value if len(value) == 4 else struct.pack("<I", 38)
    entries = struct.pack("<HHIHxx", 0x0112, 3, 1, orientation) + struct.pack("<HHI", 0x011A, kind, count) + inline
    return b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + (value if len(value) != 4 else b"")


ODD_TAGS = {
    "text": (2, 4, b"72 \0"),
    "negative rational": (10, 1, struct.pack("<ii", -1, 0)),
    "not a number": (12, 1, struct.pack("<d", float("nan"))),
    "points nowhere": (5, 1, b"\xff\xff\xff\xff"),
    "unknown type": (99, 7, b"abcd"),
    "very many": (5, 0x7FFFFFFF, b"abcd"),
}


@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_an_odd_tag_does_not_spoil_an_upright_picture(form, odd):
    sideways = two_colours(size=(40, 60)).transpose(Image.Transpose.ROTATE_90)
    block = exif(6, odd)
    if form == "TIFF":
        data = tiff(sideways, extra=[(274, 3, 1, struct.pack("<HH", 6, 0)), (282, *odd[:2], odd[2][:4])])
    elif form == "PNG":
        data = png(chunk(b"eXIf", block), picture=sideways)
    elif form == "AVIF":  # Pillow would not write it
        sound = Image.Exif()
        sound[0x010F] = "a maker with a long name, " * 4
        data = encoded(sideways, form, exif=sound)
        place = data.index(b"MM\0*")
        data = data[:place] + block + data[place + len(block) :]
    else:
        data = encoded(sideways, form, exif=b"Exif\0\0" + block, quality=95)
    picture = open_picture(data)
    expected = Image.Transpose.ROTATE_270 if form != "AVIF" else None  # there, EXIF does not turn: the container would
    assert picture.size == ((40, 60) if expected else (60, 40))
    if expected:
        assert np.abs(np.asarray(picture, np.int16)[30, [5, 35]] - [RED, BLUE]).max() < 25


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF", "PNG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format(form, orientation):
    upright = Image.fromarray(np.random.default_rng(3).integers(0, 4, (6, 4, 3)).astype(np.uint8) * 80).resize((32, 48), 0)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes it
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation in back else upright
    block = Image.Exif()
    block[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form in ("JPEG", "AVIF") else {}
    difference = np.asarray(open_picture(encoded(stored, form, exif=block, **options)), np.int16) - np.asarray(upright)
    assert np.abs(difference).mean() < (12 if form in ("JPEG", "AVIF") else 1e-9)


def test_orientation_in_xmp_counts_where_exif_has_none():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for form in ("JPEG", "WEBP"):
        assert open_picture(encoded(two_colours(), form, xmp=xmp)).size == (40, 60)


def tiff(picture, extra=(), thumbnail=False, photometric=2):
    """A TIFF of one uncompressed RGB picture."""
    pixels = picture.tobytes()
    width, height = picture.size
    fields = [
        (254, 4, 1, struct.pack("<I", int(thumbnail))),
        (256, 4, 1, struct.pack("<I", width)),
        (257, 4, 1, struct.pack("<I", height)),
        (258, 3, 3, struct.pack("<I", 8)),
        (259, 3, 1, struct.pack("<HH", 1, 0)),
        (262, 3, 1, struct.pack("<HH", photometric, 0)),
        (273, 4, 1, struct.pack("<I", 14)),
        (277, 3, 1, struct.pack("<HH", 3, 0)),
        (278, 4, 1, struct.pack("<I", height)),
        (279, 4, 1, struct.pack("<I", len(pixels))),
        *extra,
    ]
    entries = b"".join(struct.pack("<HHI", *field[:3]) + field[3] for field in sorted(fields))
    head = b"II*\0" + struct.pack("<I", 14 + len(pixels)) + struct.pack("<3H", 8, 8, 8) + pixels
    return head + struct.pack("<H", len(fields)) + entries + bytes(4)


def camera_file(photometric):
    """Laid out as cameras do it: a thumbnail first, the photo in a directory inside its own."""
    thumbnail = Image.new("RGB", (12, 8), "green")
    photo = two_colours()
    shell = tiff(thumbnail, extra=[(330, 4, 1, b"????")], thumbnail=True)
    inner = tiff(photo, photometric=photometric)
    base = len(shell)
    moved = bytearray(inner)
    directory = int.from_bytes(inner[4:8], "little")
    for place in range(directory + 2, directory + 2 + 12 * 10, 12):
        tag = int.from_bytes(inner[place : place + 2], "little")
        if tag in (258, 273):
            old = int.from_bytes(inner[place + 8 : place + 12], "little")
            moved[place + 8 : place + 12] = struct.pack("<I", old + base)
    shell = bytearray(shell)
    place = shell.index(struct.pack("<HHI", 330, 4, 1)) + 8
    shell[place : place + 4] = struct.pack("<I", base + directory)
    return bytes(shell + moved)


def test_the_photo_behind_a_thumbnail_is_read_or_refused():
    assert is_two_colours(open_picture(camera_file(photometric=2)))
    for raw in (32803, 34892):
        with pytest.raises(ImageError, match="raw photo, which is not supported"):
            open_picture(camera_file(photometric=raw))


def test_more_than_one_page_or_frame_is_said(caplog):
    pages = [two_colours(), Image.new("RGB", (60, 40), "white")]
    for form, word in {"TIFF": "pages", "GIF": "frames", "PNG": "frames", "WEBP": "frames", "AVIF": "frames"}.items():
        caplog.clear()
        options = {"lossless": True} if form == "WEBP" else {}
        assert is_two_colours(open_picture(encoded(pages[0], form, save_all=True, append_images=pages[1:], **options)))
        assert [record.getMessage() for record in caplog.records] == [
            f"the given bytes has several {word}; only the first is read (a Document has all)"
        ]
        caplog.clear()
        open_picture(encoded(pages[0], form))
        assert not caplog.records


def test_one_colour_under_transparency_is_said(caplog):
    drawing = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (10, 10, 20, 20))
    palette = drawing.convert("LA").convert("L").quantize(2)
    for given in (
        drawing,
        encoded(drawing, "PNG"),
        encoded(drawing.convert("LA"), "PNG"),
        encoded(palette, "PNG", transparency=0),
    ):
        caplog.clear()
        assert open_picture(given).getpixel((0, 0)) == (0, 0, 0)
        assert "put it on a background first" in caplog.text
    caplog.clear()
    open_picture(Image.new("RGBA", (9, 9), (0, 0, 0, 255)))
    open_picture(two_colours("RGBA"))
    assert not caplog.records


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_deep_grey_is_scaled_by_its_depth(bits, form):
    levels_ = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16)[None].repeat(3, axis=0)
    assert np.asarray(open_picture(encoded(Image.fromarray(levels_), form)))[0, :, 1].tolist() == list(range(256))


def deep_png(pixels, colour_type):
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (4, 6), (2, 4)])
def test_12_bits_of_colour_in_16_are_not_black(channels, colour_type):
    ramp = np.linspace(0, 4095, 256).astype(np.uint16)
    pixels = np.full((2, 256, channels), 4095, np.uint16)
    pixels[..., : max(channels - 1, 1) if channels in (2, 4) else channels] = ramp[:, None]
    seen = np.asarray(open_picture(deep_png(pixels, colour_type)), np.int16)[0, :, 0]
    assert np.abs(seen - np.arange(256)).max() <= (0 if channels > 2 else 16)  # of grey with alpha, Pillow reads half
    bright = np.full((2, 2, channels), 40_000, np.uint16)
    assert np.asarray(open_picture(deep_png(bright, colour_type)))[0, 0, 0] == 40_000 >> 8  # as the published code


def test_12_bits_of_colour_in_a_tiff():
    pixels = np.linspace(0, 4095, 256).round().astype("<u2")[None, :, None].repeat(3, axis=2)
    data = tiff(Image.new("RGB", (256, 1)))
    start = 14 + 256 * 3
    numbers = {279: 256 * 6, 273: len(data)}
    data = bytearray(data)
    data[8:14] = struct.pack("<3H", 16, 16, 16)
    for tag, number in numbers.items():
        place = data.index(struct.pack("<H", tag), start)
        data[place + 8 : place + 12] = struct.pack("<I", number)
    seen = np.asarray(open_picture(bytes(data) + pixels.tobytes()))[0, :, 2]
    assert seen.tolist() == list(range(256))


def test_scaling_in_bands_changes_nothing(monkeypatch):
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (37, 50)).astype(np.uint16))
    whole = np.asarray(levels.to_rgb(deep))
    monkeypatch.setattr(levels, "_BAND_PIXELS", 120)
    assert (np.asarray(levels.to_rgb(deep)) == whole).all()


@pytest.mark.parametrize("form", [form for form in formats.FORMATS if form not in ("DIB",)])
def test_the_limit_is_the_callers_and_not_pillows(form, monkeypatch):
    data = encoded(two_colours(), form, **({"sizes": [(60, 40)]} if form == "ICO" else {}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # with which Pillow warns above 100 pixels and refuses 200
    assert open_picture(data, max_pixels=2400).size == (60, 40)
    with pytest.raises(ImageError, match=r"60 x 40 is more than 2,399 pixels; shrink it or raise max_pixels"):
        open_picture(data, max_pixels=2399)
    assert Image.MAX_IMAGE_PIXELS == 100


def icon(inner, declared=(20, 20)):
    return struct.pack("<3H4B2H2I", 0, 1, 1, *declared, 0, 0, 1, 32, len(inner), 22) + inner


def test_sizes_that_are_not_the_headers():
    large = encoded(Image.new("L", (900, 800)), "PNG")
    jpeg2000 = bytearray(encoded(Image.new("L", (900, 800)), "JPEG2000"))
    place = jpeg2000.index(b"ihdr") + 4
    jpeg2000[place : place + 8] = struct.pack(">II", 20, 20)
    for data in (icon(large), bytes(jpeg2000), encoded(Image.new("L", (900, 800)), "WEBP")):
        with pytest.raises(ImageError, match="900 x 800 is more than 500,000 pixels"):
            open_picture(data, max_pixels=500_000)


@pytest.mark.parametrize("form", ["png", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_icons(form, mode):
    data = encoded(two_colours(mode, (32, 32)), "ICO", bitmap_format=form, sizes=[(16, 16), (32, 32)])
    seen = np.asarray(open_picture(data), np.int16)
    assert seen.shape == (32, 32, 3)
    assert np.abs(seen[16, [4, 28]] - [RED, BLUE]).max() < 21  # Pillow's own palette


def test_icons_that_hold_icons():
    for inner in (icon(encoded(two_colours(), "PNG")), b"", b"\0\0\1\0" * 9):
        with pytest.raises(ImageError):
            open_picture(icon(inner))


@pytest.mark.fuzz
def test_no_damaged_picture_escapes_as_another_error(caplog, drawn_seed):
    caplog.set_level(logging.CRITICAL)
    dice = random.Random(drawn_seed)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8))
    seeds = [encoded(noise.convert(mode), form) for form in formats.FORMATS for mode in ("RGB", "L") if form != "DIB"]
    seeds += [
        camera_file(2),
        icon(encoded(noise, "PNG")),
        encoded(noise.convert("P"), "PNG"),
        encoded(noise.convert("I"), "TIFF"),
    ]
    read = 0
    for _ in range(1500):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 2, 3, 8, 30))):
            place = dice.randrange(min(len(data), dice.choice((32, 128, 10**9))))
            data[place] = dice.choice((0, 255, 127, 128, dice.randrange(256)))
        if dice.random() < 0.25:
            del data[dice.randrange(len(data)) :]
        try:
            read += open_picture(bytes(data), 4_000_000).mode == "RGB"
        except McvError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 400
    assert 100 < read < 1400


def test_sizes_before_pixels(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "photo.jpg").write_bytes(encoded(two_colours(), "JPEG", exif=turned))
    assert images.picture_size(tmp_path / "photo.jpg") == open_picture(tmp_path / "photo.jpg").size == (40, 60)
    assert images.picture_size(two_colours()) == images.picture_size(np.zeros((40, 60), np.uint8)) == (60, 40)
    cut = encoded(Image.effect_noise((90, 80), 50), "PNG")[:900]
    assert images.picture_size(cut) == (90, 80)  # the header is all that is looked at
    with pytest.raises(ImageError, match="90 x 80 is more than 7,000 pixels"):
        images.picture_size(cut, 7000)
