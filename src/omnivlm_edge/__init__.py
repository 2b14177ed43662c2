"""omnivlm-edge: OmniVision-968M and models of its kind on small machines.

from omnivlm_edge import OmniVLM

with OmniVLM("demo") as model:
    print(model.answer("horses.png", "Describe the image").text)
"""

from importlib.metadata import version

from .device import available_devices
from .engine import OmniVLM
from .errors import (
    BusyError,
    ClosedError,
    ContextOverflowError,
    ConvertError,
    DeviceError,
    ImageError,
    ModelFileError,
    OmniVLMError,
    OptionError,
)
from .values import Answer, GenerateOptions, ImageEmbedding, ModelFiles, Timings

__all__ = [
    "Answer",
    "BusyError",
    "ClosedError",
    "ContextOverflowError",
    "ConvertError",
    "DeviceError",
    "GenerateOptions",
    "ImageEmbedding",
    "ImageError",
    "ModelFileError",
    "ModelFiles",
    "OmniVLM",
    "OmniVLMError",
    "OptionError",
    "Timings",
    "available_devices",
]

__version__ = version("omnivlm-edge")
