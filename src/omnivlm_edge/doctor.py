"""Is everything in order here? Each check becomes a `Check`; nothing is printed.

versions, devices, disk -> model, memory -> a picture and an answer, on the device and the CPU
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image, ImageDraw

from . import _native
from ._native import Device
from .decoder import system_info
from .device import available_devices, check_threads, select_device
from .engine import OmniVLM
from .errors import OmniVLMError
from .hub import downloads_dir
from .image import normalise, resize
from .memory import ALLOWANCE, memory_needed
from .model_file import inspect_file
from .models import find_model
from .values import DEFAULT_N_CTX, GenerateOptions, ModelFiles

Status = Literal["ok", "warning", "problem"]

PACKAGES = "omnivlm-edge llama-cpp-python gguf numpy pillow huggingface_hub".split()
# Largest relative error of an embedding. Two kinds of attention on one CPU differ by 0.0006 at the
# published sizes in F16, by 0.005 in BF16, and by 0.02 where quantized weights make ggml round the
# activations to 8 bits.
MAX_ERROR, MAX_ERROR_QUANTIZED = 0.01, 0.05
MIN_DISK = 2_000_000_000  # bytes: the published F16 files together
QUESTION = "Is there an egg?"  # the demo's answer about our picture is far from a tie

# What llama-cpp-python must be compiled with, as in the README's table of devices.
CUDA_ARGS = "-DGGML_CUDA=on"
JETSON_ARGS = "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=87"
METAL_ARGS = "-DGGML_METAL=on"


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is the next step; empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Hardware:
    """What the machine has, whatever ggml was built for. Memory in bytes."""

    nvidia: bool
    jetson: bool
    apple_silicon: bool
    memory_total: int
    memory_available: int


def probe(root: Path = Path("/")) -> Hardware:
    """Looks at this machine; `root` is where its files hang.

    A Jetson says so in /etc/nv_tegra_release, in containers in its device tree; it has neither of
    the files of NVIDIA's desktop driver.
    """
    try:
        compatible = (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        compatible = b""
    jetson = (root / "etc/nv_tegra_release").exists() or b"tegra" in compatible
    driver = ("proc/driver/nvidia/version", "dev/nvidia0")
    memory = psutil.virtual_memory()
    return Hardware(
        nvidia=jetson or any((root / file).exists() for file in driver),
        jetson=jetson,
        apple_silicon=(platform.system(), platform.machine()) == ("Darwin", "arm64"),
        memory_total=memory.total,
        memory_available=memory.available,
    )


def examine(
    model: str | os.PathLike[str] = "demo",
    mmproj: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    hardware: Hardware | None = None,
) -> Iterator[Check]:
    """Checks the machine and the installation, then MODEL on the device; never raises our errors.

    Later checks build on earlier ones: without a device or a model they end there.
    """
    hardware = hardware or probe()
    devices = available_devices()
    yield _versions()
    yield _system(hardware)
    yield Check("ggml", "ok", f"{_native.ggml_version()}; {system_info().replace(' = 1', '')}")
    yield Check("devices", "ok", "; ".join(map(_describe, devices)))
    yield gpu_check(hardware, _native.backends(), devices)
    yield disk_check(downloads_dir())
    try:
        chosen = select_device(device)
    except OmniVLMError as exc:
        advice = "name one of the devices above with --device, or leave it out"
        yield Check("device", "problem", str(exc), advice)
        return
    try:
        files = find_model(model, mmproj, offline=True)
        vision = inspect_file(files.mmproj)
        on_cpu = chosen.kind == "cpu"
        needed = memory_needed(inspect_file(files.text), vision, DEFAULT_N_CTX, on_cpu=on_cpu)
    except OmniVLMError as exc:
        yield Check("model", "problem", str(exc), "check MODEL and --mmproj")
        return
    yield Check("model", "ok", f"{files.text} and {files.mmproj}")
    yield from memory_checks(hardware, chosen, needed, vision.size)
    try:
        yield from _model_checks(files, chosen)
        yield _answer_check(chosen)
    except OmniVLMError as exc:
        advice = "get MODEL again"
        if chosen.kind != "cpu":
            advice = "see whether --device cpu works: if so, use it, or free the device's memory"
        yield Check("model", "problem", str(exc), advice)


def gpu_check(hardware: Hardware, backends: Sequence[str], devices: Sequence[Device]) -> Check:
    """Whether a GPU of the machine goes unused because nothing here was built for it."""
    name = "gpu"
    gpus = [device.name for device in devices if device.kind in ("gpu", "igpu")]
    if hardware.nvidia and not any(gpu.startswith("CUDA") for gpu in gpus):
        what = "a Jetson" if hardware.jetson else "an NVIDIA GPU"
        if "CUDA" in backends:
            return Check(
                name,
                "problem",
                f"this machine has {what} and llama-cpp-python its CUDA build, but CUDA finds none",
                "check the driver with nvidia-smi and update it; start a container with --gpus all "
                "(on a Jetson with --runtime nvidia)",
            )
        return Check(
            name,
            "problem",
            f"this machine has {what}, but llama-cpp-python was built without CUDA",
            _rebuild(JETSON_ARGS if hardware.jetson else CUDA_ARGS),
        )
    if hardware.apple_silicon and not any(gpu.startswith("MTL") for gpu in gpus):
        return Check(
            name,
            "problem",
            "this Mac has an Apple GPU, but there is no Metal device",
            _rebuild(METAL_ARGS),
        )
    return Check(name, "ok", ", ".join(gpus) or "none found; the CPU does all the work")


def memory_checks(
    hardware: Hardware, device: Device, needed: int, mmproj_size: int
) -> Iterator[Check]:
    """Whether a model that needs `needed` bytes fits the memory, and that of its device."""
    unified = hardware.jetson or hardware.apple_silicon or device.kind == "igpu"
    smaller = "take a smaller quantization of the model"
    if device.kind == "cpu":
        yield _fits("memory", needed, hardware.memory_total, hardware.memory_available, smaller)
        return
    elsewhere = f"add --no-mmproj-offload to run, or {smaller}"
    if unified:
        # While it is loaded the vision file lies in this memory twice, as the pages of the file and
        # as the device's copy; Metal alone computes on the file's own pages.
        copy = 0 if hardware.apple_silicon else mmproj_size
        total, available = hardware.memory_total, hardware.memory_available
        yield _fits("memory", needed + copy, total, available, elsewhere)
    else:
        total, available = hardware.memory_total, hardware.memory_available
        yield _fits("memory", ALLOWANCE, total, available, smaller)
    yield _fits("gpu memory", needed, device.memory_total, device.memory_free, elsewhere)


def disk_check(directory: Path) -> Check:
    """Whether a published model fits the disk that downloads go to."""
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    try:
        free = shutil.disk_usage(existing).free
    except OSError as exc:
        return Check(
            "disk",
            "problem",
            f"{existing}: cannot be looked at ({exc.strerror})",
            "set HF_HOME to a directory of yours",
        )
    detail = f"{_gb(free)} free for downloads in {directory}"
    if free < MIN_DISK:
        advice = "free some space, or set HF_HOME to a directory on a larger disk"
        return Check("disk", "warning", detail, advice)
    return Check("disk", "ok", detail)


def compare(
    got: npt.NDArray[np.float32], want: npt.NDArray[np.float32], what: str, limit: float
) -> Check:
    """Two embeddings of one picture, [n_tokens, n_embd]: how far `got` is from the reference."""
    with np.errstate(invalid="ignore", divide="ignore"):  # all may be zero, or no number
        scale = np.linalg.norm(want)
        error = np.linalg.norm(got - want) / scale
        cosine = np.vdot(got, want) / (np.linalg.norm(got) * scale)
    detail = f"{what}: relative error {error:.2g}, cosine {cosine:.6f}"
    if error <= limit:
        return Check("picture", "ok", detail)
    return Check(  # also for an error that is not a number
        "picture",
        "problem",
        f"{detail}: this device computes pictures wrongly",
        "add --no-mmproj-offload or --device cpu to run, and update the device's driver",
    )


def known_picture() -> Image.Image:
    """Gradients and shapes with edges in all directions, 480 × 360."""
    size = (480, 360)
    ramp = Image.linear_gradient("L").resize(size)
    glow = Image.radial_gradient("L").resize(size)
    picture = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), glow))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 60, 160, 180), fill="red")
    draw.rectangle((220, 40, 340, 160), fill="yellow", outline="black", width=6)
    draw.polygon([(380, 300), (460, 300), (420, 200)], fill="green")
    draw.line((0, 359, 479, 0), fill="white", width=4)
    return picture


def _versions() -> Check:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return Check("versions", "ok", ", ".join(found))


def _system(hardware: Hardware) -> Check:
    kinds = {
        "Jetson": hardware.jetson,
        "NVIDIA GPU": hardware.nvidia and not hardware.jetson,
        "Apple silicon": hardware.apple_silicon,
    }
    found = [kind for kind, present in kinds.items() if present]
    parts = [platform.platform(), f"Python {platform.python_version()}", *found]
    return Check("system", "ok", ", ".join(parts))


def _describe(device: Device) -> str:
    free, total = device.memory_free, device.memory_total
    return f"{device.name} ({device.description}), {_gb(free)} of {_gb(total)} free"


def _rebuild(cmake_args: str) -> str:
    llama = f"llama-cpp-python=={version('llama-cpp-python')}"
    return (
        f'CMAKE_ARGS="{cmake_args}" pip install --force-reinstall --no-deps --no-cache-dir '
        f"--no-binary llama-cpp-python {llama}; then, in the source of omnivlm-edge, "
        "pip install scikit-build-core nanobind cmake ninja and "
        "pip install --force-reinstall --no-deps --no-build-isolation . "
        f'(after make instead of both: rm -rf .venv; CMAKE_ARGS="{cmake_args}" make demo)'
    )


def _fits(name: str, needed: int, total: int, available: int, advice: str) -> Check:
    detail = f"{_gb(needed)} needed, {_gb(available)} of {_gb(total)} free"
    if total < needed:
        return Check(name, "problem", detail, advice)
    if available < needed:
        return Check(name, "warning", detail, f"close other programs, or {advice}")
    return Check(name, "ok", detail)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _model_checks(files: ModelFiles, device: Device) -> Iterator[Check]:
    """Where the model's weights are, and what its vision path computes there."""
    _native.take_log_placement()
    picture = known_picture()
    with OmniVLM(files.text, files.mmproj, device=device.name, disk_cache=False) as engine:
        yield offload_check(device, _native.take_log_placement())
        got = engine.encode(picture).data
        precision = engine.vision_precision
    cpu = select_device("cpu")
    reference = _native.VisionEncoder(
        os.fsencode(files.mmproj), cpu.name, check_threads(None), "ggml", flash_attention=False
    )
    h = reference.hparams
    pixels = normalise(resize(picture, h.image_size), h.image_mean, h.image_std)
    want = reference.encode(pixels[None])[0]
    what = f"{device.name} ({precision}) against explicit attention on the CPU (ggml)"
    floats = ("F32", "F16", "BF16")
    exact = inspect_file(files.mmproj).quantization in floats and "int8" not in precision
    limit = MAX_ERROR if exact else MAX_ERROR_QUANTIZED
    yield compare(got, want, what, limit)


