"""Read pictures and videos that were made to reach out, watched by strace and a listener: no other file, no packet, no program.

    python benchmarks/reaching_out.py [--count 500] [--out benchmarks/results/reaching-out.json]

Playlists, concatenations, session descriptions and external tracks under the names of videos; PostScript, IPTC, SVG and the
like under those of pictures; and names that are addresses. What each of them names is there: a video beside them, a secret
file, and a server on this machine. Needs strace, so Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image

WATCHED = (
    "open,openat,openat2,creat,execve,execveat,fork,vfork,connect,socket,sendto,sendmsg,bind,unlink,rename,symlink,link,mkdir"
)
MARK = "/mcv-begins-with-file-"
"""Asked for, and not there, before each file is read."""
_QUIET = re.compile(r'"(/proc/|/sys/|/dev/(null|urandom)|/etc/(localtime|ld\.so))|\.(py|pyc|so[.0-9]*|pth|zip)"|__pycache__')
"""What an interpreter opens when it imports something or asks about the machine."""
_CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)")
READER = f"""
import os, sys
from mcv_runtime import McvError
from mcv_runtime.bundle.manifest import ImageSpec, VideoSpec
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.pictures.video import Video, moments
ends = {{}}
for warm in range(2):  # what is imported when it is needed is imported first
    for number, path in enumerate(open(sys.argv[1]).read().split("\\0")):
        if warm:
            try:
                os.stat({MARK!r} + str(number))
            except OSError:
                pass
        picture = lambda: slice_picture(path, ImageSpec())
        for read in (picture, lambda: list(moments(Video(path), VideoSpec(), max_num_frames=8, stack_frames=2))):
            try:
                read()
                end = "read"
            except McvError:
                end = "refused"
            if warm:
                ends[end] = ends.get(end, 0) + 1
os.write(1, repr(ends).encode())
"""


def targets(folder: Path, port: int) -> dict[str, str]:
    """What a file may want to open: each is there."""
    secret = folder / "secret" / "secret.ts"
    web = {scheme: f"{scheme}://127.0.0.1:{port}/reached" for scheme in ("http", "tcp", "udp", "rtsp", "ftp", "rtp", "https")}
    names = {scheme: f"{scheme}:{secret}" for scheme in ("file", "crypto", "async", "cache", "concat")}
    return web | names | {"absolute": str(secret), "relative": "beside.ts", "upwards": "../secret/secret.ts", "pipe": "pipe:0"}


def contents(target: str, clip: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that name `target`, each in a language of its own."""
    yield "hls", f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n".encode()
    yield "hls-key", f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n'.encode()
    yield "hls-map", f'#EXTM3U\n#EXT-X-MAP:URI="{target}"\n#EXTINF:5,\n{target}\n'.encode()
    yield "ffconcat", f"ffconcat version 1.0\nfile '{target}'\n".encode()
    yield "sdp", f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={target}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n".encode()
    yield "dash", _dash(target)
    yield "playlist", f"[playlist]\nFile1={target}\nNumberOfEntries=1\n".encode()
    yield "asx", f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>'.encode()
    yield "quicktime", _quicktime(target, clip)
    yield "avi-beside", b"RIFF" + struct.pack("<I", len(target) + 4) + b"AVI LIST" + target.encode()
    yield "svg", f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{target}"/></svg>'.encode()
    yield "eps", f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) (r) file\n".encode()
    yield "iptc", b"\x1c\x03<\0\x02\x01\x01" + f"%!PS\n({target}) run\n".encode()
    yield "pdf", f"%PDF-1.4\n1 0 obj <</F ({target}) /Type /Filespec>> endobj\n".encode()
    yield "msl", f'<?xml version="1.0"?><image><read filename="{target}"/></image>'.encode()
    yield "mvg", f"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 0,0 '{target}'\n".encode()
    yield "xbm-name", f"#define a_width 9\n#define {target}\n".encode()
    yield "png", _png(target)
    yield "mkv-link", clip[:40] + target.encode() + clip[40:]


def _dash(target: str) -> bytes:
    track = f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    period = f'<Period><AdaptationSet mimeType="video/mp4">{track}</AdaptationSet></Period>'
    return f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011">{period}</MPD>'.encode()


