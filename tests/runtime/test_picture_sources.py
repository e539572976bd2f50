"""Where pictures come from: files and pipes, of formats that are decoded here; no device, no address, no other program."""

import os
import struct
import threading

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mcv_runtime.errors import ImageError
from mcv_runtime.pictures import images
from mcv_runtime.pictures.images import open_picture


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a script stands for Ghostscript")
def test_no_other_program_is_started(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    fields = {60: b"\1\0", 65: b"\0", 20: b"\0\x14", 30: b"\0\x14", 120: b"\5"}
    iptc = b"".join(struct.pack(">BBBH", 0x1C, 3, kind, len(value)) + value for kind, value in fields.items())
    for data in (eps, iptc + struct.pack(">BBBH", 0x1C, 8, 10, len(eps)) + eps):
        with pytest.raises(ImageError, match=r"is of the format (EPS|IPTC), which is not supported"):
            open_picture(data)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("data", "form"),
    [(b"8BPS\0\1", "PSD"), (b" <svg/>", "SVG")],
)
def test_what_is_not_supported_has_a_name(data, form):
    with pytest.raises(ImageError, match=f"of the format {form}, which is not supported; save it as PNG or JPEG"):
        open_picture(data)


def test_addresses_are_no_files():
    for address in ("https://example.org/a.png", "data:image/png;base64," + "A" * 9000, "file:///etc/hostname"):
        with pytest.raises(ImageError, match="is an address, not a file; download it first") as caught:
            open_picture(address)
        assert len(str(caught.value)) < 200


@pytest.mark.waits
def test_a_picture_through_a_pipe(tmp_path, monkeypatch):
    Image.effect_noise((300, 300), 50).save(tmp_path / "noise.png")
    data = (tmp_path / "noise.png").read_bytes()  # more than a pipe holds
    reading, writing = os.pipe()

    def write(number):
        with os.fdopen(number, "wb") as pipe:
            pipe.write(data)

    writer = threading.Thread(target=write, args=[writing])
    writer.start()
    assert open_picture(f"/dev/fd/{reading}").size == (300, 300)
    writer.join()
    os.close(reading)

    named = tmp_path / "pipe"
    os.mkfifo(named)
    writer = threading.Thread(target=named.write_bytes, args=[data])
    writer.start()
    assert open_picture(named).size == (300, 300)
    writer.join()
    monkeypatch.setattr(images, "_PIPE_PATIENCE_S", 0.05)
    with pytest.raises(ImageError, match="pipe through which nothing comes"):
        open_picture(named)


@pytest.mark.waits
def test_devices_and_endless_files(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="is a device, not a file"):
        open_picture("/dev/zero")
    monkeypatch.setattr(images, "_METADATA_BYTES", 1000)
    text = PngInfo()
    text.add_text("long", "a" * 30_000)
    Image.new("RGB", (60, 40)).save(tmp_path / "large.png", pnginfo=text)
    with pytest.raises(ImageError, match="at most 20,200 are read"):
        open_picture(tmp_path / "large.png", max_pixels=2400)
