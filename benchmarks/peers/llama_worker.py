"""llama.cpp in the race, through the C interface that `llama-cpp-python` binds: decoder (libllama) and pictures (libmtmd)."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp
import protocol
from gguf_files import write_decoder, write_tower
from llama_cpp import mtmd_cpp as mtmd
from shapes import Shape

FTYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def prepare(settings: dict[str, Any]) -> None:
    """A decoder per variant, quantized by llama.cpp itself, and the tower in float16, as published."""
    folder, shape = Path(settings["folder"]), Shape.of(settings["checkpoint"])
    tower, decoder = folder / "mmproj-F16.gguf", folder / f"{settings['variant']}.gguf"
    if not tower.exists():
        write_tower(shape, part := tower.with_suffix(".part"))
        part.rename(tower)
    if not decoder.exists():
        plain = folder / "F16.gguf"
        if not plain.exists():
            write_decoder(shape, part := plain.with_suffix(".part"))
            part.rename(plain)
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = settings["threads"], FTYPES[settings["variant"]]
        part = decoder.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(part).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize to {settings['variant']}")
        part.rename(decoder)


class Llama:
    def __init__(self, settings: dict[str, Any]) -> None:
        folder = Path(settings["folder"])
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / f"{settings['variant']}.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 2048, 512, 512
        params.n_threads = params.n_threads_batch = settings["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise RuntimeError("llama.cpp does not load the decoder")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        tower = mtmd.mtmd_context_params_default()
        tower.use_gpu, tower.print_timings, tower.warmup, tower.n_threads = False, False, False, settings["threads"]
        self._vision = mtmd.mtmd_init_from_file(str(folder / "mmproj-F16.gguf").encode(), self._model, tower)
        if not self._vision:
            raise RuntimeError("llama.cpp does not load the tower")
        pixels = (ctypes.c_uint8 * (448 * 448 * 3)).from_buffer_copy(random.Random(0).randbytes(448 * 448 * 3))
        self._chunks = self._cut(mtmd.mtmd_bitmap_init(448, 448, pixels), "")

    def restart(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def read(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp does not decode")
        llama_cpp.llama_get_logits_ith(self._context, -1)  # waits for them

    def step(self, token: int) -> None:
        self.read([token])

    def look(self) -> None:
        for number in range(mtmd.mtmd_input_chunks_size(self._chunks)):
            chunk = mtmd.mtmd_input_chunks_get(self._chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                if mtmd.mtmd_encode_chunk(self._vision, chunk):
                    raise RuntimeError("llama.cpp does not encode")
                return
        raise RuntimeError("llama.cpp made no picture of the slice")

    def ask(self, picture: str, question: str) -> None:
        """A whole question about a picture, up to the first token's logits."""
        bitmap = mtmd.mtmd_helper_bitmap_init_from_file(self._vision, picture.encode(), False)
        past = llama_cpp.llama_pos(0)
        done = mtmd.mtmd_helper_eval_chunks(
            self._vision, self._context, self._cut(bitmap, question), 0, 0, 512, True, ctypes.byref(past)
        )
        if done:
            raise RuntimeError("llama.cpp does not read the picture")
        llama_cpp.llama_get_logits_ith(self._context, -1)

    def _cut(self, bitmap: Any, question: str) -> Any:
        chunks = mtmd.mtmd_input_chunks_init()
        written = mtmd.mtmd_default_marker() + question.encode()
        text = mtmd.mtmd_input_text(text=written, text_len=len(written), add_special=True, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError("llama.cpp does not cut the picture")
        return chunks


def cold(settings: dict[str, Any]) -> None:
    peer = Llama(settings)
    if settings["picture"] is None:
        peer.read(protocol.tokens(protocol.COLD_PROMPT, peer.vocabulary))
    else:
        peer.ask(settings["picture"], "What is this?")


if __name__ == "__main__":
    protocol.main(Llama, prepare, cold)
