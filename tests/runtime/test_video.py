"""Which frames of a video become which pictures; expected values follow the published processor's rules by hand."""

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.bundle.manifest import VideoSpec
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.pictures.video import Video, moments, plan_frames, tile


def pictures(video, max_num_frames=128, stack_frames=None):
    for moment in moments(video, VideoSpec(), max_num_frames=max_num_frames, stack_frames=stack_frames):
        yield from moment.frames


def test_one_frame_a_second():
    assert plan_frames(8, 1.0, 8.0, 128, 1) == [(i,) for i in range(8)]
    assert plan_frames(100, 29.97, 100 / 29.97, 128, 1) == [(0,), (29,), (59,), (89,)]


def test_strides_of_a_rounded_rate():
    """`encode_video` of the model card of MiniCPM-V 2.6: every round(fps)-th frame, thinned from the middle of each part."""
    assert plan_frames(100, 29.97, 100 / 29.97, 64, 1, strided=True) == [(0,), (30,), (60,), (90,)]
    assert plan_frames(8, 0.4, 20.0, 64, 1, strided=True) == [(i,) for i in range(8)]
    assert plan_frames(300, 25.0, 12.0, 4, 1, strided=True) == [(25,), (100,), (175,), (250,)]  # 1, 4, 7, 10 of 12
    assert plan_frames(10, 2.5, 4.0, 64, 1, strided=True) == [(0,), (2,), (4,), (6,), (8,)]  # halves are rounded to even


def test_a_long_video_is_thinned_evenly():
    units = plan_frames(300, 1.0, 300.0, 4, 1)
    assert units == [(0,), (99,), (199,), (299,)]  # of 3000 tenths of a second: 0, 999, 1999, 2999


def test_stacked_frames_follow_their_second():
    assert plan_frames(8, 4.0, 2.0, 128, 3) == [(0,), (1, 2), (4,), (5, 6)]
    assert plan_frames(5, 4.0, 1.25, 128, 4) == [(0,), (1, 2, 3), (4,)]  # nothing after the end


def shades(count, size=(40, 30)):
    return [Image.new("RGB", size, (10 * i + 5,) * 3) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "size", "canvas"),
    [
        (1, (40, 30), (40, 30)),
        (2, (40, 30), (40, 66)),
        (2, (30, 40), (66, 40)),
        (2, (40, 40), (40, 86)),
        (3, (40, 30), (40, 102)),
        (3, (30, 90), (102, 90)),
        (4, (40, 30), (86, 66)),
        (5, (40, 30), (224, 30)),
    ],
)
def test_tiles(count, size, canvas):
    assert tile(shades(count, size)).size == canvas


def test_lines_between_tiles_are_black():
    pixels = np.asarray(tile(shades(4)))[..., 0]
    assert pixels[[0, 0, 36, 36], [0, 46, 0, 46]].tolist() == [5, 15, 25, 35]
    assert not pixels[30:36].any()
    assert not pixels[:, 40:46].any()


def test_frames_of_a_list():
    taken = list(pictures(Video(shades(6), fps=2.0), max_num_frames=128))
    assert [frame.getpixel((0, 0))[0] for frame in taken] == [5, 25, 45]


def test_frames_of_a_file(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    taken = list(pictures(Video(path), max_num_frames=128, stack_frames=2))
    levels = [picture.getpixel((0, 0))[0] for picture in taken]
    assert levels == pytest.approx([0, 40, 80, 120, 160, 200], abs=8)  # frames 0, 2, 4, ...: main and stacked in turn


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_what_is_no_video(tmp_path, content):
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"clip\.mp4"):
        list(pictures(Video(path), max_num_frames=4))
    with pytest.raises(ImageError, match="none"):
        list(pictures(Video(tmp_path / "none.mp4"), max_num_frames=4))


def test_mistakes():
    with pytest.raises(ImageError, match="no frames"):
        Video([])
    with pytest.raises(OptionError, match="fps"):
        Video(shades(2), fps=0)
    with pytest.raises(OptionError, match="max_num_frames"):
        list(pictures(Video(shades(2)), max_num_frames=0))
    with pytest.raises(ImageError, match="differ in size"):
        tile([*shades(1), *shades(1, (9, 9))])
