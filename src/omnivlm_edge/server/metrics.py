"""Prometheus metrics, by the stems of llama.cpp's server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..values import Answer

_TTFT_BUCKETS = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 40, 80)  # seconds


class Metrics:
    """The metrics of one server; the arguments are asked when they are read."""

    def __init__(
        self,
        running: Callable[[], int],
        waiting: Callable[[], int],
        sleeping: Callable[[], bool],
    ) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"omnivlm_{name}", text, labels, registry=self._registry)

        self._requests = counter("requests", "HTTP requests.", ("path", "status"))
        self._prompt_tokens = counter("prompt_tokens", "Positions of prompts computed.")
        self._cached_tokens = counter("cached_tokens", "Positions of prompts known from before.")
        self._prompt_seconds = counter("prompt_seconds", "Seconds spent on prompts.")
        self._tokens = counter("tokens_predicted", "Tokens generated.")
        self._token_seconds = counter("tokens_predicted_seconds", "Seconds answers took.")
        self._images = counter("images", "Pictures in prompts.", ("source",))
        self._image_seconds = counter("image_encode_seconds", "Seconds spent on pictures.")
        self._answers = counter("answers", "Answers by how they ended.", ("finish_reason",))
        self._first_token = Histogram(
            "omnivlm_time_to_first_token_seconds",
            "From the request to the first token, the queue included.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        for name, text, value in (
            ("requests_processing", "Answers being generated.", running),
            ("requests_deferred", "Answers waiting for a place.", waiting),
            ("sleeping", "1 while the model is unloaded, because nobody asks.", sleeping),
        ):
            gauge = Gauge(f"omnivlm_{name}", text, registry=self._registry)
            gauge.set_function(value)

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, answer: Answer, queue_seconds: float) -> None:
        times = answer.timings
        self._prompt_tokens.inc(answer.prompt_tokens - answer.cached_tokens)
        self._cached_tokens.inc(answer.cached_tokens)
        self._prompt_seconds.inc(times.prefill)
        self._tokens.inc(answer.completion_tokens)
        self._token_seconds.inc(times.decode)
        self._image_seconds.inc(times.encode)
        for image in answer.images:
            self._images.labels(image.cached or "encoded").inc()
        self._answers.labels(answer.finish_reason).inc()
        self._first_token.observe(queue_seconds + times.first_token)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
