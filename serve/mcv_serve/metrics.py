"""Figures for Prometheus, under the names that the dashboards of vLLM and llama.cpp read, and our own for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mcv_runtime import Answer

if TYPE_CHECKING:
    from mcv_serve.answering import Answering

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_SHORT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """All figures of one server; one model, whose name is a label where vLLM has it."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def vllm_gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(model)

        def vllm_counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(model)

        def vllm_times(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=self.registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=self.registry)

        def times(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SHORT, registry=self.registry)

        self._running = vllm_gauge("num_requests_running", "Requests that are prepared, read or answered.")
        self._waiting = vllm_gauge("num_requests_waiting", "Requests that wait for a place.")
        self._kv = vllm_gauge("kv_cache_usage_perc", "Memory for keys, values and pictures in use: 1 is all.")
        self._prefix_asked = vllm_counter("prefix_cache_queries", "Prompt tokens that were looked for among those read before.")
        self._prefix_hit = vllm_counter("prefix_cache_hits", "Prompt tokens that had been read before.")
        self._prompt = vllm_counter("prompt_tokens", "Tokens of prompts.")
        self._generated = vllm_counter("generation_tokens", "Tokens of answers.")
        self._success = Counter(
            "vllm:request_success", "Finished requests.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._ttft = vllm_times("time_to_first_token_seconds", "From a request to the first of its text.")
        self._inter_token = vllm_times("inter_token_latency_seconds", "Mean time between an answer's tokens.", _SHORT)
        self._e2e = vllm_times("e2e_request_latency_seconds", "From a request to the end of its answer.")
        self._queue_s = vllm_times("request_queue_time_seconds", "Waiting for a place.")
        self._prefill_s = vllm_times("request_prefill_time_seconds", "Reading a prompt.")
        self._decode_s = vllm_times("request_decode_time_seconds", "Making an answer's tokens.")
        self._prompt_size = vllm_times("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_size = vllm_times("request_generation_tokens", "Tokens of an answer.", _TOKENS)

        self._llama = {
            "prompt_tokens": counter("llamacpp:prompt_tokens", "Prompt tokens that were read."),
            "prompt_seconds": counter("llamacpp:prompt_seconds", "Seconds of reading prompts."),
            "tokens_predicted": counter("llamacpp:tokens_predicted", "Tokens that were made."),
            "tokens_predicted_seconds": counter("llamacpp:tokens_predicted_seconds", "Seconds of making tokens."),
        }
        self._prompt_rate = gauge("llamacpp:prompt_tokens_seconds", "Prompt tokens a second, of the last request.")
        self._predicted_rate = gauge("llamacpp:predicted_tokens_seconds", "Tokens a second, of the last request.")
        self._processing = gauge("llamacpp:requests_processing", "Requests that are prepared, read or answered.")
        self._deferred = gauge("llamacpp:requests_deferred", "Requests that wait for a place.")

        self.fetch_s = times("mcv_picture_fetch_seconds", "Fetching a picture from elsewhere.")
        self.decode_s = times("mcv_picture_decode_seconds", "Decoding and cutting a request's pictures, and its prompt.")
        self._encode_s = times("mcv_picture_encode_seconds", "Encoding a request's pictures.")
        self._pictures = Counter("mcv_pictures", "Pictures by whether they were known.", ["cache"], registry=self.registry)
        self._slices = counter("mcv_slices", "Slices that went through the vision graphs.")
        self._visual = counter("mcv_visual_tokens", "Visual tokens in prompts.")
        self._joined = counter("mcv_requests_joined", "Requests that were given the answer of an equal one.")
        self._gone = counter("mcv_clients_gone", "Requests whose client left before the end.")
        self._refused = Counter("mcv_requests_refused", "Refused requests.", ["code"], registry=self.registry)
        self._repetition = counter("mcv_answers_repeating", "Answers that the repeat guard ended.")
        self._memory = Gauge("mcv_memory_bytes", "Memory besides the weights.", ["kind"], registry=self.registry)

    def note_load(self, running: int, waiting: int, memory: dict[str, int]) -> None:
        """How things stand now."""
        for gauge in (self._running, self._processing):
            gauge.set(running)
        for gauge in (self._waiting, self._deferred):
            gauge.set(waiting)
        limit = memory.get("limit", 0)
        self._kv.set(sum(size for kind, size in memory.items() if kind != "limit") / limit if limit else 0)
        for kind, size in memory.items():
            self._memory.labels(kind).set(size)

    def note_answer(self, answering: Answering, answer: Answer, finished: float) -> None:
        """A request has ended with an answer."""
        prompt, timings = len(answer.prompt_tokens), answer.timings
        made = len(answer.tokens) + sum(len(other.tokens) for other in answer.alternatives)
        read = prompt - answer.reused_tokens
        self._prefix_asked.inc(prompt)
        self._prefix_hit.inc(answer.reused_tokens)
        self._prompt.inc(prompt)
        self._generated.inc(made)
        self._prompt_size.observe(prompt)
        self._answer_size.observe(made)
        self._success.labels(self._model, answer.stop_reason).inc()
        if answering.first_piece is not None:
            self._ttft.observe(answering.first_piece - answering.began)
        if len(answer.tokens) > 1:
            self._inter_token.observe(timings.decode / (len(answer.tokens) - 1))
        self._e2e.observe(finished - answering.began)
        self._queue_s.observe((answering.admitted or finished) - answering.began)
        self._prefill_s.observe(timings.prefill)
        self._decode_s.observe(timings.decode)
        self.decode_s.observe(timings.preprocess)
        for name, amount in (
            ("prompt_tokens", read),
            ("prompt_seconds", timings.prefill),
            ("tokens_predicted", made),
            ("tokens_predicted_seconds", timings.decode),
        ):
            self._llama[name].inc(amount)
        if timings.prefill:
            self._prompt_rate.set(read / timings.prefill)
        if answer.tokens_per_s:
            self._predicted_rate.set(answer.tokens_per_s)
        if answer.pictures:
            self._encode_s.observe(timings.vision)
            known = min(answering.pictures_known, len(answer.pictures))
            self._pictures.labels("hit").inc(known)
            self._pictures.labels("miss").inc(len(answer.pictures) - known)
            self._slices.inc(answering.slices)
            self._visual.inc(sum(len(picture.embeds) for picture in answer.pictures))
        if answer.stop_reason == "repetition":
            self._repetition.inc()

    def note_joined(self) -> None:
        """A request was given another one's answer."""
        self._joined.inc()

    def note_gone(self) -> None:
        """A client did not wait for the end."""
        self._gone.inc()

    def note_refused(self, code: str) -> None:
        """A request was refused."""
        self._refused.labels(code).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