def _quicktime(target: str, clip: bytes) -> bytes:
    """A film whose track lies elsewhere: its data reference says `url ` and is not the file itself."""
    place = clip.find(b"url \0\0\0\1")
    text = target.encode() + b"\0"
    return clip[: place + 4] + b"\0\0\0\0" + text + clip[place + 8 :] if place > 0 else clip + text


def _png(target: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("XML:com.adobe.xmp", f"<x:xmpmeta><stRef:filePath>{target}</stRef:filePath></x:xmpmeta>")
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG", pnginfo=about)
    return file.getvalue()


def record(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * shade, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def make(folder: Path, port: int, count: int) -> list[str]:
    """The paths of so many files, and names that are no files; their targets are made too."""
    (folder / "secret").mkdir()
    (folder / "made").mkdir()
    record(folder / "secret" / "secret.ts")
    shutil.copy(folder / "secret" / "secret.ts", folder / "made" / "beside.ts")
    clip = record(folder / "clip.mp4")
    aims = targets(folder, port)
    names = [target for aim, target in aims.items() if aim not in ("absolute", "relative", "upwards")]  # no user's own
    names += [f"concat:{aims['absolute']}|{aims['absolute']}", f"subfile,,start,0,end,0,,:{aims['absolute']}"]
    endings = ("mp4", "avi", "mkv", "ts", "jpg", "png", "m3u8", "gif", "webp", "tif")
    made = [(aim, *one, ending) for aim, target in aims.items() for one in contents(target, clip) for ending in endings]
    for number, (aim, language, data, ending) in enumerate(Random(0).sample(made, count - len(names))):
        path = folder / "made" / f"{number:04}-{language}-{aim}.{ending}"
        path.write_bytes(data)
        names.append(str(path))
    return names


class Listener:
    """Counts what arrives at a port of this machine, over TCP and UDP."""

    def __init__(self) -> None:
        self.arrived = 0
        self._tcp, self._udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self._tcp.getsockname()[1]
        self._udp.bind(("127.0.0.1", self.port))
        for waiting in (self._tcp.accept, lambda: self._udp.recv(100)):
            threading.Thread(target=self._count, args=(waiting,), daemon=True).start()

    def _count(self, wait: Callable[[], object]) -> None:
        while True:
            wait()
            self.arrived += 1


def calls(trace: str, names: list[str]) -> list[str]:
    """The calls that a reader of these files should not have made."""
    wrong, current = [], -1
    for line in trace.splitlines():
        if MARK in line:
            current += 1
        found = _CALL.match(line)
        if current < 0 or found is None:
            continue
        name, arguments = found.groups()
        if name in ("stat", "newfstatat"):  # the marks
            continue
        reading = name in ("open", "openat", "openat2") and "O_WRONLY" not in arguments and "O_CREAT" not in arguments
        if reading and (json.dumps(names[current]) in arguments or _QUIET.search(arguments)):
            continue
        wrong.append(f"{names[current]}: {line[:300]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    if shutil.which("strace") is None:
        parser.error("strace is not installed")
    listener, began = Listener(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        names = make(folder, listener.port, wanted.count)
        (folder / "names").write_text("\0".join(names), encoding="utf-8")
        watch = ["strace", "-f", "-qq", "-s", "400", "-o", str(folder / "trace"), "-e", f"trace={WATCHED},stat,newfstatat"]
        reader = [sys.executable, "-c", READER, str(folder / "names")]
        done = subprocess.run([*watch, *reader], cwd=folder / "made", capture_output=True, text=True, stdin=subprocess.DEVNULL)
        trace = (folder / "trace").read_text(encoding="utf-8", errors="replace")
    marks = trace.count(MARK)
    wrong = calls(trace, names)
    said = {"files": len(names), "read": marks, "ends": done.stdout, "packets": listener.arrived, "wrong": wrong[:50]}
    said |= {"seconds": round(time.monotonic() - began)}
    print(json.dumps(said, indent=2), done.stderr[-2000:])
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong or listener.arrived or marks != len(names) or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
