"""Golden data, and bundles built from its checkpoints.

`tests/golden` holds checkpoints, numbers and drawn pictures; $MCV_GOLDEN may point at a larger folder of the same layout
(see each family's golden.json). Every folder with a golden.json is a family. Two generations of the reference wrote their
cases in two forms: `golden_case` runs over those of the resampler families, `merger_case` over the others. A case is
collected where all of its pictures are there.

Every run draws the same examples; `make fuzz` draws others.
"""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Neither a slow machine nor what an earlier run found changes what a property is given or how it ends.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("fixed"), derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile("fixed")

GOLDEN = Path(os.environ.get("MCV_GOLDEN") or Path(__file__).parent / "golden")
for packed in GOLDEN.glob("*/checkpoint/*.gz"):  # a fifth smaller in the repository; git ignores what is unpacked
    if not packed.with_suffix("").exists():
        partial = packed.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.decompress(packed.read_bytes()))
        partial.replace(packed.with_suffix(""))
# `nohup` and a shell's `&` have these ignored in what they start. The commands respect that; their tests are about the rest.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the commands do: a test leaves nothing at a developer's home
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.json"))


@pytest.fixture(scope="session")
def make_pdf() -> Callable[..., bytes]:
    """Writes a PDF from the bodies of its objects: the catalog, the pages, and from 3 on what these name."""

    def make(*bodies: bytes, trailer: bytes = b"", catalog: bytes = b"", kids: Sequence[int] = (3,)) -> bytes:
        listed = b" ".join(b"%d 0 R" % kid for kid in kids)
        pages = b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(kids), listed)
        written, places = bytearray(b"%PDF-1.7\n"), []
        for number, body in enumerate([b"<</Type/Catalog/Pages 2 0 R %s>>" % catalog, pages, *bodies], 1):
            places.append(len(written))
            written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
        table = b"".join(b"%010d 00000 n \n" % place for place in places)
        end = b"trailer\n<</Root 1 0 R/Size %d %s>>\nstartxref\n%d\n%%%%EOF\n" % (len(places) + 1, trailer, len(written))
        return bytes(written) + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(places) + 1, table) + end

    return make


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Imports a script that lies beside this file, by name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@dataclass(frozen=True)
class GoldenCase:
    """One case of a family's golden.json, with the pictures it is about."""

    family: str
    name: str
    expected: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        return GOLDEN / self.family / "checkpoint"

    @property
    def images(self) -> list[Path]:
        return [GOLDEN / "images" / name for name in self.expected["images"]]

    @property
    def chat(self) -> Mapping[str, Any]:
        """The arguments of the reference's chat()."""
        chat: Mapping[str, Any] = self.expected.get("chat_kwargs", {})
        return chat

    @property
    def options(self) -> dict[str, Any]:
        """The request's options."""
        options = {name: self.chat[name] for name in ("max_slice_nums", "use_image_id") if name in self.chat}
        if "enable_thinking" in self.chat:
            options["thinking"] = self.chat["enable_thinking"]
        if "temporal_ids" in self.chat:
            options["stack_frames"] = len(self.chat["temporal_ids"][0])
        return options

    def request(self) -> list[dict[str, Any]]:
        """The case's messages, pictures as paths and a video as its frames."""
        from mcv_runtime import Video

        placed: dict[str, Any] = {f"<<image {i}>>": picture for i, picture in enumerate(self.images)}
        system = self.chat.get("system_prompt")
        messages = [] if system is None else [{"role": "system", "content": [system]}]
        for message in self.expected["messages"]:
            content = message["content"]
            parts = [content] if isinstance(content, str) else content
            messages.append({"role": message["role"], "content": [placed.get(part, part) for part in parts]})
        if self.images and self.family == "minicpmv2_0":  # one picture, which its chat() puts before the first question
            messages[0]["content"] = [*self.images, *messages[0]["content"]]
        if "temporal_ids" in self.chat:  # numbered by tenths of a second, from 0 on
            messages[0]["content"] = [Video(self.images, fps=10), messages[0]["content"][-1]]
        return messages

    def array(self, key: str) -> np.ndarray:
        return _arrays(self.family)[f"{self.name}/{key}"]

    def has(self, key: str) -> bool:
        return f"{self.name}/{key}" in _arrays(self.family)


class MergerCase(GoldenCase):
    """A case of the merger generation (4.6, 4.7, OCR)."""

    @property
    def images(self) -> list[Path]:
        return [self._image(name) for name in self.expected.get("images", [])]

    @property
    def frames(self) -> list[Path]:
        return [self._image(name) for name in self.expected.get("extra", {}).get("video_frames", [])]

    @property
    def fps(self) -> float:
        return float(self.expected["extra"]["video_metadata"][0]["fps"])

    @property
    def options(self) -> dict[str, Any]:
        """The request's options; the reference numbers pictures and videos unless told otherwise."""
        extra = self.expected["extra"]
        numbered = self.expected["use_image_id"]
        options = {
            "downsample_mode": self.expected["downsample_mode"],
            "max_slice_nums": self.expected["max_slice_nums"],
            "use_image_id": True if numbered is None else numbered,
            "thinking": self.expected["enable_thinking"],
        }
        for name, value in {**extra, **extra.get("images_extra", {}), **extra.get("videos_extra", {})}.items():
            if name in ("small_image_upsize", "stack_frames"):
                options[name] = value
        return options

    @property
    def tolerance(self) -> float:
        """Of logits up to about 50, from the reference's own noise."""
        return max(1e-2, 5 * float(self.expected["allsteps_fp64_maxdiff"]))

    def request(self) -> list[dict[str, Any]]:
        """The case's messages, pictures as paths and a video as its frames."""
        from mcv_runtime import Video

        images = iter(self.images)
        made: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "image": lambda part: next(images),
            "video": lambda part: Video(self.frames, fps=self.fps),
            "text": lambda part: part["text"],
        }
        return [
            {**m, "content": m["content"] if isinstance(m["content"], str) else [made[p["type"]](p) for p in m["content"]]}
            for m in self.expected["messages"]
        ]

    @staticmethod
    def _image(name: str) -> Path:
        return GOLDEN / "images46" / name.removeprefix("../images/")


