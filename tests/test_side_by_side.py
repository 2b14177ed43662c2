"""The side-by-side harness on shapes small enough to be quick."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import reference
from omnivlm_edge import GenerateOptions, OmniVLM
from tiny_gguf import VisionShape, random_tensors, write_mmproj

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import plots  # noqa: E402
import report  # noqa: E402
import side_by_side  # noqa: E402
from contenders import ANSWERERS, ENCODERS, STOCK_ANSWERER, STOCK_ENCODER  # noqa: E402
from contenders.base import Contender, Files, Question  # noqa: E402
from contenders.process import Child, ChildError  # noqa: E402

STOCK, STOCK_ANSWERS = ENCODERS[0], ANSWERERS[0]
OURS = Contender("ours", "ours", {"precision": "auto"})


@pytest.fixture
def files(tiny_model: Path, tmp_path: Path) -> Files:
    mmproj = next(tiny_model.glob("mmproj*.gguf"))
    text = next(path for path in tiny_model.glob("*.gguf") if path != mmproj)
    return Files(text, mmproj, tmp_path)


@pytest.fixture
def photo(tmp_path: Path, picture: Image.Image) -> Path:
    picture.save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def no_library(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str) -> None:
    """As if `name` were not installed, for child processes too, which get our sys.path."""
    error = f'raise ModuleNotFoundError("No module named {name!r}")'
    (directory / f"{name}.py").write_text(error)
    monkeypatch.syspath_prepend(directory)


def test_the_stock_path_comes_first() -> None:
    assert (STOCK.name, STOCK_ANSWERS.name) == (STOCK_ENCODER, STOCK_ANSWERER)
    names = [contender.name for contender in (*ENCODERS, *ANSWERERS)]
    assert len(set(names)) == len(names)


def test_llama_cpp_encodes_the_idefics3_file(files: Files, photo: Path) -> None:
    child = Child(STOCK, files)
    try:
        child.ask("prepare")
        assert child.ask("load", 1) > 0
        assert child.ask("encode", photo, 1) > 0
        assert child.ask("peak") > 10
        assert child.ask("libraries")["llama-cpp-python"]
    finally:
        child.close()


def encode_with_llama_cpp(files: Files, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[side, side, 3] -> [n_tokens, width of the text model]; in a process of its own."""
    from contenders import stock

    stock.prepare(files)
    encoder = stock.load(files, 1)
    return encoder.encode(encoder.convert(pixels[None]))[0]


