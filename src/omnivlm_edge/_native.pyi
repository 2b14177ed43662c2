"""Vision tower and projector of OmniVLM on ggml."""

from typing import Annotated

import numpy
from numpy.typing import NDArray


class Device:
    """One device of ggml's backend registry."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def kind(self) -> str:
        """'cpu', 'gpu', 'igpu' or 'accel'."""

    @property
    def handle(self) -> int:
        """Address of the ggml_backend_dev_t."""

    @property
    def memory_free(self) -> int:
        """Bytes."""

    @property
    def memory_total(self) -> int:
        """Bytes."""

class VisionHparams:
    """What the mmproj file says about the model."""

    @property
    def image_size(self) -> int:
        """Pixels, square."""

    @property
    def patch_size(self) -> int:
        """Pixels, square."""

    @property
    def n_embd(self) -> int:
        """Width of the tower."""

    @property
    def n_layer(self) -> int: ...

    @property
    def n_head(self) -> int: ...

    @property
    def n_merge(self) -> int:
        """Consecutive patches joined into one token."""

    @property
    def n_embd_text(self) -> int:
        """Width of one image token."""

    @property
    def n_tokens(self) -> int:
        """Image tokens a picture becomes."""

    @property
    def image_mean(self) -> list[float]: ...

    @property
    def image_std(self) -> list[float]: ...

    @property
    def prompt_variant(self) -> str:
        """Empty when the file names none."""

    @property
    def single_turn(self) -> bool:
        """Trained on conversations of one question only."""

class TextFile:
    """What is known of a text model's file before it is loaded."""

    @property
    def quantized(self) -> bool:
        """Some of its tensors are."""

    @property
    def n_embd(self) -> int:
        """
        Width of what `embed` gives; 0 for models whose tokens become embeddings in another way.
        """

    def embed(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """
        int32 [n] -> float32 [n, n_embd], as llama.cpp computes it. Raises IndexError.
        """

class ChannelSums:
    """Sums over the rows of activations that one weight matrix multiplied."""

    @property
    def values(self) -> list[float]:
        """One for each input channel."""

    @property
    def squares(self) -> list[float]:
        """Of the squared values."""

    @property
    def n_rows(self) -> int: ...

class ImportanceCollector:
    """Adds up the activations that meet a model's weights."""

    def __init__(self) -> None: ...

    @property
    def address(self) -> int:
        """What `importance_callback_address` takes as its user data."""

    def sums(self) -> dict[str, ChannelSums]:
        """By the weights' names in their files."""

def importance_callback_address() -> int:
    """Address of the ggml_backend_sched_eval_callback that collects."""

class VisionEncoder:
    """The vision path of one mmproj file on one device."""

    def __init__(self, path: bytes, device: str, n_threads: int, precision: str = 'auto', low_memory: bool = False, kernels: str = '', flash_attention: bool = True) -> None: ...

    def encode(self, pixels: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu', writable=False)], collector: ImportanceCollector | None = None) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None, None))]:
        """
        float32 [n, 3, image_size, image_size], normalised -> float32 [n, n_tokens, n_embd_text].
        """

    def profile(self, pixels: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu', writable=False)]) -> dict[str, float]:
        """
        float32 [1, 3, image_size, image_size] -> seconds of each kind of node, by name.
        """

    @property
    def hparams(self) -> VisionHparams: ...

    @property
    def precision(self) -> str:
        """What `auto` became; `ggml` where ggml computes."""

    @property
    def kernels(self) -> str:
        """The instruction set; empty where ggml computes."""

def peak_gops(precision: str, n_threads: int) -> float:
    """
    1e9 operations a second of the instructions that a precision's kernels multiply with; 0 for `ggml`.
    """

def cpu_precision(precision: str) -> str:
    """What a precision becomes on this machine's CPU."""

def kernels() -> list[str]:
    """
    The instruction sets that this machine has kernels for, the quickest first.
    """

def devices() -> list[Device]:
    """Every device that ggml was built with and finds on this machine."""

def backends() -> list[str]:
    """
    What ggml was built with, whether or not it finds a device for it here.
    """

def release_mappings(path: bytes) -> None:
    """
    Gives the memory behind this process's mappings of a file back; it is read again when touched.
    """

def ggml_version() -> str: ...

def install_text_kernels() -> bool:
    """
    Lets llama.cpp multiply and attend by our kernels; False where there are none for this machine.
    """

def inspect_text_file(path: bytes) -> TextFile:
    """
    Raises ModelFileError for damage in a text model's file that llama.cpp would not survive.
    """

def quantize(rows: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: int, n_threads: int, importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
    """
    float32 [n_rows, n_per_row] -> uint8 [n_rows, bytes of a row] in the ggml type of that number.

    `importance`, float32 [n_per_row] and positive, weighs the squared error of each column: with it ggml
    looks for the scales of least error, which takes longer.

    Releases the GIL. Raises ValueError for a type or row length that ggml cannot do, and for a value
    that is not finite or larger than 65504.
    """

def log_sink_address() -> int:
    """
    Address of the ggml_log_callback that collects errors instead of printing.
    """

def take_log_error() -> str:
    """The first error logged on this thread since the last call."""

def take_log_placement() -> str:
    """
    The lines on this thread, since the last call, that say how much of a model went into which memory.
    """
