"""Finding a checkpoint on the hub, offline: the hub's cache on disk stands in for it."""

import re
from pathlib import Path

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from mcv_export import hub
from mcv_runtime.errors import CheckpointError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one repository, as huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _add_repository(tmp_path, "someone/MiniCPM-V")
    return tmp_path


def _add_repository(cache: Path, hub_id: str) -> None:
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert hub.locate(str(tmp_path)) == tmp_path


def test_a_cached_repository(cache: Path) -> None:
    found = hub.locate("someone/MiniCPM-V", cache_dir=cache)
    assert found.name == "a" * 40
    assert hub.locate("someone/MiniCPM-V", cache_dir=cache, revision="a" * 40) == found


def test_what_is_not_cached_cannot_be_had_offline(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="someone/Other is not in the cache"):
        hub.locate("someone/Other", cache_dir=cache)
    with pytest.raises(CheckpointError, match="not in the cache"):
        hub.locate("someone/MiniCPM-V", cache_dir=cache, revision="v2")


def test_python_files_are_never_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(model: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.locate("openbmb/MiniCPM-V-2_6")
    assert asked
    assert not any(pattern.endswith((".py", "*")) for patterns in asked for pattern in patterns)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("openbmb/MiniCPM-V-4.6", "openbmb/MiniCPM-V-4_6"),
        ("openbmb/MiniCPM-V-2_6", "openbmb/MiniCPM-V-2.6"),
        ("openbmb/MiniCPM-V-2_6", "MiniCPM-V-2.6"),
        ("openbmb/MiniCPM-Llama3-V-2_5", "MiniCPM-Llama3-V-2.5"),
        ("openbmb/MiniCPM-V-4", "openbmb/MiniCPM-V-4.0"),
        ("openbmb/MiniCPM-V-4.7-1B", "openbmb/MiniCPM-V-4_7-1B"),
        ("openbmb/MiniCPM-V", "MiniCPM-V"),
    ],
)
def test_other_spellings_of_a_version(cache: Path, stored: str, asked: str) -> None:
    _add_repository(cache, stored)
    found = hub.locate(asked, cache_dir=cache)
    assert found.parent.parent.name == f"models--{stored.replace('/', '--')}"


def test_the_exact_id_comes_first(cache: Path) -> None:
    for hub_id in ("openbmb/MiniCPM-V-4_6", "openbmb/MiniCPM-V-4.6"):
        _add_repository(cache, hub_id)
        assert hub.locate(hub_id, cache_dir=cache).parent.parent.name == f"models--{hub_id.replace('/', '--')}"


def test_a_spelling_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def download(model: str, **_: object) -> str:
        asked.append(model)
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # made without the web client's response

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"openbmb/MiniCPM-V-9\.9 is not on the hub"):
        hub.locate("MiniCPM-V-9.9")
    assert asked == ["openbmb/MiniCPM-V-9.9", "openbmb/MiniCPM-V-9_9"]


@pytest.mark.parametrize(
    ("asked", "original"),
    [
        ("openbmb/MiniCPM-V-2_6-int4", "openbmb/MiniCPM-V-2_6"),
        ("openbmb/MiniCPM-Llama3-V-2_5-int4", "openbmb/MiniCPM-Llama3-V-2_5"),
        ("openbmb/MiniCPM-V-4.6-AWQ", "openbmb/MiniCPM-V-4.6"),
        ("openbmb/MiniCPM-V-4_5-AWQ-int8", "openbmb/MiniCPM-V-4_5"),
        ("openbmb/MiniCPM-V-4.6-GPTQ", "openbmb/MiniCPM-V-4.6"),
        ("openbmb/MiniCPM-V-2_6-gguf", "openbmb/MiniCPM-V-2_6"),
        ("someone/MiniCPM-V-4.6-GGUF", "openbmb/MiniCPM-V-4.6"),
        ("openbmb/MiniCPM-V-4.6-BNB", "openbmb/MiniCPM-V-4.6"),
        ("openbmb/MiniCPM-o-2_6-int8", "openbmb/MiniCPM-o-2_6"),
        ("mlx-community/MiniCPM-V-4.6-4bit", "openbmb/MiniCPM-V-4.6"),
        ("mlx-community/MiniCPM-V-4.6-bf16", "openbmb/MiniCPM-V-4.6"),
        ("someone/MiniCPM-V-4.6-MLX-8bit", "openbmb/MiniCPM-V-4.6"),
        ("MiniCPM-V-4.6-int4", "openbmb/MiniCPM-V-4.6"),
        ("someone/their-own-int4", "someone/their-own"),
    ],
)
def test_quantized_repositories_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, original: str
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    with pytest.raises(CheckpointError, match=f"full-precision checkpoint, {re.escape(original)}$"):
        hub.locate(asked)


def test_a_folder_may_have_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("MiniCPM-V-4.6-int4").mkdir()
    assert hub.locate("MiniCPM-V-4.6-int4") == Path("MiniCPM-V-4.6-int4")
