"""Checkpoints and published files -> the two GGUF files that omnivlm-edge runs.

    config.json, preprocessor_config.json -> config.py      numbers, checked
    tokenizer.json | vocab.json, ...      -> tokenizer.py   vocabulary, checked
    *.safetensors                         -> weights.py     one tensor at a time
                                             tensor_map.py  name -> name -> shape, for every tensor
                                             keys.py        numbers -> GGUF keys
                                             output.py      temporary file -> final name

`checkpoint.py` puts these in order for a Hugging Face checkpoint, `mmproj.py` for the published
`siglip` file.
"""

from .checkpoint import convert_checkpoint
from .config import OUTTYPES
from .mmproj import convert_mmproj

__all__ = ["OUTTYPES", "convert_checkpoint", "convert_mmproj"]
