"""Choosing a device among those that ggml reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from omnivlm_edge import DeviceError, available_devices
from omnivlm_edge.device import select_device

CPU = SimpleNamespace(name="CPU", kind="cpu")
BLAS = SimpleNamespace(name="BLAS", kind="accel")
METAL = SimpleNamespace(name="MTL0", kind="gpu")
CUDA0, CUDA1 = (SimpleNamespace(name=f"CUDA{i}", kind="gpu") for i in range(2))
VULKAN = SimpleNamespace(name="Vulkan0", kind="igpu")


def test_this_machine_has_a_cpu() -> None:
    assert "cpu" in {device.kind for device in available_devices()}
    cpu = select_device("CPU")
    assert cpu.handle != 0
    assert cpu.memory_total > 0


@pytest.mark.parametrize(
    ("devices", "name", "chosen"),
    [
        ([BLAS, CPU], "auto", CPU),
        ([CUDA0, CUDA1, CPU], "auto", CUDA0),
        ([VULKAN, CPU], "auto", VULKAN),
        ([VULKAN, CUDA0, CPU], "auto", CUDA0),
        ([CUDA0, CPU], "cpu", CPU),
        ([VULKAN, CUDA0, CUDA1, CPU], "cuda", CUDA0),
        ([CUDA0, CUDA1, CPU], "cuda1", CUDA1),
        ([METAL, BLAS, CPU], "Metal", METAL),
        ([CUDA0, VULKAN, CPU], "vulkan", VULKAN),
        ([CUDA0, CPU], "gpu", CUDA0),
    ],
)
def test_select(
    monkeypatch: pytest.MonkeyPatch,
    devices: list[SimpleNamespace],
    name: str,
    chosen: SimpleNamespace,
) -> None:
    monkeypatch.setattr("omnivlm_edge._native.devices", lambda: devices)
    assert select_device(name) is chosen


@pytest.mark.parametrize("name", ["cuda", "gpu", "CUDA1", "tpu", ""])
def test_absent_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("omnivlm_edge._native.devices", lambda: [BLAS, CPU])
    with pytest.raises(DeviceError, match="there is BLAS, CPU"):
        select_device(name)


@pytest.mark.parametrize(
    ("backends", "hint"), [(["CPU"], "must be built for it"), (["CUDA", "CPU"], "finds none")]
)
def test_absent_device_says_whether_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, backends: list[str], hint: str
) -> None:
    monkeypatch.setattr("omnivlm_edge._native.devices", lambda: [CPU])
    monkeypatch.setattr("omnivlm_edge._native.backends", lambda: backends)
    with pytest.raises(DeviceError, match=hint):
        select_device("cuda")
