"""Benchmarks: a directory in its published layout -> questions -> answers -> scores.

benchmark.py: what a benchmark is, shares with their uncertainty, reading files
testset.py pope.py scienceqa.py mmmu.py mmvet.py chartqa.py: one benchmark each
run.py: questions -> rows, by batch/ -> scores -> files        failures.py: a sheet of wrong answers
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmark import Benchmark

BENCHMARKS = ("testset", "pope", "scienceqa", "mmmu", "mmvet", "chartqa")


def find_benchmark(name: str) -> Benchmark:
    """One of BENCHMARKS, whose modules are loaded only when they are needed."""
    module = importlib.import_module(f".{name}", __name__)
    benchmark: Benchmark = module.BENCHMARK
    return benchmark
