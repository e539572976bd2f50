"""Videos as phones and strangers make them: shown as players show them, and nothing but the file itself is opened."""

import random
import socket
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.bundle.manifest import VideoSpec
from mcv_runtime.errors import ImageError, McvError, OptionError
from mcv_runtime.pictures import video_file
from mcv_runtime.pictures.video import Video, moments, plan_frames, plan_packs, plan_video

av = pytest.importorskip("av")
RED, BLUE, WHITE = (220, 20, 20), (20, 20, 220), (240, 240, 240)


def record(path, frames, *, codec="mpeg4", rate=5, times=None, aspect=None, **options):
    """A video of arrays [H, W, 3]; `times` in ticks of the rate."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(count, size=(64, 48)):
    return [np.full((size[1], size[0], 3), 10 * number % 250, np.uint8) for number in range(count)]


def noise(count, size=(160, 120)):
    dice = np.random.default_rng(0)
    return [dice.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8) for _ in range(count)]


def first_frame(path, **limits):
    return next(video_file.decode(path, [(0,)], **limits))[0]


def seen(path, **options):
    limits = {"max_num_frames": None, "stack_frames": None, **options}
    return [frame for moment in moments(Video(path), VideoSpec(), **limits) for frame in moment.frames]


@pytest.fixture
def clip(tmp_path):
    return record(tmp_path / "clip.mp4", greys(20))


CORNERS = np.full((96, 160, 3), WHITE, np.uint8)
CORNERS[:32, :48], CORNERS[:32, -48:] = RED, BLUE  # at the top, left and right


@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [  # (a, b, c, d) of ISO 14496-12: x' = a x + c y, y' = b x + d y; where the corners come to lie
        ((1, 0, 0, 1), "top left", "top right"),
        ((0, 1, -1, 0), "top right", "bottom right"),
        ((-1, 0, 0, -1), "bottom right", "bottom left"),
        ((0, -1, 1, 0), "bottom left", "top left"),
        ((-1, 0, 0, 1), "top right", "top left"),
        ((1, 0, 0, -1), "bottom left", "bottom right"),
        ((0, 1, 1, 0), "top left", "bottom left"),
        ((0, -1, -1, 0), "bottom right", "top right"),
    ],
)
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, matrix, red, blue):
    path = record(tmp_path / "phone.mp4", [CORNERS] * 4)
    data = bytearray(path.read_bytes())
    track = data.index(b"tkhd")
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(upright, track)
    a, b, c, d = (number << 16 for number in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = first_frame(path)
    assert frame.size == ((160, 96) if matrix[0] else (96, 160))
    for corner, colour in ((red, RED), (blue, BLUE)):
        x = 8 if "left" in corner else frame.width - 8
        y = 8 if "top" in corner else frame.height - 8
        assert np.abs(np.subtract(frame.getpixel((x, y)), colour)).max() < 40, corner


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(16, 11), (93, 48)), (Fraction(8, 9), (64, 54)), (Fraction(1), (64, 48))]
)
def test_pixels_are_made_square(tmp_path, aspect, size):
    assert first_frame(record(tmp_path / "dvd.mkv", greys(4), aspect=aspect)).size == size


def test_frames_at_odd_times_are_spread_by_their_own(tmp_path):
    """12 frames in 10 s, of which the header says 100 a second: all but two are seen, not one."""
    times = [round(number * 1000 / 12) for number in range(12)]
    path = record(tmp_path / "vfr.mkv", greys(12), rate=100, times=times)
    total, fps = video_file.probe(path)
    assert (total, fps) == (12, pytest.approx(12 / 9.18, rel=0.01))  # from the first to the end of the last
    assert len(seen(path)) == 10
    steady = record(tmp_path / "steady.mkv", greys(60), rate=30)
    assert video_file.probe(steady) == (60, 30.0)  # the header's own, not what rounded times make of it


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts", "a.flv", "a.mpg", "a.gif"])
def test_containers(tmp_path, name):
    codec = {"a.flv": "flv", "a.mpg": "mpeg1video", "a.gif": "gif"}.get(name, "mpeg4")
    if codec == "gif":
        frames = [Image.fromarray(pixels) for pixels in greys(10)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=40)
    else:
        record(tmp_path / name, greys(30), codec=codec, rate=25)
    total, fps = video_file.probe(tmp_path / name)
    assert (total, fps) == ((10 if codec == "gif" else 30), pytest.approx(25, rel=0.01))
    assert first_frame(tmp_path / name).getpixel((9, 9))[0] < 20


def test_neither_a_name_nor_a_content_leads_anywhere_else(tmp_path, monkeypatch, clip):
    """A listener on the loopback would be called, and the clip beside it read."""
    monkeypatch.chdir(tmp_path)
    record("clip.ts", greys(5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"
        contents = {
            "http.m3u8": playlist.format(f"http://{host}/a.ts"),
            "http.mp4": playlist.format(f"http://{host}/a.ts"),
            "file.m3u8": playlist.format(f"file://{tmp_path}/clip.ts"),
            "beside.m3u8": playlist.format("clip.ts"),
            "concat.mp4": "ffconcat version 1.0\nfile clip.mp4\n",
            "absolute.mp4": f"ffconcat version 1.0\nfile {clip}\n",
            "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
            "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet'
            f' mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>http://{host}/a.mp4</BaseURL>'
            "</Representation></AdaptationSet></Period></MPD>",
        }
        for name, content in contents.items():
            (tmp_path / name).write_text(content)
        addresses = [f"{scheme}://{host}/a.mp4" for scheme in ("http", "tcp", "ftp", "udp", "rtsp", "hls+http", "async:http")]
        local = ["concat:clip.ts|clip.ts", "file:clip.mp4", "subfile,,start,0,end,0,,:clip.mp4", "crypto:clip.mp4"]
        for name in (*contents, *addresses, *local, "/dev/zero", "%d.mp4", "."):
            with pytest.raises(ImageError) as caught:
                seen(name)
            assert "\n" not in str(caught.value)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert len(seen("clip.mp4")) == 4


def test_what_a_file_may_be(tmp_path, clip):
    data = clip.read_bytes()
    with pytest.raises(ImageError, match=r"https://example.org/a.mp4 is an address, not a file; download it first"):
        seen("https://example.org/a.mp4")
    for length in (0, 40, len(data) // 2):
        (tmp_path / "cut.mp4").write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut\.mp4 .*(cut off|damaged)"):
            seen(tmp_path / "cut.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match="has no pictures; it has only sound"):
        seen(tmp_path / "sound.mp4")


def test_no_cut_of_a_video_is_said_to_have_only_sound(tmp_path, clip):
    data = clip.read_bytes()
    for length in range(1, len(data), 23):
        (tmp_path / "cut.mp4").write_bytes(data[:length])
        try:
            assert len(seen(tmp_path / "cut.mp4")) == 4
        except ImageError as error:
            assert "sound" not in str(error)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.avi"])
def test_a_video_that_lacks_many_of_its_frames_is_refused(tmp_path, name):
    path = record(tmp_path / name, noise(60), options={"movflags": "faststart"} if name == "cut.mp4" else {})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ImageError, match="is cut off: it ends after"):
        seen(path)


@pytest.mark.parametrize(("scale", "rate", "length"), [(3600, 1, 2**31 - 1), (1, 5, 10**8), (1, 5, 6000), (10**6, 1, 30)])
def test_headers_that_promise_too_much(tmp_path, scale, rate, length):
    path = record(tmp_path / "bomb.avi", greys(30))
    data = bytearray(path.read_bytes())
    place = data.index(b"strh") + 8 + 20
    struct.pack_into("<2I", data, place, scale, rate)
    struct.pack_into("<I", data, place + 12, length)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"frames cannot be in|is cut off|lasts longer than 168 hours"):
        seen(path)


def test_frames_are_measured_before_they_are_decoded(tmp_path):
    path = record(tmp_path / "large.mp4", greys(3, (640, 480)))
    with pytest.raises(ImageError, match="640 x 480 is more than 300,000 pixels; shrink it or raise max_pixels"):
        seen(path, max_pixels=300_000)
    assert first_frame(path, max_pixels=640 * 480).size == (640, 480)
    with pytest.raises(ImageError, match="far more than 1,000 pixels"):  # which the decoder refuses to look at
        seen(record(tmp_path / "larger.mp4", greys(2, (1600, 1200))), max_pixels=1000)
    stretched = record(tmp_path / "stretched.mkv", greys(2), aspect=Fraction(20, 1))
    with pytest.raises(ImageError, match="1280 x 48 is more than 50,000 pixels"):
        seen(stretched, max_pixels=50_000)


def test_options_have_bounds(clip):
    for options in ({"stack_frames": 10**9}, {"max_num_frames": 10**9}, {"stack_frames": 0}, {"max_num_frames": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            seen(clip, **options)
    with pytest.raises(ImageError, match="the picture of 3 stacked frames is too large"):
        seen(clip, stack_frames=4, max_pixels=64 * 48)
    for fps in (1e-9, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="fps"):
            Video([Image.new("RGB", (9, 9))], fps=fps)


def test_a_week_is_planned_as_soon_as_a_minute():
    """Lists of its tenths of a second, or of all frames against all tenths, would take gigabytes."""
    total = 30 * 7 * 24 * 3600
    tenths = 10 * 7 * 24 * 3600
    assert plan_frames(total, 30.0, total / 30, 3, 1) == [(0,), (3 * ((tenths - 1) // 2),), (3 * (tenths - 1),)]
    units, times = plan_packs(total, 30.0, VideoSpec(strategy="packed"), 180, None, sample=True)
    assert sum(map(len, units)) == 540
    assert times[0][0] < times[-1][-1] < 7 * 24 * 3600 * 10


def test_a_plan_comes_before_any_picture(clip):
    plan = plan_video(Video(clip), VideoSpec(), max_num_frames=2)
    assert (len(plan.units), plan.size) == (2, (64, 48))
    assert [len(moment.frames) for moment in plan.moments()] == [1, 1]


def test_whoever_waits_may_stop_it(clip, tmp_path):
    class Enough(Exception):  # noqa: N818
        pass

    def check():
        raise Enough

    for path in (clip, record(tmp_path / "counted.mkv", greys(9))):
        with pytest.raises(Enough):
            list(moments(Video(path), VideoSpec(), max_num_frames=None, stack_frames=None, check=check))


@pytest.mark.fuzz
def test_no_damaged_video_escapes_as_another_error(tmp_path, drawn_seed):
    dice = random.Random(drawn_seed)
    seeds = [record(tmp_path / f"seed.{form}", greys(12)).read_bytes() for form in ("mp4", "mkv", "avi", "ts")]
    read, path = 0, tmp_path / "damaged.bin"
    for _ in range(120):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 2, 5, 20))):
            place = dice.randrange(min(len(data), dice.choice((64, 512, 10**9))))
            data[place] = dice.choice((0, 255, 127, dice.randrange(256)))
        path.write_bytes(data[: dice.choice((len(data), dice.randrange(len(data))))])
        try:
            read += len(seen(path, max_num_frames=16, max_pixels=100_000)) > 0
        except McvError as error:
            assert "\n" not in str(error)
    assert 10 < read < 110