def test_the_idefics3_file_is_the_same_tower(tiny_model: Path, tmp_path: Path) -> None:
    shape = VisionShape(image_size=84)
    files = Files(next(tiny_model.glob("[!m]*.gguf")), tmp_path / "mmproj.gguf", tmp_path)
    write_mmproj(files.mmproj, shape)
    pixels = np.random.default_rng(1).integers(0, 256, (84, 84, 3), np.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        tokens = pool.apply(encode_with_llama_cpp, (files, pixels))

    inputs: dict[str, npt.NDArray[np.float64]] = {}
    normalised = pixels.transpose(2, 0, 1) / 127.5 - 1
    reference.encode(random_tensors(shape), shape, normalised, inputs=inputs)
    patches = inputs["mm.0.weight"].reshape(2, 3, 2, 3, shape.n_embd)  # row, row, column, column
    squares = patches.transpose(0, 2, 1, 3, 4).reshape(shape.n_tokens, -1)
    reader = gguf.GGUFReader(tmp_path / "mmproj-idefics3-F16.gguf")
    matrix = next(t.data for t in reader.tensors if t.name == "mm.model.fc.weight")
    np.testing.assert_allclose(tokens, squares @ matrix.astype(np.float64).T, atol=0.02)


def test_llama_cpp_gets_the_same_prompt(files: Files, photo: Path) -> None:
    child = Child(STOCK_ANSWERS, files)
    question = Question(photo, "You are 1.", "What is it?")
    try:
        child.ask("prepare")
        child.ask("load", 1)
        timed = child.ask("answer", question)
    finally:
        child.close()
    assert 0 < timed.encode < timed.first_token and 0 < timed.prefill < timed.first_token
    with OmniVLM(files.text, files.mmproj, device="cpu", n_threads=1) as model:
        options = GenerateOptions(max_tokens=1)
        answer = model.answer(photo, question.question, options, system=question.system)
    assert timed.prompt_tokens == answer.prompt_tokens


def test_a_contender_that_is_not_installed_is_skipped_with_the_reason(
    files: Files, photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_library(monkeypatch, tmp_path, "openvino")
    missing = Contender("OpenVINO", "ov", {"precision": "int8"})
    records = side_by_side.with_ratios(
        side_by_side.measure_encoders([STOCK, OURS, missing], files, 1, [photo] * 3, (1, 2)),
        STOCK_ENCODER,
    )
    stock, ours, skipped = records
    assert stock["ratio_to_stock"]["encode"] == {"min": 1, "median": 1}
    assert len(ours["seconds"]["encode"]["samples"]) == 2
    assert {"encode", "batch 1", "batch 2"} == set(ours["seconds"])
    assert ours["peak_rss_mb"] > 10 and ours["load_seconds"] > 0
    assert (skipped["status"], skipped["reason"]) == ("skipped", "No module named 'openvino'")
    assert "No module named 'openvino'" in side_by_side.line(skipped)


def has_amx() -> bool:
    """Whether this machine has it, and stock llama.cpp may end as `install_text_kernels` tells."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_tile" in cpuinfo.read_text()


@pytest.mark.parametrize("contender", ANSWERERS, ids=lambda contender: contender.name)
def test_answerers(contender: Contender, files: Files, photo: Path) -> None:
    child = Child(contender, files)
    try:
        child.ask("prepare")
        child.ask("load", 1)
        timed = child.ask("answer", Question(photo, "You are 1.", "What is it?"))
    except ChildError as error:
        if not (contender.module == "stock" and has_amx()):
            raise
        assert f"ended with {-signal.SIGILL}" in str(error)  # told, as any contender's failure
        return
    finally:
        child.close()
    assert 0 < timed.encode < timed.first_token
    assert 0 < timed.prefill < timed.first_token
    assert timed.prompt_tokens > 10


def test_a_contender_that_fails_says_why(files: Files, photo: Path) -> None:
    child = Child(OURS, Files(files.text, files.mmproj.with_name("absent.gguf"), files.scratch))
    with pytest.raises(ChildError, match="absent.gguf") as caught:
        child.ask("load", 1)
    assert caught.value.status == "failed"


def test_numbers(tmp_path: Path) -> None:
    numbers = side_by_side.Numbers()
    assert numbers.convert("1,2,4", None, None) == (1, 2, 4)
    with pytest.raises(Exception, match="not a list of numbers"):
        numbers.convert("1,0", None, None)


# ---- the report ---------------------------------------------------------------------------------


def sample(name: str, kind: str, threads: int, **seconds: float) -> dict[str, Any]:
    return {
        "run": "2026-01-01",
        "commit": "abc",
        "machine": {"cpu": "a CPU"},
        "threads": threads,
        "repeats": 1,
        "picture": "a photograph",
        "contender": name,
        "kind": kind,
        "status": "ok",
        "reason": "",
        "libraries": {"library": "1.0"},
        "load_seconds": 0.5,
        "peak_rss_mb": 900,
        "seconds": {stage: side_by_side.summary([value]) for stage, value in seconds.items()},
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    stages = {"preprocess": 0.1, "prefill": 0.2}
    found = []
    for threads in (1, 2):
        encoders = [
            sample(STOCK_ENCODER, "encode", threads, encode=2.0),
            sample("ours", "encode", threads, encode=0.5, **{"batch 1": 0.5, "batch 2": 0.8}),
            sample("OpenVINO", "encode", threads)
            | {"status": "skipped", "reason": "not installed"},
        ]
        answerers = [
            sample(STOCK_ANSWERER, "answer", threads, encode=2, first_token=3, decode=0.02)
            | {"prompt_tokens": 100},
            sample("ours, all", "answer", threads, encode=0.5, first_token=0.75, decode=0.01),
        ]
        for record in answerers:
            record["seconds"] |= {k: side_by_side.summary([v]) for k, v in stages.items()}
        found += side_by_side.with_ratios(encoders, STOCK_ENCODER)
        found += side_by_side.with_ratios(answerers, STOCK_ANSWERER)
    return found


def test_tables(records: list[dict[str, Any]]) -> None:
    tables = report.side_by_side_tables(records)
    assert "| ours | 0.50 s | 0.25× | 0.50 s | 900 MB |" in tables
    assert "| OpenVINO | skipped: not installed | | | |" in tables
    assert "| ours, all | 0.75 s | 0.25× | 100.0 tokens/s | 2.00× | 0.50 s | 900 MB |" in tables
    assert "2 threads" in tables and "library 1.0" in tables


def test_plots(records: list[dict[str, Any]], tmp_path: Path) -> None:
    for plot in (plots.plot_stages, plots.plot_memory, plots.plot_threads, plots.plot_batch):
        figure = plot(records)
        assert figure is not None
        figure.savefig(tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            assert image.width > 500


def test_what_did_not_vary_is_not_plotted(records: list[dict[str, Any]]) -> None:
    one = [r for r in records if r["threads"] == 1 and "batch 1" not in r["seconds"]]
    assert plots.plot_threads(one) is None
    assert plots.plot_batch(one) is None