@cache
def _arrays(family: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / family / "golden.npz") as file:
        return dict(file)


@cache
def _family_cases(family: str) -> list[GoldenCase]:
    """All cases whose pictures are there."""
    cases = json.loads((GOLDEN / family / "golden.json").read_text(encoding="utf-8"))["cases"]
    found: list[GoldenCase]
    if isinstance(cases, dict):
        found = [GoldenCase(family, name, expected) for name, expected in cases.items()]
    else:
        found = [MergerCase(family, expected["id"], expected) for expected in cases]
    present = [case for case in found if all(image.is_file() for image in [*case.images, *getattr(case, "frames", [])])]
    assert len(present) >= 4, f"only {len(present)} cases of {family} in {GOLDEN}"
    return present


def _params(wanted: Callable[[GoldenCase], bool]) -> list[Any]:
    quirk = pytest.mark.skipif(True, reason="a bug of the reference, not reproduced")
    return [
        pytest.param(case, id=f"{case.family}-{case.name}", marks=quirk if case.name.startswith("quirk_") else ())
        for family in FAMILIES
        for case in _family_cases(family)
        if wanted(case)
    ]


@pytest.hookimpl(trylast=True)  # the profile is chosen by then
def pytest_configure() -> None:
    if settings.default.derandomize:
        # Hypothesis also tries numbers and texts out of the modules that were imported so far: which, hangs on earlier tests.
        providers._get_local_constants = providers.Constants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        metafunc.parametrize("golden_case", _params(lambda case: not isinstance(case, MergerCase)))
    if "merger_case" in metafunc.fixturenames:
        metafunc.parametrize("merger_case", _params(lambda c: isinstance(c, MergerCase) and "kind" not in c.expected))
    if "conversation" in metafunc.fixturenames:  # a prompt read in chunks, then continued
        metafunc.parametrize("conversation", _params(lambda case: "kind" in case.expected))
    if "merger_family" in metafunc.fixturenames:
        merger = [family for family in FAMILIES if isinstance(_family_cases(family)[0], MergerCase)]
        metafunc.parametrize("merger_family", merger)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What calibrations keep goes into a folder of the tests, also from the programs that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def drawn_seed(pytestconfig: pytest.Config) -> int:
    """What a test marked `fuzz` draws its examples with: the same in every run, another in every round of `make fuzz`."""
    return int(pytestconfig.getoption("--hypothesis-seed") or 0)


@pytest.fixture(scope="session")
def golden_root() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """For all builds from here on; see there."""
    import traced_once

    with traced_once.traced_once():
        yield


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> Callable[..., Path]:
    """The bundle of a family's golden checkpoint, by default fp32, built once for all processes of a run; nobody changes it."""
    from mcv_export.build import BuildOptions, build

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "bundles"
    folder.mkdir(exist_ok=True)

    def make(family: str, precision: str = "fp32") -> Path:
        out = folder / f"{family}-{precision}"
        with (folder / f"{out.name}.lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if not out.exists():
                build(GOLDEN / family / "checkpoint", out, BuildOptions(precision=precision))
        return out

    return make


@pytest.fixture(scope="session")
def engine_of(bundle_of: Callable[..., Path]) -> Callable[..., Any]:
    """An engine on the same, of one thread: two would wait for each other as long as other tests run beside it."""
    from mcv_runtime import load

    return cache(lambda family, precision="fp32": load(bundle_of(family, precision), threads=1))


@pytest.fixture(scope="session")
def golden_bundle(bundle_of: Callable[..., Path]) -> Path:
    """An fp32 bundle of the 2.6 golden checkpoint."""
    return bundle_of("minicpmv2_6")


@pytest.fixture
def golden_engine(request: pytest.FixtureRequest, engine_of: Callable[..., Any]) -> Any:
    """An engine of the golden case's family, or of 2.6 where the test is about none."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return engine_of(params["golden_case"].family if "golden_case" in params else "minicpmv2_6")


@pytest.fixture(scope="session")
def read_prompt() -> Callable[..., tuple[Any, Any, np.ndarray]]:
    """Reads a prompt into a memory of its own."""
    return _read_prompt


def _read_prompt(
    engine: Any, prompt: Any, embeds: np.ndarray, chunk: int = 1 << 20, *, more: int = 0
) -> tuple[Any, Any, np.ndarray]:
    """A memory and a row in it that holds a prompt, with room for `more` tokens, and the logits [1, vocab] behind it."""
    from mcv_runtime.decoding.row import prompt_keys

    decoder, keys = engine._scheduler.decoder, prompt_keys(prompt)
    slots = decoder.new_slots()
    row = decoder.new_row(slots, len(prompt.ids) + more)
    for start in range(0, len(prompt.ids), chunk):
        end = min(start + chunk, len(prompt.ids))
        first, last = np.searchsorted(prompt.visual_positions, (start, end))
        places = prompt.visual_positions[first:last] - start
        logits = decoder.read(slots, row, prompt.ids[start:end], embeds[first:last], places, keys=keys[:, start:end])
    return slots, row, logits
