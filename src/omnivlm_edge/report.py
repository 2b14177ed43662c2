"""What an answer took, in the names of llama.cpp's server where it has them. For JSON."""

from __future__ import annotations

from .values import Answer, Timings


def usage(answer: Answer) -> dict[str, int]:
    """The numbers of tokens."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "cached_tokens": answer.cached_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def milliseconds(timings: Timings, n_tokens: int) -> dict[str, float]:
    """The time of every stage; `n_tokens` were decoded."""
    return {
        "load_ms": round(timings.load * 1e3, 3),
        "preprocess_ms": round(timings.preprocess * 1e3, 3),
        "image_encode_ms": round(timings.encode * 1e3, 3),
        "prompt_ms": round(timings.prefill * 1e3, 3),
        "ttft_ms": round(timings.first_token * 1e3, 3),
        "predicted_ms": round(timings.decode * 1e3, 3),
        "predicted_per_second": round(n_tokens / timings.decode, 3) if timings.decode else 0.0,
    }