def offload_check(device: Device, placement: str) -> Check:
    """Where the weights are. `placement` is what llama.cpp logged while it loaded the text model.

    Each memory has a line there, such as `load_tensors: CUDA0 model buffer size = 942.43 MiB`. The
    vision weights need no question: they lie on the device, or its construction has failed.
    """
    sizes = re.findall(r"(\S+) +model buffer size = +([\d.]+) MiB", placement)
    detail = ", ".join(f"{float(mib) * 2**20 / 1e6:.1f} MB in {name}" for name, mib in sizes)
    detail = f"vision weights on {device.name}, text model: {detail}"
    if device.kind == "cpu" or any(name.startswith(device.name) for name, _ in sizes):
        return Check("offload", "ok", detail)
    return Check(
        "offload",
        "problem",
        f"{detail}: nothing of it on {device.name}",
        "free memory on that device, or use --device cpu",
    )


def _answer_check(device: Device) -> Check:
    """The demo's greedy answer on the device and on the CPU, which must be the same."""
    cpu = select_device("cpu")
    answers = []
    for place in dict.fromkeys((cpu.name, device.name)):
        with OmniVLM("demo", device=place, disk_cache=False) as engine:
            answers.append(
                engine.answer(known_picture(), QUESTION, GenerateOptions(max_tokens=32)).text
            )
    if len(set(answers)) == 1:
        return Check("answer", "ok", f"the demo on {device.name}: {answers[0]}")
    return Check(
        "answer",
        "problem",
        f"the demo says {answers[1]!r} on {device.name} and {answers[0]!r} on the CPU",
        "use --device cpu, and update the device's driver",
    )
