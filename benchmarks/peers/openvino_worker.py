"""OpenVINO in the race: its own export of a decoder (int4), run plain or by OpenVINO GenAI, and our float tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_decoder
import numpy as np
import openvino as ov
import protocol
from shapes import Shape


def prepare(settings: dict[str, Any]) -> None:
    folder, variant = Path(settings["folder"]), settings["variant"]
    if variant == "tower":
        tower_files(settings)
    elif variant == "tower int8":
        prepare_int8_tower(settings, folder / "tower-int8.xml")
    else:
        prepare_decoder(settings, folder / "decoder")


def prepare_decoder(settings: dict[str, Any], out: Path) -> None:
    """What `optimum-cli export openvino --weight-format int4 --group-size 128 --group-size-fallback ignore` makes."""
    if (out / "openvino_model.xml").exists():
        return
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    checkpoint = Path(settings["checkpoint"])
    source = hf_decoder.save(Shape.of(checkpoint), checkpoint, Path(settings["folder"]) / "hf")
    # 4.6's angles of positions are a product with one channel, which without a fallback is an error
    config = OVWeightQuantizationConfig(bits=4, group_size=128, group_size_fallback="ignore")
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=config)
    part = out.with_name("decoder.part")
    model.save_pretrained(part)
    try:
        from openvino_tokenizers import convert_tokenizer
        from transformers import AutoTokenizer

        for name, converted in zip(
            ("tokenizer", "detokenizer"),
            convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True),
            strict=True,
        ):
            ov.save_model(converted, part / f"openvino_{name}.xml")
    except Exception as error:  # GenAI alone needs them
        (part / "no_tokenizer.txt").write_text(str(error), encoding="utf-8")
    part.rename(out)


def tower_files(settings: dict[str, Any]) -> tuple[Path, Path, dict[str, np.ndarray[Any, Any]]]:
    """Our float tower and what compresses its patches, and what one slice feeds to both, as `mcv_worker.py` has kept it."""
    bundle = Path(settings["folder"]).parent / "mcv" / "pictures-fp32"
    graphs = json.loads((bundle / "mcv.json").read_text(encoding="utf-8"))["graphs"]
    compressor = "merger" if "merger" in graphs else "resampler"
    feed = dict(np.load(bundle.with_suffix(".slice.npz")))
    return bundle / graphs["vision_encoder"]["file"], bundle / graphs[compressor]["file"], feed


def prepare_int8_tower(settings: dict[str, Any], out: Path) -> None:
    """Static INT8 by nncf, its ranges from two drawn slices."""
    if out.exists():
        return
    import nncf

    tower, _, feed = tower_files(settings)
    model = ov.Core().read_model(tower)
    rng = np.random.default_rng(0)
    names = {given.any_name for given in model.inputs}
    samples = []
    for _ in range(2):
        sample = {name: value for name, value in feed.items() if name in names}
        sample["pixel_values"] = rng.uniform(-1, 1, sample["pixel_values"].shape).astype(np.float32)
        samples.append(sample)
    model = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    ov.save_model(model, out, compress_to_fp16=False)


class Tower:
    """One slice through the tower, and through what compresses its patches."""

    vocabulary = 0

    def __init__(self, settings: dict[str, Any]) -> None:
        tower, compressor, feed = tower_files(settings)
        if settings["variant"] == "tower int8":
            tower = Path(settings["folder"]) / "tower-int8.xml"
        core = ov.Core()
        self._graphs = []
        for path in (tower, compressor):
            compiled = core.compile_model(path, "CPU", _options(settings))
            names = {given.any_name for given in compiled.inputs}
            self._graphs.append((compiled.create_infer_request(), {name: feed[name] for name in names if name in feed}))

    def look(self) -> None:
        (tower, given), (compressor, rest) = self._graphs
        hidden = tower.infer(given)["vision_hidden"]
        compressor.infer(rest | {"vision_hidden": hidden})


class Decoder:
    """The exported decoder, which keeps its keys and values inside."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.vocabulary = Shape.of(settings["checkpoint"]).vocab
        model = ov.Core().read_model(Path(settings["folder"]) / "decoder" / "openvino_model.xml")
        self._shapes = {given.any_name: given.partial_shape for given in model.inputs}
        compiled = ov.Core().compile_model(model, "CPU", _options(settings))
        self._request, self._length = compiled.create_infer_request(), 0

    def restart(self) -> None:
        self._request.reset_state()
        self._length = 0

    def read(self, ids: list[int]) -> None:
        end = self._length + len(ids)
        positions = np.arange(self._length, end, dtype=np.int64)
        values: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        if (wanted := self._shapes.get("position_ids")) is not None:
            axes = wanted.rank.get_length() - 2  # three where positions have axes, or four
            leading = tuple(dim.get_length() if dim.is_static else 3 for dim in list(wanted)[:axes])
            values["position_ids"] = np.broadcast_to(positions, (*leading, 1, len(ids)))
        self._request.infer({name: value for name, value in values.items() if name in self._shapes})
        self._length = end

    def step(self, token: int) -> None:
        self.read([token])


class GenAi:
    """The same files by OpenVINO GenAI, whose own metrics say how long its first and later tokens took."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai

        self.vocabulary = Shape.of(settings["checkpoint"]).vocab
        folder = Path(settings["folder"]) / "decoder"
        if (folder / "no_tokenizer.txt").exists():
            raise RuntimeError(f"its tokenizer is not converted: {(folder / 'no_tokenizer.txt').read_text(encoding='utf-8')}")
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **_options(settings))

    def text(self) -> dict[str, float]:
        ids = protocol.tokens(protocol.CONTEXT, self.vocabulary)
        first, _ = self.ask(ids[: protocol.PROMPT], 2)
        return {
            "decode_0": self.ask(ids[:1], protocol.STEPS + 1)[1],
            "prefill_512": first,
            "decode_1024": self.ask(ids, protocol.STEPS + 1)[1],
        }

    def ask(self, ids: list[int], count: int) -> tuple[float, float]:
        """Seconds to the first token, and of each later one."""
        given = ov.Tensor(np.array([ids], np.int64))
        metrics = self._pipeline.generate(given, max_new_tokens=count, ignore_eos=True, do_sample=False).perf_metrics
        return metrics.get_ttft().mean / 1000, metrics.get_tpot().mean / 1000


PEERS = {"int4": Decoder, "genai": GenAi, "tower": Tower, "tower int8": Tower}


def make(settings: dict[str, Any]) -> Any:
    return PEERS[settings["variant"]](settings)


def cold(settings: dict[str, Any]) -> None:
    peer = make(settings)
    ids = protocol.tokens(protocol.COLD_PROMPT, peer.vocabulary)
    if isinstance(peer, GenAi):
        peer.ask(ids, 1)
    else:
        peer.read(ids)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Its defaults (bf16 where the processor has it, 8-bit keys and values) with the threads of all."""
    return {"INFERENCE_NUM_THREADS": settings["threads"], "PERFORMANCE_HINT": "LATENCY"}


if __name__ == "__main__":
    protocol.main(make, prepare, cold)
