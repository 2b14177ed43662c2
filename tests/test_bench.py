"""The command `bench`: what it measures, how it fails, what it reads from the system's tools."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import psutil
import pytest
from matplotlib.figure import Figure
from PIL import Image

from command import COMMAND, run
from omnivlm_edge import DeviceError, OmniVLM, OptionError, bench, machine, memory, plot, power
from omnivlm_edge.cli import bench_tables, main
from omnivlm_edge.device import available_cores
from omnivlm_edge.model_file import inspect_file
from omnivlm_edge.models import find_model
from omnivlm_edge.values import VISION_PRECISIONS

DEMO = find_model("demo")
HORSES = Path(__file__).parents[1] / "examples" / "horses.png"
# Two threads wait for each other on a busy machine.
QUICK = ("bench", "demo", "-i", HORSES, "-t", 1, "-r", 2, "-n", 4, "--device", "cpu")


def case(**changes: Any) -> bench.Case:
    (only,) = bench.make_cases(
        DEMO, HORSES, threads=[1], repeats=2, max_tokens=4, device="cpu", **changes
    )
    return only


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left: a record."""
    path = tmp_path_factory.mktemp("bench") / "run.jsonl"
    result = run(*QUICK, "-o", "jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    path.write_text(result.stdout)
    return path


@pytest.fixture
def record(jsonl: Path) -> dict[str, Any]:
    return dict(json.loads(jsonl.read_text()))


# --- what is measured -----------------------------------------------------------------------------


def test_a_record_says_what_was_measured_and_where(record: dict[str, Any]) -> None:
    rows = {row["test"]: row for row in record["stages"]}
    assert list(rows) == list(bench.STAGES)
    for row in rows.values():
        samples = row["samples_ns"]
        assert len(samples) == record["repeats"] == 2
        assert 0 < row["min_ns"] == min(samples) <= row["median_ns"] <= max(samples)
        assert row["avg_ns"] == pytest.approx(np.mean(samples), abs=1)
        assert row["stddev_ns"] == pytest.approx(np.std(samples, ddof=1), abs=1)
    inner = ("preprocess", "encode", "prefill")
    for i, total in enumerate(rows["total"]["samples_ns"]):
        first = rows["first_token"]["samples_ns"][i]
        assert sum(rows[stage]["samples_ns"][i] for stage in inner) <= first <= total
    # The first token of four comes out of the prefill.
    assert (rows["decode"]["n_tokens"], rows["prefill"]["n_tokens"]) == (3, record["prompt_tokens"])
    for stage in ("prefill", "decode"):
        speeds = [rows[stage]["n_tokens"] / ns * 1e9 for ns in rows[stage]["samples_ns"]]
        assert rows[stage]["samples_ts"] == pytest.approx(speeds)
        assert rows[stage]["avg_ts"] == pytest.approx(np.mean(speeds))
        assert rows[stage]["stddev_ts"] == pytest.approx(np.std(speeds, ddof=1))

    assert record["model_sha256"] == bench.digest_file(DEMO.text)
    assert record["mmproj_sha256"] == bench.digest_file(DEMO.mmproj)
    assert record["model_size"] == DEMO.text.stat().st_size
    assert record["model_n_params"] + record["mmproj_n_params"] == 8_183_808
    assert record["picture"] == {
        "name": "horses.png", "format": "PNG", "width": 768, "height": 768
    }  # fmt: skip
    assert (record["device"], record["n_threads"], record["n_gpu_layers"]) == ("CPU", 1, 0)
    assert record["backends"] == "CPU"
    assert (record["completion_tokens"], record["finish_reason"]) == (4, "length")
    assert 40e6 < record["peak_rss_bytes"] < 400e6
    assert record["start_to_first_token_ns"] > record["first_load_ns"] > 0
    assert record["peak_gbs"] > 0.1
    assert record["decode_share"] > 0
    assert 0 < record["cpu_share"] < 1.5
    assert (record["partial"], record["error"]) == (False, None)
    assert record["cpu_info"] == record["machine"]["cpu"]


def test_shares_of_the_limits() -> None:
    rows = [
        {"test": "encode", "median_ns": 2_000_000_000, "n_tokens": None},
        {"test": "decode", "median_ns": 500_000_000, "n_tokens": 10},
    ]
    facts = {"peak_gops": 400.0, "encode_operations": 640e9, "peak_gbs": 20.0, "decode_bytes": 1e8}
    assert bench._shares(facts, rows) == {"encode_share": 0.8, "decode_share": 0.1}
    unknown = facts | {"peak_gops": None, "peak_gbs": None}
    assert set(bench._shares(unknown, rows).values()) == {None}


def test_work_is_counted_from_the_files() -> None:
    vision, text = inspect_file(DEMO.mmproj), inspect_file(DEMO.text)
    width, layers = vision.number("embedding_length"), vision.number("block_count")
    side, patch = vision.number("image_size"), vision.number("patch_size")
    hidden, n = vision.number("feed_forward_length"), (side // patch) ** 2
    shapes = {tensor.name: tensor.shape for tensor in vision.header.tensors}
    projector = sum(a * b for a, b in (shapes["mm.0.weight"], shapes["mm.2.weight"]))
    want = 2 * n * 3 * patch**2 * width + 2 * n // vision.merge_factor * projector
    want += layers * (2 * n * (4 * width**2 + 2 * width * hidden) + 4 * n * n * width)
    assert bench.encode_operations(vision) == want
    # F16 matrices and F32 vectors, and nothing else in the file but its header.
    assert 0.98 < bench.decode_bytes(text) / text.size < 1


def test_every_repeat_computes_everything(tiny_model: Path) -> None:
    with OmniVLM(tiny_model, device="cpu", n_threads=1, disk_cache=False) as model:
        first = model.answer(HORSES, "Hi")
        assert model.answer(HORSES, "Hi").cached_tokens > 0
        model.forget()
        again = model.answer(HORSES, "Hi")
        assert (again.cached_tokens, again.timings.encode > 0) == (0, True)
        assert again.text == first.text
        stream = model.generate(HORSES, "Hi")
        begun = next(stream)
        model.forget()  # the answer that is being generated keeps its place
        assert begun + "".join(stream) == first.text


def test_memory_is_the_process_s_own(tmp_path: Path) -> None:
    inner = "from omnivlm_edge.memory import peak_rss; print(peak_rss())"
    outer = (
        "import subprocess, sys; much = b'x' * 500_000_000; "
        f"subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    )
    shown = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True)
    assert 5e6 < int(shown.stdout) < 400e6


def test_a_limit_of_the_machine() -> None:
    assert 0.1 < machine.peak_bandwidth(1) < 10_000
    rate = machine.peak_gops("auto", 1)
    assert rate is None or rate > 0


# --- output ---------------------------------------------------------------------------------------


def test_table_csv_and_json_say_the_same(record: dict[str, Any]) -> None:
    assert json.loads(bench_tables.render([record], "json")) == [record]
    lines = bench_tables.render([record, record], "csv").splitlines()
    rows = list(csv.DictReader(lines))
    assert [row["test"] for row in rows] == [*bench.STAGES] * 2
    llama_bench = "build_commit cpu_info gpu_info backends model_filename model_size model_n_params"
    llama_bench += " n_threads n_gpu_layers test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns"
    assert rows[0].keys() >= {*llama_bench.split(), "samples_ts"}
    for row, stage in zip(rows, record["stages"], strict=False):
        assert json.loads(row["samples_ns"]) == stage["samples_ns"]
        assert row["model_sha256"] == record["model_sha256"]

    table = bench_tables.render([record], "md").splitlines()
    assert len({len(line) for line in table[:9]}) == 1
    cells = [cell.strip() for cell in table[7].strip("|").split("|")]
    decode = record["stages"][5]
    precision = f"auto ({record['vision_precision_used']})"
    assert cells[:6] == ["demo-F16", "16.5", "CPU", precision, "1", "decode 3"]
    assert cells[6] == f"{decode['min_ns'] / 1e6:.2f}"
    assert cells[8] == f"{decode['avg_ns'] / 1e6:.2f} ± {decode['stddev_ns'] / 1e6:.2f}"
    assert cells[9] == f"{decode['avg_ts']:.2f} ± {decode['stddev_ts']:.2f}"
    assert f"peak memory {record['peak_rss_bytes'] / 1e6:.1f} MB" in "\n".join(table)


def test_compare_and_plot(jsonl: Path, record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    shown = run(*QUICK, "-p", "Is there a duck?", "--compare", jsonl, "--plot", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    now, comparison = shown.stdout.split("\n\nCPU, precision ", 1)
    assert "| min ms |" in now.splitlines()[0] and "peak memory" in now
    lines = ("CPU, precision " + comparison).splitlines()
    assert lines[2].split()[1:8:2] == ["median", "before", "now", "change"]
    assert [line.split("|")[1].strip() for line in lines[4:13]] == [
        *(f"{stage.replace('_', ' ')} ms" for stage in bench.STAGES),
        *("peak memory MB", "files MB"),
    ]
    total = record["stages"][6]["median_ns"] / 1e6
    assert lines[10].split("|")[2].strip() == f"{total:.2f}"
    assert "- prompt: Describe the image -> Is there a duck?" in lines
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.width) == ("PNG", 1200)

    # For programs stdout stays what it was.
    shown = run(*QUICK, "-r", 1, "-o", "json", "--compare", jsonl)
    assert json.loads(shown.stdout)[0]["repeats"] == 1
    assert "before" in shown.stderr


def test_a_plot_shows_what_was_measured(record: dict[str, Any], tmp_path: Path) -> None:
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_save", keep)
        plot.plot_stages([record, record | {"n_threads": 2}], tmp_path / "p.png", [record, record])
    (figure,) = figures
    left = figure.axes[0]
    before, now, other = left.containers
    assert [bar.get_width() for bar in now] == [row["median_ns"] / 1e6 for row in record["stages"]]
    assert before[0].get_hatch() and not now[0].get_hatch()
    assert before[0].get_facecolor()[:3] == now[0].get_facecolor()[:3]
    assert other[0].get_facecolor()[:3] != now[0].get_facecolor()[:3]
    assert len(left.texts) == 3 * len(bench.STAGES)
    samples = record["stages"][0]["samples_ns"]
    assert list(left.lines[0].get_xdata()) == [min(samples) / 1e6, max(samples) / 1e6]
    title = figure.get_suptitle()
    assert record["model_filename"] in title and record["cpu_info"] in title


def test_partners(record: dict[str, Any]) -> None:
    other = record | {"n_threads": 7}
    newer = record | {"test_time": "later"}
    assert bench.find_partner(record, [other]) is other  # there is no other
    assert bench.find_partner(record, [record, newer, other]) is newer
    assert bench.find_partner(record, [other, other]) is None
    # `auto` that became int8 is a partner of int8, but not so near as another `auto`.
    auto = record | {"vision_precision_used": "int8"}
    int8 = auto | {"vision_precision": "int8"}
    assert bench.find_partner(auto, [other, int8]) is int8
    assert bench.find_partner(int8, [auto, other]) is auto
    assert bench.find_partner(auto, [auto, int8]) is auto
    text = bench_tables.comparison([record], [other, other])
    assert text == "No earlier record of CPU, precision auto, 1 thread.\n"
    text = bench_tables.comparison([record], [other])
    assert "- n_threads: 7 -> 1" in text


@pytest.mark.parametrize(
    "text", ["", "\n", "[]", "[1]", "{}", "[{}]", '{"stages": []}', '{"stages": [1]}', "[" * 10**5]
)
def test_files_that_hold_no_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="no record"):
        bench.read_records(path)


@pytest.mark.parametrize("number", [-1, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("name", ["encode", "model_size", "peak_rss_bytes"])
def test_numbers_that_nobody_measured(
    record: dict[str, Any], tmp_path: Path, name: str, number: float
) -> None:
    changed = record | {"peak_unified_bytes": None, "peak_footprint_bytes": None, name: number}
    if name == "encode":
        changed["stages"] = [row | {"median_ns": number} for row in record["stages"]]
    path = tmp_path / "old.json"
    path.write_text(json.dumps([changed]))
    with pytest.raises(OptionError, match="nobody has measured|holds no records"):
        bench.read_records(path)


def test_notes_of_a_case(record: dict[str, Any]) -> None:
    facts = {"peak_gbs": 20.0, "peak_gops": 400.0, "repeats": 1, "error": None}
    other = record | facts | {"peak_gbs": 30.0, "n_threads": 2}
    text = bench_tables.render([record | facts, other], "md")
    assert "1 thread: " in text and "measured limit 20.0 GB/s and 400 GOP/s" in text
    assert "measured limit 30.0 GB/s and 400 GOP/s" in text
    assert "; 1 repeat\n" in text
    assert "mean ± sd ms" in text.splitlines()[0]


def test_a_progress_bar_on_a_terminal() -> None:
    command = [*COMMAND, *map(str, QUICK)]
    child = pexpect.spawn(
        command[0], command[1:], encoding="utf-8", timeout=60, dimensions=(40, 200)
    )
    child.expect("bench: +0%")
    child.expect(r"bench: 100%.*6/6")
    child.expect(r"\| model ")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--precision", "int9"], 2, "'int9' is not one of 'auto', 'int8'"),
        (["--precision", "auto,"], 2, "'' is not one of"),
        (["-t", "1,0"], 2, "0 is not in the range"),
        (["-t", "100000"], 2, "100000 is not in the range"),
        (["-t", "two"], 2, "'two' is not a valid"),
        (["-r", "0"], 2, "0 is not in the range"),
        (["-n", "1"], 2, "1 is not in the range"),
        (["-o", "xml"], 2, "'xml' is not one of"),
        (["--plot", "p.svg"], 2, "must end in .png"),
        (["--plot", "absent/p.png"], 1, "absent/p.png: cannot be written (No such file"),
        (["--plot", ".png"], 2, ".png: the file's name must end in .png"),
        (["-i", "https://example.com/a.png"], 2, "give a file: save the picture first"),
        (["-i", "-"], 2, "give a file"),
        (["--device", "tpu"], 1, "device 'tpu' does not exist here"),
        (["-i", "absent.png"], 1, "absent.png: there is no such file"),
        (["--mmproj", "absent.gguf"], 1, "absent.gguf: there is no such file"),
        (["--compare", "absent.json"], 1, "absent.json: cannot be read"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["omnivlm-edge", "bench", "demo", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.mkdir()
    shown = run(*QUICK, "--plot", path)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert f"{path}: cannot be written (Is a directory)" in shown.stderr


def test_options_that_repeat_and_variables() -> None:
    arguments = [*QUICK, "-r", 1, "-t", 2, "--vision-precision", "bf16,f32", "-o", "jsonl"]
    shown = run(*arguments, OMNIVLM_LOW_MEMORY="1", OMNIVLM_VISION_PRECISION="int8")
    records = list(map(json.loads, shown.stdout.splitlines()))
    assert [(r["vision_precision"], r["n_threads"]) for r in records] == [
        *(("bf16", 1), ("bf16", 2), ("f32", 1), ("f32", 2)),
    ]
    assert all(record["low_memory"] for record in records)
    shown = run(*QUICK, "-r", 1, "-o", "jsonl", OMNIVLM_VISION_PRECISION="bf16,f32")
    records = list(map(json.loads, shown.stdout.splitlines()))
    assert [record["vision_precision"] for record in records] == ["bf16", "f32"]


def test_more_threads_than_cores_are_remarked() -> None:
    cores = available_cores()
    arguments = "--device", "tpu", "-t", f"1,{cores + 1}"  # what ends it comes after the remark
    shown = run("bench", "demo", *arguments)
    assert f"{cores + 1} threads on {cores} cores wait for each other" in shown.stderr


def test_wrong_usage_of_the_program() -> None:
    shown = run("bench", "demo", "--precision", "int9")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "'int9' is not one of 'auto', 'int8'" in shown.stderr


def test_cases_are_checked_in_python_as_well() -> None:
    with pytest.raises(OptionError, match="'fast' does not exist: choose auto, int8"):
        case(precisions=["fast"])
    for n_threads in (0, -1, 513):
        with pytest.raises(OptionError, match="n_threads"):
            bench.make_cases(DEMO, HORSES, threads=[n_threads])
    combined = bench.make_cases(DEMO, HORSES, threads=[1, 2], precisions=VISION_PRECISIONS)
    assert len({(case.n_threads, case.precision) for case in combined}) == 2 * len(
        VISION_PRECISIONS
    )


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    text = Path(shutil.copy(DEMO.text, tmp_path))
    os.truncate(text, 4 * 10**12)  # a hole: no disk holds so much
    shown = run("bench", text, "--mmproj", DEMO.mmproj, "-i", HORSES, "--device", "cpu")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert "the model needs about 4,000.2 GB, and CPU has " in shown.stderr
    with pytest.raises(DeviceError, match="smaller quantization"):
        memory.check_fits(2, 1, "CPU")


def bench_child(parent: subprocess.Popen[str], known: int = 0) -> psutil.Process:
    """The process of a case, once there is one with another number than `known`."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in psutil.Process(parent.pid).children():
            with contextlib.suppress(psutil.Error):  # another one, which has ended
                if process.pid != known and "omnivlm_edge.bench_child" in process.cmdline():
                    return process
        assert parent.poll() is None
        time.sleep(0.01)
    raise TimeoutError


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, QUICK), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_keeps_the_finished_cases() -> None:
    with start("-t", "1,2", "-o", "json") as process:
        first = bench_child(process)
        second = bench_child(process, first.pid)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: 1 of 2 cases are finished." in stderr
    record = json.loads(stdout)[0]
    assert (record["n_threads"], record["partial"], record["error"]) == (1, False, None)
    assert record["repeats_done"] == 2
    assert len(record["stages"]) == len(bench.STAGES)
    second.wait(10)  # one that was just being started finds no case, and ends by itself


def test_ctrl_c_before_anything_was_measured() -> None:
    with start("-o", "json") as process:
        bench_child(process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "Interrupted: nothing was measured." in stderr


def interrupt_after(steps: int) -> Callable[[int], None]:
    done: list[int] = []

    def progress(step: int) -> None:
        done.append(step)
        if len(done) == steps:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("steps", "kept"), [(2, 0), (3, 1)])
def test_ctrl_c_keeps_what_a_case_has_measured(steps: int, kept: int) -> None:
    records: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        bench.run_cases([case()], records, progress=interrupt_after(steps))
    assert len(records) == kept
    for record in records:
        assert (record["partial"], record["repeats"], record["repeats_done"]) == (True, 2, 1)
        stages = {row["test"]: len(row["samples_ns"]) for row in record["stages"]}
        assert stages == dict.fromkeys(bench.STAGES[1:], 1)
        text = bench_tables.render(records, "md")
        assert "partial: interrupted after 1 of 2 repeats" in text


def test_a_case_that_is_killed_is_an_error_beside_the_others(tmp_path: Path) -> None:
    with start("-t", "1,2", "-r", 1, "--plot", tmp_path / "plot.png") as process:
        first = bench_child(process)
        bench_child(process, first.pid).kill()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "Error: CPU, precision auto, 2 threads: its process was killed; was there enough memory?"
    ) in stderr
    rows = [line.split("|")[5:7] for line in stdout.splitlines() if "demo-F16 " in line]
    assert [threads.strip() for threads, _ in rows] == [*"1" * len(bench.STAGES), "2"]
    assert rows[-1][1].strip() == "failed"
    assert (stdout + stderr).count("was killed") == 1
    assert (tmp_path / "plot.png").exists()


def test_a_case_that_fails_says_why(tmp_path: Path) -> None:
    mmproj = Path(shutil.copy(DEMO.mmproj, tmp_path))
    good = case()
    os.truncate(mmproj, mmproj.stat().st_size - 1000)
    records: list[dict[str, Any]] = []
    steps: list[int] = []
    cases = [replace(good, mmproj=str(mmproj)), replace(good, max_tokens="many"), good]
    bench.run_cases(cases, records, progress=steps.append)
    assert sum(steps) == sum(case.steps for case in cases)
    damaged, broken, measured = records
    assert "cut off" in damaged["error"]
    assert damaged["stages"] == []
    assert "max_tokens is 'many'" in broken["error"]
    assert measured["error"] is None
    text = bench_tables.render([damaged], "md")
    assert "| failed " in text and damaged["error"] not in text  # it stands on stderr
    assert len(list(csv.DictReader(bench_tables.render([damaged], "csv").splitlines()))) == 1


def test_a_device_that_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = bench.select_device("cpu")
    monkeypatch.setattr(bench, "select_device", lambda name: cpu)  # it was there a moment ago
    records: list[dict[str, Any]] = []
    bench.run_cases([replace(case(), device="CUDA7"), case()], records)
    assert "device 'CUDA7' does not exist here: there is CPU" in records[0]["error"]
    assert records[1]["error"] is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-signal.SIGKILL, "was killed; was there enough memory? (last words)"),
        (-signal.SIGABRT, "crashed (SIGABRT) (last words)"),
        (3, "ended with exit code 3 (last words)"),
    ],
)
def test_how_a_process_ended(tmp_path: Path, code: int, message: str) -> None:
    (tmp_path / "stderr").write_bytes(b"first\nlast words\n\n")
    with (tmp_path / "stderr").open("rb") as stderr:
        assert message in bench._death(code, stderr)


# --- what the system's tools say ------------------------------------------------------------------

ORIN_NANO = (
    "11-20-2025 10:14:02 RAM 2780/7620MB (lfb 842x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [12%@1510,9%@1510,3%@1510,0%@1510,8%@729,off] EMC_FREQ 3%@2133 GR3D_FREQ 76%@[611] "
    "NVDEC off NVJPG off VIC off OFA off APE 200 cpu@49.5C soc2@48.2C gpu@49C tj@50.1C "
    "VDD_IN 5765mW/5612mW VDD_CPU_GPU_CV 1548mW/1501mW VDD_SOC 1497mW/1489mW\n"
)
AGX_ORIN = (
    "RAM 5012/30536MB (lfb 512x4MB) CPU [2%@729,0%@729] GR3D_FREQ 0% "
    "VDD_GPU_SOC 2410mW/2410mW VDD_CPU_CV 401mW/401mW VIN_SYS_5V0 3234mW/3234mW"
)
XAVIER_NX = "RAM 1903/7771MB (lfb 1x512kB) GR3D_FREQ 0% VDD_IN 3410/3391 VDD_CPU_GPU_CV 480/471"
NANO = "RAM 702/3956MB (lfb 615x4MB) IRAM 0/252kB POM_5V_IN 1756/1812 POM_5V_GPU 40/40"
NO_SENSOR = "RAM 702/3956MB (lfb 615x4MB) CPU [1%@102] thermal@30C"
MIB = 2**20


@pytest.mark.parametrize(
    ("line", "watts", "mib"),
    [
        (ORIN_NANO, 5.765, 2780),
        (AGX_ORIN, 6.045, 5012),
        (XAVIER_NX, 3.41, 1903),
        (NANO, 1.756, 702),
        (NO_SENSOR, None, 702),
    ],
)
def test_tegrastats(line: str, watts: float | None, mib: int) -> None:
    reading = power.parse_tegrastats(line)
    assert reading is not None
    assert reading.memory_bytes == mib * MIB
    assert reading.watts == (None if watts is None else pytest.approx(watts))
    assert power.parse_tegrastats("tegrastats: not found") is None


def test_powermetrics() -> None:
    m2 = (
        "*** Sampled system activity (Tue Nov 25 10:14:02 2025 +0100) (200.53ms elapsed) ***\n"
        "**** Processor usage ****\nCPU Power: 3200 mW\nGPU Power: 900 mW\nANE Power: 0 mW\n"
        "Combined Power (CPU + GPU + ANE): 4100 mW\n**** GPU usage ****\nGPU Power: 900 mW\n"
    )
    readings = list(filter(None, map(power.parse_powermetrics, m2.splitlines())))
    assert readings == [power.Reading(watts=4.1)]
    intel = "Intel energy model derived package power (CPUs+GT+SA): 12.34W"
    assert power.parse_powermetrics(intel) == power.Reading(watts=12.34)


def recording(tmp_path: Path, *lines: str) -> list[str]:
    """A command that prints the lines again and again, as tegrastats does."""
    script = tmp_path / "tegrastats"
    script.write_text(
        f"#!{sys.executable}\nimport itertools, time\nfor line in itertools.cycle({lines!r}):\n"
        "    print(line.strip(), flush=True)\n    time.sleep(0.002)\n"
    )
    script.chmod(0o755)
    return [str(script)]


def test_a_meter_keeps_what_a_tool_prints(tmp_path: Path) -> None:
    higher = ORIN_NANO.replace("RAM 2780", "RAM 3000").replace("VDD_IN 5765", "VDD_IN 7765")
    command = recording(tmp_path, ORIN_NANO, "noise", higher)
    meter = power.Meter("tegrastats", command, power.parse_tegrastats)
    records: list[dict[str, Any]] = []
    bench.run_cases([case()], records, meter=meter)
    (record,) = records
    assert record["power"]["source"] == "tegrastats"
    assert 5.765 < record["power"]["mean_w"] < record["power"]["max_w"] == 7.765
    assert record["peak_unified_bytes"] == 220 * MIB == bench.peak_memory(record)
    assert "W (tegrastats)" in bench_tables.render(records, "md")
    assert power.watts(meter.between(0, 1)) is None
    assert power.memory_growth([]) is None


def test_a_meter_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = power.Meter("none", [str(tmp_path / "none")], power.parse_tegrastats)
    with meter:
        pass
    assert meter.between(0, 1e9) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power.find_meter() is None
    recording(tmp_path)
    found = power.find_meter()
    assert found is not None and found.name == "tegrastats"


def test_footprint() -> None:
    fields = [0] * 35
    fields[7], fields[28] = 111, 123_456_789  # now, and the most so far
    assert memory.parse_rusage(bytes(16) + struct.pack("=35Q", *fields)) == 123_456_789
    assert (memory.peak_footprint() is None) == (platform.system() != "Darwin")
    assert bench.peak_memory({"peak_rss_bytes": 1, "peak_footprint_bytes": 2}) == 2
    assert bench.peak_memory({"peak_rss_bytes": 1, "peak_footprint_bytes": None}) == 1
    assert bench.peak_memory({}) is None


def test_peak_of_a_linux_process() -> None:
    assert memory.parse_peak("VmPeak:\t  9 kB\nVmHWM:\t  1024 kB\nVmRSS:\t  8 kB\n") == MIB
    with pytest.raises(ValueError, match="VmHWM"):
        memory.parse_peak("")


X86 = """\
processor\t: 0
model name\t: AMD Ryzen 7 7840U w/ Radeon  780M Graphics
flags\t\t: fpu sse4_2 avx avx2 fma f16c avx512_vnni avx512f constant_tsc

processor\t: 1
model name\t: another
"""
CORTEX = """\
processor\t: 0
Features\t: fp asimd evtstrm aes asimdhp asimddp i8mm bf16
CPU implementer\t: 0x41
"""


def test_cpuinfo(tmp_path: Path) -> None:
    assert machine.parse_cpuinfo(X86) == (
        "AMD Ryzen 7 7840U w/ Radeon  780M Graphics",
        ["avx", "avx2", "avx512_vnni", "avx512f", "f16c", "fma", "sse4_2"],
    )
    arm = ["asimd", "asimddp", "asimdhp", "bf16", "i8mm"]
    assert machine.parse_cpuinfo(CORTEX) == ("", arm)
    assert machine.parse_cpuinfo("") == ("", [])
    for name, content in (
        ("proc/cpuinfo", CORTEX),
        ("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if platform.system() == "Linux":
        facts = machine.describe_machine(tmp_path)
        assert facts["features"] == arm
        assert facts["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
        assert facts["governor"] == "schedutil"
        assert facts["cpu"] and facts["cores"] and facts["memory_bytes"]


def test_sysctl_and_nvpmodel() -> None:
    text = (
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_SME: 0"
        "\nhw.optional.neon: 1\nhw.optional.arm64: 1\nhw.optional.arm.FEAT_BF16: 1\n"
    )
    assert machine.parse_sysctl(text) == ["bf16", "dotprod", "i8mm", "neon"]
    assert machine.parse_sysctl("hw.optional.avx2_0: 1\nhw.optional.avx512f: 0") == ["avx2_0"]
    assert machine.parse_nvpmodel("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert machine.parse_nvpmodel("") is None


def test_the_commit_that_was_built(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) is None
    (tmp_path / "commit.txt").write_text("\n")  # built where there was no checkout
    assert machine.commit(tmp_path) is None
    (tmp_path / "commit.txt").write_text("1234abc-dirty\n")
    assert machine.commit(tmp_path) == "1234abc-dirty"
    assert (Path(machine.__file__).parent / "commit.txt").is_file()
    assert machine._output("no such program") == ""
    assert machine._output("false") == ""
