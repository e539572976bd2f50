"""Samples of a folder and the built-in ones: what is taken, what is skipped, and what is refused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcv_calibration.drawn import KINDS, SIZES
from mcv_calibration.samples import (
    ENOUGH,
    QUESTIONS,
    SampleSet,
    builtin_samples,
    calibrating_part,
    folder_samples,
    unseen,
    with_drawn,
)
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.pictures.images import open_picture


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, some in a subfolder, among files that are none."""
    folder = tmp_path / "pictures"
    for number in range(10):
        picture(folder / ("sub" if number > 6 else "") / f"{number}.{'PNG' if number % 2 else 'jpg'}", number)
    (folder / "notes.txt").write_text("no picture")
    picture(folder / ".thumbnails" / "hidden.png")
    return folder


def names(samples: object) -> list[str]:
    return [Path(sample.images[0]).name for sample in samples.samples]  # type: ignore[attr-defined]


def own(samples: SampleSet) -> SampleSet:
    """Without those drawn beside them."""
    return replace(samples, samples=tuple(sample for sample in samples.samples if not sample.overview))


def test_all_pictures_with_questions_in_turn(folder: Path) -> None:
    found = folder_samples(folder)
    assert names(found) == [f"{n}.{'PNG' if n % 2 else 'jpg'}" for n in range(10)]
    assert [sample.prompt for sample in found.samples] == [QUESTIONS[n % len(QUESTIONS)] for n in range(10)]
    assert found.skipped == ()
    assert found.describe() == f"10 samples from {folder}"


def test_fewer_are_spread_over_the_folder(folder: Path) -> None:
    assert names(folder_samples(folder, count=4)) == ["0.jpg", "2.jpg", "5.PNG", "7.PNG"]
    assert folder_samples(folder, count=4).content_hash() == folder_samples(folder, count=4).content_hash()


def test_broken_files_are_skipped_and_named(folder: Path) -> None:
    (folder / "0.jpg").write_bytes(b"no picture at all")
    (folder / "2.jpg").write_bytes(b"")
    (folder / "5.PNG").write_bytes((folder / "5.PNG").read_bytes()[:300])
    found = folder_samples(folder, count=4)
    assert names(found) == ["7.PNG", "1.PNG", "3.PNG", "4.jpg"]  # others take their places
    assert [text.split()[0] for text in found.skipped] == ["0.jpg", "2.jpg", "5.PNG"]
    assert "3 skipped (0.jpg is not a picture" in found.describe()
    assert "\n" not in found.describe()


