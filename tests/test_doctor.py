"""The doctor's findings: on this machine, and on machines that are only described."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

import tiny_gguf
from omnivlm_edge import _native, doctor
from omnivlm_edge.doctor import Check, Hardware
from omnivlm_edge.memory import memory_beside, memory_needed
from omnivlm_edge.model_file import inspect_file
from omnivlm_edge.models import find_model
from tiny_gguf import VisionShape

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "omnivlm_edge", "doctor"]

GB = 10**9
PLAIN = Hardware(
    nvidia=False, jetson=False, apple_silicon=False, memory_total=16 * GB, memory_available=12 * GB
)
NVIDIA = replace(PLAIN, nvidia=True)
JETSON = replace(NVIDIA, jetson=True)
MAC = replace(PLAIN, apple_silicon=True)


def device(name: str, kind: str, total: int = 8 * GB, free: int = 8 * GB) -> SimpleNamespace:
    return SimpleNamespace(name=name, kind=kind, memory_total=total, memory_free=free)


CPU = device("CPU", "cpu")
CUDA = device("CUDA0", "gpu")
METAL = device("MTL0", "gpu")
VULKAN = device("Vulkan0", "igpu")


def statuses(checks: list[Check]) -> dict[str, str]:
    assert all(bool(check.advice) == (check.status != "ok") for check in checks)
    return {check.name: check.status for check in checks}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_sound_machine(tiny_model: Path) -> None:
    checks = list(doctor.examine(tiny_model, device="cpu", hardware=PLAIN))
    found = statuses(checks)
    names = "versions system ggml devices gpu disk model memory offload picture answer"
    assert list(found) == names.split()
    assert set(found.values()) == {"ok"}
    details = {check.name: check.detail for check in checks}
    assert "llama-cpp-python 0.3.36" in details["versions"]
    assert "CPU : " in details["ggml"]
    assert str(tiny_model) in details["model"]
    assert "MB in CPU" in details["offload"]
    assert "explicit attention" in details["picture"]
    assert "egg" in details["answer"]


@pytest.mark.parametrize(
    ("file", "content", "nvidia", "jetson"),
    [
        ("proc/driver/nvidia/version", b"NVRM", True, False),
        ("dev/nvidia0", b"", True, False),
        ("etc/nv_tegra_release", b"# R36", True, True),
        ("proc/device-tree/compatible", b"nvidia,p3768\0nvidia,tegra234\0", True, True),
        ("proc/device-tree/compatible", b"raspberrypi,5-model-b\0brcm,bcm2712\0", False, False),
        ("etc/hostname", b"pc", False, False),
    ],
)
def test_probe(tmp_path: Path, file: str, content: bytes, nvidia: bool, jetson: bool) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(content)
    found = doctor.probe(tmp_path)
    assert (found.nvidia, found.jetson) == (nvidia, jetson)
    assert found.memory_total >= found.memory_available > 0


@pytest.mark.parametrize(
    ("system", "machine", "found"),
    [("Darwin", "arm64", True), ("Darwin", "x86_64", False), ("Linux", "arm64", False)],
)
def test_probe_apple_silicon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, machine: str, found: bool
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert doctor.probe(tmp_path).apple_silicon is found


@pytest.mark.parametrize(
    ("hardware", "backends", "devices", "advice"),
    [
        (PLAIN, ["CPU"], [CPU], None),
        (PLAIN, ["Vulkan", "CPU"], [VULKAN, CPU], None),
        (NVIDIA, ["CUDA", "CPU"], [CUDA, CPU], None),
        (NVIDIA, ["CPU"], [CPU], 'CMAKE_ARGS="-DGGML_CUDA=on" pip install'),
        (NVIDIA, ["Vulkan", "CPU"], [VULKAN, CPU], 'CMAKE_ARGS="-DGGML_CUDA=on" pip install'),
        (NVIDIA, ["CUDA", "CPU"], [CPU], "nvidia-smi"),
        (JETSON, ["CUDA", "CPU"], [CUDA, CPU], None),
        (JETSON, ["CPU"], [CPU], "-DCMAKE_CUDA_ARCHITECTURES=87"),
        (JETSON, ["CUDA", "CPU"], [CPU], "--runtime nvidia"),
        (MAC, ["MTL", "CPU"], [METAL, CPU], None),
        (MAC, ["CPU"], [CPU], 'CMAKE_ARGS="-DGGML_METAL=on" pip install'),
    ],
)
def test_gpu_without_a_build_for_it(
    hardware: Hardware, backends: list[str], devices: list[SimpleNamespace], advice: str | None
) -> None:
    check = doctor.gpu_check(hardware, backends, devices)
    assert statuses([check]) == {"gpu": "ok" if advice is None else "problem"}
    assert (advice or "") in check.advice
    if "pip install" in check.advice:
        assert "--no-binary llama-cpp-python llama-cpp-python==0.3.36" in check.advice


def test_build_arguments_are_those_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for arguments in (doctor.CUDA_ARGS, doctor.JETSON_ARGS):
        assert f'CMAKE_ARGS="{arguments}" make demo' in text


@pytest.mark.parametrize(
    ("hardware", "on", "expected"),
    [
        (PLAIN, CPU, {"memory": "ok"}),
        (replace(PLAIN, memory_available=2 * GB), CPU, {"memory": "warning"}),
        (replace(PLAIN, memory_total=2 * GB), CPU, {"memory": "problem"}),
        # The model is in the GPU's memory: little is needed outside.
        (replace(NVIDIA, memory_total=2 * GB), CUDA, {"memory": "ok", "gpu memory": "ok"}),
        (NVIDIA, device("CUDA0", "gpu", free=GB), {"memory": "ok", "gpu memory": "warning"}),
        (NVIDIA, device("CUDA0", "gpu", 2 * GB), {"memory": "ok", "gpu memory": "problem"}),
        # One memory for both: the offloaded vision file (1 GB of the 3) is there twice.
        (JETSON, CUDA, {"memory": "ok", "gpu memory": "ok"}),
        (
            replace(JETSON, memory_total=int(3.9 * GB)),
            CUDA,
            {"memory": "problem", "gpu memory": "ok"},
        ),
        (
            replace(PLAIN, memory_available=int(3.9 * GB)),
            VULKAN,
            {"memory": "warning", "gpu memory": "ok"},
        ),
        (replace(MAC, memory_total=int(3.9 * GB)), METAL, {"memory": "ok", "gpu memory": "ok"}),
    ],
)
def test_memory(hardware: Hardware, on: SimpleNamespace, expected: dict[str, str]) -> None:
    hardware = replace(
        hardware, memory_available=min(hardware.memory_available, hardware.memory_total)
    )
    checks = list(doctor.memory_checks(hardware, on, needed=3 * GB, mmproj_size=GB))
    assert statuses(checks) == expected
    for check in checks:
        if check.status != "ok":
            assert "smaller quantization" in check.advice
            assert ("--no-mmproj-offload" in check.advice) == (on is not CPU)


def test_memory_needed(tiny_model: Path) -> None:
    files = find_model(tiny_model)
    fields = gguf.GGUFReader(files.text).fields

    def number(key: str) -> int:
        return int(fields[f"qwen2.{key}"].contents())

    head = number("embedding_length") // number("attention.head_count")
    cache = 2 * number("block_count") * number("attention.head_count_kv") * head * 2  # float16
    text, vision = inspect_file(files.text), inspect_file(files.mmproj)
    for n_ctx in (1, 2048):
        rest = files.text.stat().st_size + cache * n_ctx + memory_beside(text, vision)
        vision_size = files.mmproj.stat().st_size
        assert memory_needed(text, vision, n_ctx, on_cpu=False) == rest + vision_size
        assert memory_needed(text, vision, n_ctx, precision="ggml") == rest + vision_size
        packed = memory_needed(text, vision, n_ctx, precision="bf16") - rest
        assert packed == 2 * vision.parameters
        assert memory_needed(text, vision, n_ctx, precision="int8", low_memory=True) == rest


@pytest.mark.parametrize(("free", "status"), [(50 * GB, "ok"), (GB, "warning")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str) -> None:
    asked = []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free)
    )
    check = doctor.disk_check(tmp_path / "not" / "yet")
    assert statuses([check]) == {"disk": status}
    assert asked == [tmp_path]
    assert str(tmp_path / "not" / "yet") in check.detail


def test_disk_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    check = doctor.disk_check(tmp_path)
    assert statuses([check]) == {"disk": "problem"}
    assert "Permission denied" in check.detail


def test_compare() -> None:
    want = np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)
    same = doctor.compare(want, want, "CUDA0", 0.01)
    assert statuses([same]) == {"picture": "ok"}
    assert "relative error 0, cosine 1.000000" in same.detail
    assert doctor.compare(want * 1.009, want, "CUDA0", 0.01).status == "ok"
    for wrong in (want * 1.02, -want, want * np.nan, want * 0):
        check = doctor.compare(wrong, want, "CUDA0", 0.01)
        assert statuses([check]) == {"picture": "problem"}
        assert "--no-mmproj-offload" in check.advice


@pytest.mark.parametrize(("dtype", "quantized"), [("f16", False), ("bf16", False), ("q8_0", True)])
def test_quantized_weights_may_differ_more(tmp_path: Path, dtype: str, quantized: bool) -> None:
    shape = VisionShape(image_size=84, n_embd=128, n_head=2, n_ff=512, n_proj=256)
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape, dtype=dtype)
    assert (inspect_file(path).quantization == "Q8_0") is quantized
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 84, 84)).astype(np.float32)
    got, want = (
        _native.VisionEncoder(os.fsencode(path), "CPU", 2, "ggml", flash_attention=flash).encode(
            pixels
        )[0]
        for flash in (True, False)
    )
    limit = doctor.MAX_ERROR_QUANTIZED if quantized else doctor.MAX_ERROR
    assert doctor.compare(got, want, "CPU", limit).status == "ok"


PLACEMENT = """\
load_tensors:   CPU_Mapped model buffer size =   259.66 MiB
load_tensors:        CUDA0 model buffer size =   942.43 MiB
"""


def test_offload() -> None:
    check = doctor.offload_check(CUDA, PLACEMENT)
    assert statuses([check]) == {"offload": "ok"}
    assert "272.3 MB in CPU_Mapped, 988.2 MB in CUDA0" in check.detail
    assert doctor.offload_check(METAL, PLACEMENT.replace("CUDA0", "MTL0_Mapped")).status == "ok"
    only_cpu = PLACEMENT.splitlines()[0]
    assert statuses([doctor.offload_check(CPU, only_cpu)]) == {"offload": "ok"}
    assert statuses([doctor.offload_check(CUDA, only_cpu)]) == {"offload": "problem"}


@pytest.mark.parametrize("gpu_answer", ["No, there is no egg.", "Yes yes yes"])
def test_answer_of_another_device(monkeypatch: pytest.MonkeyPatch, gpu_answer: str) -> None:
    class FakeModel:
        def __init__(self, _: str, device: str, disk_cache: bool) -> None:
            assert not disk_cache
            self.text = gpu_answer if device == "CUDA0" else "No, there is no egg."

        def __enter__(self) -> FakeModel:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def answer(self, *_: object) -> SimpleNamespace:
            return SimpleNamespace(text=self.text)

    monkeypatch.setattr(doctor, "OmniVLM", FakeModel)
    check = doctor._answer_check(CUDA)
    assert statuses([check]) == {"answer": "ok" if gpu_answer[0] == "N" else "problem"}
    assert gpu_answer in check.detail


@pytest.mark.parametrize("case", ["absent", "damaged", "of two models", "no device"])
def test_problems_are_lines_and_exit_code_1(tmp_path: Path, tiny_model: Path, case: str) -> None:
    (text,) = set(tiny_model.glob("*.gguf")) - set(tiny_model.glob("mmproj*.gguf"))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(text.read_bytes()[:-2000])
    demo = find_model("demo").mmproj
    *arguments, message = {
        "absent": (tmp_path / "none", "no such file"),
        "damaged": (damaged, "--mmproj", demo, "damaged"),
        "of two models": (text, "--mmproj", demo, "different models"),
        "no device": ("demo", "--device", "tpu", "device 'tpu' does not exist"),
    }[case]
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stderr == ""
    problem, advice = result.stdout.splitlines()[-2:]
    assert problem.startswith("problem  ")
    assert str(message) in problem
    assert "next step: " in advice


def test_lines_and_json() -> None:
    lines = run("--device", "cpu").stdout
    result = run("--json", OMNIVLM_DEVICE="cpu")
    report = json.loads(result.stdout)
    assert report["healthy"] == (result.returncode == 0)
    for check in report["checks"]:
        assert set(check) == {"name", "status", "detail", "advice"}
        assert f"{check['status']:<8} {check['name']:<11} " in lines
    assert report["checks"][-1]["name"] == "answer"


def test_environment_chooses_the_device() -> None:
    result = run("--json", OMNIVLM_DEVICE="tpu")
    assert result.returncode == 1
    assert "'tpu'" in json.loads(result.stdout)["checks"][-1]["detail"]
    assert run("--device", "cpu", OMNIVLM_DEVICE="tpu").stdout.splitlines()[-1].startswith("ok")
