"""OpenVINO in bfloat16 and in INT8 (NNCF), converted from the same PyTorch module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino

from .base import Files, Pixels, SkippedError, Tokens, is_current

LIBRARIES = ("openvino", "nncf")
CALIBRATION = 4  # random pictures


def prepare(files: Files, *, precision: str) -> None:
    """Converts the module, and quantizes it for INT8."""
    path = _model_file(files, precision)
    if is_current(path, files.mmproj):
        return
    model = _quantized(files) if precision == "int8" else _converted(files)
    openvino.save_model(model, path, compress_to_fp16=precision != "int8")


class OpenVinoEncoder:
    def __init__(self, files: Files, threads: int, *, precision: str) -> None:
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_HYPER_THREADING": True,  # else it may take fewer
            "PERFORMANCE_HINT": "LATENCY",
        }
        if precision == "bf16":
            if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                raise SkippedError("OpenVINO does not compute in bf16 on this CPU")
            options["INFERENCE_PRECISION_HINT"] = "bf16"
        model = core.compile_model(_model_file(files, precision), "CPU", options)
        self._request = model.create_infer_request()
        self.side = model.input(0).shape[2]

    def convert(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        from omnivlm_edge.image import normalise

        return np.stack([normalise(picture, [0.5] * 3, [0.5] * 3) for picture in pixels])

    def encode(self, converted: npt.NDArray[np.float32]) -> Tokens:
        tokens: Tokens = self._request.infer([converted])[0]
        return tokens


load = OpenVinoEncoder


def _converted(files: Files) -> openvino.Model:
    """The module for one picture: float32 [1, 3, side, side] -> [1, n_tokens, width]."""
    import torch

    from .siglip import Siglip

    module = Siglip(files.mmproj)
    example = torch.zeros(1, 3, module.side, module.side)
    with torch.no_grad():
        return openvino.convert_model(module, example_input=example, input=[example.shape])


def _quantized(files: Files) -> openvino.Model:
    import nncf

    model = _converted(files)
    shape = list(model.input(0).shape)
    rng = np.random.default_rng(0)
    pictures = [rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(CALIBRATION)]
    return nncf.quantize(
        model,
        nncf.Dataset(pictures),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION,
    )


def _model_file(files: Files, precision: str) -> Path:
    return files.scratch / f"openvino-{precision}.xml"
