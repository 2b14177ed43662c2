"""pytest-benchmark for test_stages.py: what its files say of the machine."""

from __future__ import annotations

from typing import Any

from omnivlm_edge.machine import describe_machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Our facts instead of the host's name and all that a CPU says of itself."""
    machine_info.clear()
    machine_info.update(describe_machine())


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """The commit; not how the directory and the branch are called."""
    for name in ("project", "branch"):
        commit_info.pop(name, None)
