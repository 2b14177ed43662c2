"""Many machines: the same rows by a pool of Ray actors, through Ray Data. Needs the extra `ray`.

Ray places, restarts and scales the actors and does lost work again; here are only the class that
its `map_batches` calls, and the loop that hands it work and takes rows. That loop alone writes
rows, so nothing is there twice; what Ray did not bring is asked for again, so nothing is lost.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .batch.inputs import Item
from .batch.output import decode_row, encode_row, key_of
from .batch.runner import Answerer, Row, Task, Work, context_size
from .engine import OmniVLM
from .errors import ModelFileError, OmniVLMError, OptionError
from .files import identity, loaded_digest
from .models import find_model
from .paths import cache_dir
from .sources import is_address
from .values import GenerateOptions, ModelFiles

BATCH = 32  # pictures in a call; two calls overlap in an actor, so that none waits at their ends
# Pictures that Ray is given at once. Their paths are in the memory of the machine that started it.
WAVE = 100_000
WAVE_BYTES = 256 * 2**20  # … and their contents, where a table held those
_TRIES = 3

try:
    import ray
    import ray.data
except ImportError as exc:
    raise OptionError('a cluster needs Ray: pip install "omnivlm-edge[ray]"') from exc


class OmniVLMPredictor:
    """For `map_batches` of a data set of Ray's: adds answers to pictures.

        ds = ray.data.read_parquet("s3://…").map_batches(
            OmniVLMPredictor,
            fn_constructor_kwargs={"model": "omnivision", "prompt": "Describe the image"},
            batch_size=32, num_cpus=4, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=64))

    Args:
        model, mmproj, engine: those of OmniVLM.
        prompt: the question; left out, each row's `prompt_column` is asked.
        image_column: pictures: paths, addresses, contents of files, or uint8 arrays.
        choices: answers to choose from, instead of free text.
        n_parallel: answers generated at the same time.

    To the columns of a batch come `answer`, `finish_reason`, `prompt_tokens`, `completion_tokens`,
    `error_kind`, `error_message` (both None where there is an answer) and, with `choices`, a column
    `chances` of their probabilities in the order given.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        prompt: str | None = None,
        *,
        mmproj: str | os.PathLike[str] | None = None,
        options: GenerateOptions | None = None,
        choices: Sequence[str] = (),
        system: str | None = None,
        image_column: str = "image",
        prompt_column: str = "prompt",
        n_parallel: int = 8,
        **engine: Any,
    ) -> None:
        self._image_column, self._prompt_column = image_column, prompt_column
        self._prompt, self._choices = prompt, tuple(choices)
        options = options or GenerateOptions()
        task = Task((), options, self._choices, system)
        engine = {"n_ctx": context_size(options, n_parallel), "disk_cache": False, **engine}
        loaded = OmniVLM(model, mmproj, n_sequences=n_parallel, **engine)
        self._answerer = Answerer(loaded, task, n_parallel=n_parallel)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        pictures = batch[self._image_column]
        prompts = (
            [str(prompt) for prompt in batch[self._prompt_column]]
            if self._prompt is None
            else [self._prompt] * len(pictures)
        )
        work = (
            Work(Item(str(place), _source(picture)), (prompt,))
            for place, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True))
        )
        rows: list[Row] = sorted(self._answerer.run(work), key=lambda row: int(row["key"]))
        usages = [row["usage"] or {} for row in rows]
        errors = [row["error"] or {} for row in rows]
        added = {
            "answer": [row["answer"] for row in rows],
            "finish_reason": [row["finish_reason"] for row in rows],
            "prompt_tokens": [usage.get("prompt_tokens", 0) for usage in usages],
            "completion_tokens": [usage.get("completion_tokens", 0) for usage in usages],
            "error_kind": [error.get("kind") for error in errors],
            "error_message": [error.get("message") for error in errors],
        }
        if self._choices:
            names = [choice.strip() for choice in self._choices]
            added["chances"] = [
                [(row["choices"] or {}).get(name, 0.0) for name in names] for row in rows
            ]
        return {**batch, **{name: np.array(values) for name, values in added.items()}}


@dataclass(frozen=True)
class Cluster:
    """Where to run, and on how much of it: `min_actors` to `max_actors`, each with so many CPUs."""

    address: str
    min_actors: int
    max_actors: int
    num_cpus: float
    num_gpus: float = 0.0


