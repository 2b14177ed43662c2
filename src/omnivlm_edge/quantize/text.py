"""A text model goes through llama.cpp's own quantizer, in a process of its own.

That process can be killed, which llama.cpp's loop cannot, and may abort without taking ours along.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .. import _native
from ..convert.output import publishing
from ..errors import ModelFileError
from .plan import Job
from .recipes import FLOATS

# sys.path travels as escaped text: not every path is text that a command line can carry.
_CHILD = "import sys; sys.path[:] = {!a}; from omnivlm_edge.quantize.llama import main; main()"


def quantize_text(job: Job) -> None:
    """Raises ModelFileError when llama.cpp refuses the file, ConvertError when the disk does."""
    source = job.source.path
    _native.inspect_text_file(os.fsencode(source))  # what llama.cpp would not survive
    matrices = [tensor for tensor in job.tensors if tensor.is_matrix]
    order = {
        "source": os.fsencode(source),
        "types": {tensor.name: int(tensor.target) for tensor in matrices},
        "importance": {tensor.name: job.importance(tensor) for tensor in matrices},
        "keys": dict(job.keys),
        "n_threads": job.n_threads,
        "allow_requantize": any(tensor.source.name not in FLOATS for tensor in matrices),
    }
    with publishing([job.output], sum(t.nbytes for t in job.tensors), [source]) as (part,):
        reason = _run(order | {"output": os.fsencode(part)}, job.progress)
        if "iostream error" in reason:  # all that llama.cpp says of it
            raise OSError("the disk is full or failed")
        if reason:
            raise ModelFileError(f"{source}: llama.cpp cannot quantize this text model ({reason})")


def _run(order: dict[str, Any], progress: Callable[[int, int], None]) -> str:
    """Runs the child and follows llama.cpp's log; the reason of a failure, or nothing."""
    line = ""
    with tempfile.TemporaryFile() as stdin:  # a pipe could fill up before the child reads
        pickle.dump((os.getpid(), order), stdin)
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(sys.path)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        ) as child:
            try:
                for line in child.stderr or ():
                    if step := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
                        progress(int(step[1]), int(step[2]))
            except BaseException:
                child.kill()
                raise
    if child.returncode == 0:
        return ""
    told = re.search(r"(?<=failed to quantize: ).*|GGML_ASSERT.*", line)
    return told[0] if told else f"it ended with status {child.returncode}"
