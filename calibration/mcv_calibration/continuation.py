"""What a decoder expects after each token of a given text, all at once: the basis of every comparison of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.bundle.manifest import GenerationSpec, Manifest
from mcv_runtime.choosing.sampling import penalised
from mcv_runtime.sessions.graphs import feed
from mcv_runtime.text.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


def continuation_feed(
    manifest: Manifest, prompt: Prompt, embeds: NDArray[np.float32], continuation: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """The decoder's inputs for a prompt and what follows it in one call, with empty caches.

    `embeds` [visual, hidden] are the prompt's visual tokens. Logits come out for every token of the continuation, the first
    after the prompt: [len(continuation), vocab].
    """
    spec = manifest.graphs["decoder_with_past"].inputs
    ids = np.concatenate([prompt.ids, np.array(continuation[:-1], np.int64)])
    numbers = np.arange(len(prompt.ids)) if prompt.positions is None else prompt.positions
    following = numbers.max() + 1 + np.arange(len(continuation) - 1)
    positions = np.concatenate([numbers, np.broadcast_to(following, (*numbers.shape[:-1], len(following)))], -1)
    axes = spec["position_ids"].shape[:-2] if "position_ids" in spec else ()
    values: dict[str, Any] = {
        "input_ids": ids[None],
        "vision_embeds": embeds,
        "vision_positions": prompt.visual_positions,
        "position_ids": np.broadcast_to(positions[..., None, :], (*axes, 1, len(ids))),  # type: ignore[arg-type]
        "logit_positions": np.arange(len(prompt.ids) - 1, len(ids)),
        "seqlens_k": np.array([len(ids) - 1]),
        "total_sequence_length": np.full([1] * len(spec["total_sequence_length"].shape), len(ids)),
    }
    empty = {"batch": 1, "cache_length": 0}
    for entry in manifest.cache:
        values[entry.input] = np.zeros([empty[axis] if isinstance(axis, str) else axis for axis in entry.shape], entry.dtype)
    return feed(spec, values)


def greedy_answer(
    logits_after: Callable[[Sequence[int]], NDArray[np.float32]], draft: Sequence[int], generation: GenerationSpec, limit: int
) -> tuple[int, ...]:
    """The greedy answer of a decoder that reads a whole guess at once, and another guess where that was wrong.

    `logits_after(tokens)` [len(tokens), vocab]: what it expects in the place of each. With a good `draft` that is two or three
    calls, where a cache would take one for each token: for a decoder that reads its weights from disk in every call.
    """
    guess, stop = list(draft[:limit]) or [0], frozenset(generation.stop_token_ids)
    known = 0
    while True:
        logits = logits_after(guess)
        penalty = generation.repetition_penalty
        best = [int(np.argmax(penalised(row, set(guess[:place]), penalty))) for place, row in enumerate(logits)]
        for place in range(known, len(guess)):
            right, guess[place] = guess[place] == best[place], best[place]
            known = place + 1
            if guess[place] in stop or known == limit:
                return tuple(guess[:known])
            if not right:
                break
        # what it expected after a wrong token is a better guess than none
        guess = [*guess[:known], *(best[known:] or [best[-1]])]
