"""A bundle is refused where its sums would overflow, or where ONNX Runtime is too old for it."""

import json
import logging
import shutil
import sys

import numpy as np
import onnxruntime as ort
import pytest

from mcv_runtime import BundleCorruptError, MachineError, load
from mcv_runtime.bundle.manifest import NeedsSpec
from mcv_runtime.command import cli
from mcv_runtime.sessions import machine


@pytest.fixture
def needing(golden_bundle, tmp_path):
    """A copy of a bundle that says it needs something."""

    def make(**needs):
        folder = shutil.copytree(golden_bundle, tmp_path / "bundle")
        manifest = json.loads((folder / "mcv.json").read_text())
        manifest["needs"] = needs
        (folder / "mcv.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.fixture
def overflowing(monkeypatch):
    """A processor without VNNI: pairs of products saturate at 16 bits, as VPMADDUBSW does (Intel's instruction reference)."""

    class Saturating:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feed):
            a_MK, b_KN = (feed[name].astype(np.int64) for name in "ab")
            products_MKN = a_MK[:, :, None] * b_KN
            return [np.clip(products_MKN[:, ::2] + products_MKN[:, 1::2], -(2**15), 2**15 - 1).sum(1)]

    monkeypatch.setattr(ort, "InferenceSession", Saturating)
    machine.sums_exactly.cache_clear()
    yield
    machine.sums_exactly.cache_clear()


@pytest.mark.parametrize("version", ["99", "1.1000", "1.32.0.99999"])
def test_an_older_onnxruntime_is_refused(needing, version):
    with pytest.raises(MachineError, match=rf"needs ONNX Runtime {version} or newer, and {ort.__version__} is installed"):
        load(needing(onnxruntime=version, processor="any"))


def test_this_onnxruntime_is_new_enough(needing):
    load(needing(onnxruntime=ort.__version__, processor="any"))


def test_versions_are_compared_as_numbers(monkeypatch):
    for installed, needed, enough in (
        ("1.9.0", "1.31", False), ("1.31.0rc1", "1.31", True), ("1.31", "1.31.0", True), ("2", "1.99", True),
        ("1.30.9", "1.31", False),
    ):  # fmt: skip
        monkeypatch.setattr(ort, "__version__", installed)
        if enough:
            machine.check_machine(NeedsSpec(onnxruntime=needed))
        else:
            with pytest.raises(MachineError, match="pip install"):
                machine.check_machine(NeedsSpec(onnxruntime=needed))


def test_sums_that_overflow_are_noticed(overflowing):
    assert not machine.sums_exactly()


def test_a_bundle_for_vnni_is_refused_without_it(needing, overflowing, monkeypatch, capsys):
    folder = needing(onnxruntime="1.31", processor="avx512_vnni")
    with pytest.raises(MachineError, match=r"build the bundle again here, or with `--target avx2`"):
        load(folder)
    monkeypatch.setattr(sys, "argv", ["mcv-run", "-m", str(folder), "--prompt", "Hello"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("processor", ["any", "avx2"])
def test_other_bundles_are_for_every_processor(processor, overflowing):
    machine.check_machine(NeedsSpec(processor=processor))


@pytest.mark.parametrize("name, slow", [("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)])
def test_a_slow_bundle_is_told_of(name, slow, monkeypatch, caplog):
    monkeypatch.setattr(machine.platform, "machine", lambda: name)
    with caplog.at_level(logging.WARNING):
        machine.check_machine(NeedsSpec(processor="arm64"))
    assert bool(caplog.records) == slow


@pytest.mark.parametrize(
    "needs", [{"onnxruntime": "new"}, {"onnxruntime": "1." * 9}, {"onnxruntime": 1.3}, {"processor": "z80"}, {"gpu": "any"}]
)
def test_needs_that_nobody_knows_are_refused(needing, needs):
    with pytest.raises(BundleCorruptError, match="needs"):
        load(needing(**needs))
