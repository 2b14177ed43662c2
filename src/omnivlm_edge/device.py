"""Which of ggml's devices the model runs on. Devices come from ggml's registry at run time."""

from __future__ import annotations

import os

from . import _native
from ._native import Device
from .errors import DeviceError, OptionError
from .values import VISION_PRECISIONS

MAX_THREADS = 512  # GGML_MAX_N_THREADS in ggml

# Names that users type -> ggml's backends, with whose names those of their devices begin.
_PREFIXES = {"cuda": "CUDA", "metal": "MTL", "vulkan": "Vulkan", "sycl": "SYCL", "rocm": "ROCm"}


def available_devices() -> list[Device]:
    """Every device that llama-cpp-python's ggml was built with and finds on this machine."""
    return _native.devices()


def select_device(name: str) -> Device:
    """Finds a device by name, case-insensitive.

    `auto` is the first GPU if there is one, else the CPU; `cpu`, `cuda`, `metal`, `vulkan`… name a
    kind; anything else must be a name from ggml's registry, such as `CUDA1`.

    Raises DeviceError naming the devices that exist, OptionError for what can be no name.
    """
    if not isinstance(name, str):
        raise OptionError(f"device is {name!r}: it must be a name such as 'cpu'")
    devices = available_devices()
    wanted = name.lower()
    if wanted in ("auto", "gpu"):
        matches = [d for d in devices if d.kind == "gpu"] + [d for d in devices if d.kind == "igpu"]
        if wanted == "auto":
            matches += [d for d in devices if d.kind == "cpu"]
    elif wanted in _PREFIXES:
        prefix = _PREFIXES[wanted].lower()
        matches = [d for d in devices if d.name.lower().startswith((prefix, wanted))]
    else:
        matches = [d for d in devices if d.name.lower() == wanted]
    if matches:
        return matches[0]
    hint = ""
    if _PREFIXES.get(wanted) in _native.backends():
        hint = "; llama-cpp-python is built for it, but finds none: see that its driver works"
    elif wanted == "gpu" or wanted in _PREFIXES:
        hint = "; llama-cpp-python must be built for it (see the README)"
    names = ", ".join(d.name for d in devices)
    raise DeviceError(f"device '{name}' does not exist here: there is {names}{hint}")


def check_threads(n_threads: int | None) -> int:
    """A wanted number of CPU threads; None is the cores that this process may use.

    Raises OptionError for anything but a whole number in ggml's range.
    """
    if n_threads is None:
        return available_cores()
    if type(n_threads) is not int or not 1 <= n_threads <= MAX_THREADS:
        raise OptionError(
            f"n_threads is {n_threads!r}: it must be a whole number from 1 to {MAX_THREADS}"
        )
    return n_threads


def check_precision(name: str) -> str:
    """A vision precision's name. Raises OptionError for one that does not exist."""
    if not isinstance(name, str) or name not in VISION_PRECISIONS:
        raise OptionError(
            f"vision precision {name!r} does not exist: choose {', '.join(VISION_PRECISIONS)}"
        )
    return name


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