def run_on_ray(
    work: Iterable[Work],
    task: Task,
    files: ModelFiles,
    settings: Mapping[str, Any],
    cluster: Cluster,
    *,
    allow_private: bool = False,
) -> Generator[Row, None, None]:
    """As `Answerer.run`, by the actors of a cluster, which find model and pictures by their paths.

    Raises OmniVLMError when Ray fails, or the model on one of its machines.
    """
    settings = dict(settings)
    if settings.get("n_threads") is None:
        settings["n_threads"] = max(1, int(cluster.num_cpus))
    arguments = (task, files, settings, allow_private)
    with _connected(cluster.address):
        for wave in _waves(work):
            missing = {(each.item.key, prompt): each for each in wave for prompt in each.prompts}
            for _ in range(_TRIES):
                if not missing:
                    break
                for row in _run_wave(_regroup(missing), arguments, cluster):
                    if missing.pop((row["key"], row["prompt"]), None) is not None:
                        yield row
            if missing:
                raise OmniVLMError(f"Ray lost {len(missing)} rows: run the same command again")


def _regroup(missing: Mapping[tuple[str, str], Work]) -> list[Work]:
    """What is missing, a picture once with all its prompts."""
    prompts: dict[int, list[str]] = {}
    works: dict[int, Work] = {}
    for (_, prompt), each in missing.items():
        works[id(each)] = each
        prompts.setdefault(id(each), []).append(prompt)
    return [Work(each.item, tuple(prompts[place])) for place, each in works.items()]


def _waves(work: Iterable[Work]) -> Iterator[list[Work]]:
    wave: list[Work] = []
    size = 0
    for each in work:
        wave.append(each)
        size += len(each.item.source) if isinstance(each.item.source, bytes | str) else 0
        if len(wave) >= WAVE or size >= WAVE_BYTES:
            yield wave
            wave, size = [], 0
    if wave:
        yield wave


def _run_wave(wave: Sequence[Work], arguments: tuple[Any, ...], cluster: Cluster) -> Iterator[Row]:
    n_blocks = max(1, -(-len(wave) // BATCH))
    packed = [{"work": pickle.dumps(each)} for each in wave]
    data = ray.data.from_items(packed, override_num_blocks=n_blocks)
    answered = data.map_batches(
        _Worker,
        fn_constructor_args=arguments,
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(
            min_size=cluster.min_actors, max_size=cluster.max_actors
        ),
        num_cpus=cluster.num_cpus,
        num_gpus=cluster.num_gpus or None,
        max_concurrency=2,
    )
    try:
        for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
            for line in batch["row"]:
                row = decode_row(line)
                assert row is not None
                yield row | {"key": key_of(row)}
    except ray.exceptions.RayError as exc:
        cause = getattr(exc, "cause", None) or exc
        raise OmniVLMError(f"Ray: {str(cause).strip().splitlines()[-1]}") from exc


class _Worker:
    """An actor's side: pickled work -> the lines of rows."""

    def __init__(
        self, task: Task, files: ModelFiles, settings: Mapping[str, Any], allow_private: bool
    ) -> None:
        memo = cache_dir() / "file-hashes.json"
        for path, digest in ((files.text, task.model), (files.mmproj, task.mmproj)):
            if loaded_digest(path, identity(path), memo) != digest:
                raise ModelFileError(f"{path}: is another file on {os.uname().nodename}")
        found = find_model(files.text, files.mmproj, files.variant)
        model = OmniVLM(found.text, found.mmproj, variant=found.variant, **settings)
        self._answerer = Answerer(
            model, task, n_parallel=settings["n_sequences"], allow_private=allow_private
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        work = (pickle.loads(each) for each in batch["work"])  # what `_run_wave` pickled
        rows = [encode_row(row) for row in self._answerer.run(work)]
        return {"row": np.array(rows, dtype=object)}


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Joined to a cluster: one that the process belongs to already, the named one, or a new one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=None if address == "auto" else address,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise OmniVLMError(f"Ray cannot be reached at {address} ({exc})") from exc
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _source(picture: Any) -> Any:
    if isinstance(picture, str):
        return picture if is_address(picture) else Path(picture)
    return picture


__all__ = ["BATCH", "WAVE", "Cluster", "OmniVLMPredictor", "run_on_ray"]