def test_questions_of_a_text_file(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffWhat?\n\n  图里有什么？ \n", encoding="utf-8")
    assert [sample.prompt for sample in folder_samples(folder, prompts, 3).samples] == ["What?", "图里有什么？", "What?"]


def test_rows_with_pictures_and_answers(folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "beside.png")
    rows = [
        {"image": "beside.png", "prompt": "What?", "answer": "noise"},
        {"images": ["0.jpg", "sub/7.PNG"], "prompt": "Which?"},
        {"image": "nowhere.png", "prompt": "Where?"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = folder_samples(folder, prompts)
    assert [(sample.prompt, sample.answer) for sample in found.samples] == [("What?", "noise"), ("Which?", None)]
    assert found.samples[0].images == (tmp_path / "beside.png",)
    assert found.samples[1].images == (folder / "0.jpg", folder / "sub" / "7.PNG")
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("nowhere.png cannot be read")


@pytest.mark.parametrize("row", ["{", "[]", '{"prompt": "a"}', '{"image": 3, "prompt": "a"}', '{"image": "0.jpg"}', "1"])
def test_a_malformed_row_is_named(row: str, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"image": "0.jpg", "prompt": "a"}\n' + row)
    with pytest.raises(OptionError, match=r"line 2 of .*prompts.jsonl is not"):
        folder_samples(folder, prompts)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_that_are_empty_or_missing(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        folder_samples(folder, tmp_path / name)
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(OptionError, match="write"):
        folder_samples(folder, tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="not UTF-8"):
        folder_samples(folder, tmp_path / name)


def test_folders_without_use(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nowhere is not a folder; give one"):
        folder_samples(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("nothing")
    with pytest.raises(OptionError, match="empty holds no pictures; put some there"):
        folder_samples(empty)
    (empty / "a.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"no picture that can be opened \(a.png is not a picture"):
        folder_samples(empty)
    with pytest.raises(OptionError, match="at least 1"):
        folder_samples(folder, count=0)


def test_a_single_grey_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="from which no ranges can be told; add real ones"):
        folder_samples(tmp_path)
    Image.new("L", (64, 64), 200).save(tmp_path / "b.jpg")
    with pytest.raises(ImageError, match="no ranges"):
        folder_samples(tmp_path)
    picture(tmp_path / "real.png")
    found = folder_samples(tmp_path)
    assert names(found) == ["real.png"]
    assert found.skipped == ("a.png spans no more than 32 of 256 levels", "b.jpg spans no more than 32 of 256 levels")


def test_the_hash_is_of_content(folder: Path) -> None:
    before = folder_samples(folder).content_hash()
    moved = folder.rename(folder.with_name("moved"))
    assert folder_samples(moved).content_hash() == before
    picture(moved / "3.PNG", seed=99)
    assert folder_samples(moved).content_hash() != before


def test_built_in_samples_are_varied_and_repeatable() -> None:
    found = builtin_samples(26)
    pictures = [open_picture(sample.images[0]) for sample in found.samples]
    assert len({image.size for image in pictures}) >= 10
    assert {image.size for image in pictures} <= set(SIZES)
    means = [np.asarray(image).mean() for image in pictures]
    assert min(means) < 40
    assert max(means) > 200
    assert all(np.asarray(image).std() > 4 for image in pictures)
    assert any(sample.prompt.isascii() for sample in found.samples)
    assert any(not sample.prompt.isascii() for sample in found.samples)
    assert len(found.samples) >= 2 * len(KINDS)
    again, other = builtin_samples(4), builtin_samples(4, seed=1)
    assert [sample.images for sample in again.samples] == [sample.images for sample in found.samples[:4]]
    assert again.content_hash() != other.content_hash()


def test_photographs_have_the_spectrum_of_photographs() -> None:
    """Amplitude falls about as 1 / frequency: an exponent of 0.8 to 1.5 in natural images (Ruderman 1994)."""
    kinds = [KINDS.index(kind) for kind in KINDS if kind.__name__ in ("leaves", "landscape")]
    samples = builtin_samples(3 * len(KINDS)).samples
    for number in (kind + turn * len(KINDS) for kind in kinds for turn in range(3)):
        data = samples[number].images[0]
        assert isinstance(data, bytes)
        grey = np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((256, 256)), np.float64)
        window = np.hanning(256)
        amplitude = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window)))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
        band = (frequency > 0.02) & (frequency < 0.25)
        slope = np.polyfit(np.log(frequency[band]), np.log(amplitude[band] + 1e-9), 1)[0]
        assert -2.2 < slope < -0.6


def noise(folder: Path, levels: int, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, levels, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_nearly_black_noise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no picture in .* spans more than 32 of 256 levels"):
        folder_samples(noise(tmp_path / "black", 7))
    assert len(folder_samples(noise(tmp_path / "dark", 60)).samples) == 3


def test_what_calibrates_does_not_measure(folder: Path) -> None:
    every = folder_samples(folder)
    calibrating = calibrating_part(every)
    measuring = unseen(every, calibrating.digests())
    assert names(own(measuring)) == ["3.PNG", "7.PNG"]
    assert set(names(own(measuring))) | set(names(calibrating)) == set(names(every))
    assert measuring.calibrated == len(calibrating.samples) == 8
    assert unseen(every, ()).samples == every.samples


def test_what_calibrated_with_a_folder_is_measured_on_drawn_pictures_too(folder: Path) -> None:
    """Of a folder all alike, what is held out finds nothing wrong; few of its samples are enough, so they take turns."""
    every = folder_samples(folder)
    calibrating = with_drawn(calibrating_part(every))
    measuring = unseen(every, calibrating.digests())
    assert len(measuring.samples) == 2 + 8
    assert [sample.overview for sample in measuring.samples[:4]] == [False, True, False, True]
    assert measuring.digests().isdisjoint(calibrating.digests())
    assert measuring.describe() == f"10 samples from {folder} and the built-in pictures"


def test_a_held_out_picture_is_asked_about_by_nobody_else(folder: Path, tmp_path: Path) -> None:
    rows = [{"image": f"{number}.{'PNG' if number % 2 else 'jpg'}", "prompt": "What?"} for number in (0, 1, 2, 3, 3, 0)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    every = folder_samples(folder, prompts)
    calibrating = calibrating_part(every)
    assert names(calibrating) == ["0.jpg", "1.PNG", "2.jpg", "0.jpg"]
    assert names(own(unseen(every, calibrating.digests()))) == ["3.PNG", "3.PNG"]


def test_others_are_drawn_where_all_calibrated(folder: Path) -> None:
    few = folder_samples(folder, count=3)
    calibrating = calibrating_part(few)
    assert calibrating.samples == few.samples
    found = unseen(few, calibrating.digests())
    assert found.source == f"the built-in pictures, as all of {folder} calibrated"
    assert found.digests().isdisjoint(builtin_samples(64).digests())
    assert (found.calibrated, found.enough) == (3, ENOUGH)


def test_beside_a_users_pictures_some_are_drawn(tmp_path: Path) -> None:
    """Dark ones alone would leave no range for any other."""
    dark = noise(tmp_path / "dark", 60)
    given = folder_samples(dark)
    joined = with_drawn(given)
    assert own(joined).samples == given.samples
    drawn = [sample for sample in joined.samples if sample.overview]
    assert len(drawn) >= 8
    brightness = [float(np.asarray(Image.open(io.BytesIO(sample.images[0])).convert("L")).mean()) for sample in drawn]  # type: ignore[arg-type]
    assert min(brightness) < 90 and max(brightness) > 170
    assert joined.describe() == f"{len(joined.samples)} samples from {dark} and the built-in pictures"
    assert joined.content_hash() != given.content_hash()
