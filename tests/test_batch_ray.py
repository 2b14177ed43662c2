"""A batch on Ray: the same rows, whoever dies meanwhile. `make test-slow`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batch_inputs import PLACE, QUESTION, answers, batch, write_pictures
from command import COMMAND

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing and two nodes for one actor each, as processes of their own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8}
    )
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("ray") / "photos", 200)


@pytest.fixture(scope="module")
def undisturbed(photos: Path) -> Any:
    out = photos.parent / "undisturbed.jsonl"
    assert batch(photos, "-p", QUESTION, "-n", 24, "-o", out).returncode == 0
    return answers(out)


def start(cluster: Any, photos: Path, out: Path, actors: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "batch", "demo", str(photos), "-p", QUESTION, "-n", "24", "-o", str(out)]
    command += [*PLACE, "-q", "--ray-actors", actors, "--ray-cpus", "1"]
    command += [f"--ray={cluster.address}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(path: Path, n: int, process: subprocess.Popen[str]) -> None:
    while n_lines(path) < n and process.poll() is None:
        time.sleep(0.02)


def workers() -> list[psutil.Process]:
    """The processes that answer."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            worker = "ray::" in process.name() or any("_Worker" in part for part in command)
            if worker and any("MapWorker" in part for part in command):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def finish(process: subprocess.Popen[str], out: Path) -> Any:
    """The answers of a run that ends well."""
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return answers(out)


def test_a_killed_worker_loses_nothing(
    cluster: Any, photos: Path, undisturbed: Any, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    out = tmp_path / "out.jsonl"
    process = start(cluster, photos, out, "1")
    wait_for_rows(out, 1, process)
    (worker,) = workers()
    worker.send_signal(signal.SIGKILL)
    assert finish(process, out) == undisturbed
    cluster.remove_node(node)


def test_a_removed_node_loses_nothing_nor_does_a_killed_driver(
    cluster: Any, photos: Path, undisturbed: Any, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    out = tmp_path / "out.jsonl"
    process = start(cluster, photos, out, "1,2")
    wait_for_rows(out, 1, process)
    process.kill()
    process.communicate()
    assert 0 < len(answers(out)) < 200
    process = start(cluster, photos, out, "1,2")
    wait_for_rows(out, n_lines(out) + 1, process)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert finish(process, out) == undisturbed
    cluster.remove_node(nodes[1])


def test_a_pipeline_of_the_users(cluster: Any, photos: Path) -> None:
    import ray

    from omnivlm_edge.ray import OmniVLMPredictor

    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        bad = photos.parent / "bad.png"
        bad.write_bytes(b"")
        paths = [str(photos / "000.png"), str(bad), str(photos / "001.png")]
        table = ray.data.from_items(
            [{"image": path, "prompt": "Is there a duck?", "n": n} for n, path in enumerate(paths)]
        )
        answered = table.map_batches(
            OmniVLMPredictor,
            fn_constructor_kwargs={
                "model": "demo",
                "device": "cpu",
                "n_parallel": 2,
                "n_threads": 1,
            },
            batch_size=2,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        rows = sorted(answered.take_all(), key=lambda row: row["n"])
    finally:
        ray.shutdown()
    assert [row["image"] for row in rows] == paths
    assert rows[0]["answer"] == "Yes, there is one duck."
    assert rows[0]["error_kind"] is None
    assert rows[1]["answer"] is None
    assert rows[1]["error_kind"] == "ImageError"
    assert rows[2]["completion_tokens"] > 0
