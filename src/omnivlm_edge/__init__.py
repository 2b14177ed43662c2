"""omnivlm-edge: OmniVision-968M and models of its kind on small machines.

from omnivlm_edge import OmniVLM

with OmniVLM("demo") as model:
    print(model.answer("horses.png", "Describe the image").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chat import Chat as Chat
    from .chat_handler import OmniVLMChatHandler as OmniVLMChatHandler
    from .compare import ExamQuestion as ExamQuestion
    from .compare import Loss as Loss
    from .compare import TextLoss as TextLoss
    from .compare import VisionLoss as VisionLoss
    from .compare import compare_models as compare_models
    from .device import available_devices as available_devices
    from .engine import OmniVLM as OmniVLM
    from .errors import BusyError as BusyError
    from .errors import ClosedError as ClosedError
    from .errors import ContextOverflowError as ContextOverflowError
    from .errors import ConvertError as ConvertError
    from .errors import DeadlineError as DeadlineError
    from .errors import DeviceError as DeviceError
    from .errors import ImageError as ImageError
    from .errors import ModelFileError as ModelFileError
    from .errors import OmniVLMError as OmniVLMError
    from .errors import OptionError as OptionError
    from .errors import OutputError as OutputError
    from .errors import QueueFullError as QueueFullError
    from .grammar import json_schema_grammar as json_schema_grammar
    from .quantize.file import quantize_file as quantize_file
    from .quantize.recipes import QuantizeOptions as QuantizeOptions
    from .values import Answer as Answer
    from .values import GenerateOptions as GenerateOptions
    from .values import ImageEmbedding as ImageEmbedding
    from .values import ModelFiles as ModelFiles
    from .values import Timings as Timings
    from .values import Turn as Turn

# Every public name and where it lives; loaded at its first use, because llama.cpp takes a while
# that `omnivlm-edge --help` need not spend.
_HOME = {
    "Answer": "values",
    "BusyError": "errors",
    "Chat": "chat",
    "ClosedError": "errors",
    "ContextOverflowError": "errors",
    "ConvertError": "errors",
    "DeadlineError": "errors",
    "DeviceError": "errors",
    "ExamQuestion": "compare",
    "GenerateOptions": "values",
    "ImageEmbedding": "values",
    "ImageError": "errors",
    "Loss": "compare",
    "ModelFileError": "errors",
    "ModelFiles": "values",
    "OmniVLM": "engine",
    "OmniVLMChatHandler": "chat_handler",
    "OmniVLMError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "QueueFullError": "errors",
    "QuantizeOptions": "quantize.recipes",
    "TextLoss": "compare",
    "Timings": "values",
    "Turn": "values",
    "VisionLoss": "compare",
    "available_devices": "device",
    "compare_models": "compare",
    "json_schema_grammar": "grammar",
    "quantize_file": "quantize.file",
}

__all__ = list(_HOME)

__version__: str


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        value = import_module("importlib.metadata").version("omnivlm-edge")
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
