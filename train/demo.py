"""Everything in order, from nothing to a converted and quantized pair of GGUF files.

Each step is passed over when its result is there; one that was stopped goes on where it stopped.
With `checkpoint`s in the configuration the towers' own stages fall away.
"""

import shutil
from pathlib import Path

from accelerate import PartialState

import dpo
import language
import pretrain
import sft
import tower
from config import Config
from errors import TrainError
from loop import stage_main
from omnivlm_edge.convert import convert_checkpoint
from omnivlm_edge.errors import OmniVLMError
from omnivlm_edge.quantize.file import output_name, quantize_file
from omnivlm_edge.quantize.recipes import recipe_name

STAGES = (tower, language, pretrain, sft, dpo)


def check(config: Config) -> None:
    """Raises TrainError for what could not be converted after hours."""
    if config.projector.compression == "convolution":
        raise TrainError(
            "a model with a convolution cannot be converted; run its stages one by one"
        )
    if config.quantize:
        try:
            recipe_name(config.quantize)
        except OmniVLMError as error:
            raise TrainError(f"quantize: {error}") from error


def is_older(file: Path, source: Path) -> bool:
    """Whether a file is missing, or was made before what it is made from."""
    return not file.exists() or file.stat().st_mtime < source.stat().st_mtime


def convert(config: Config, out: Path) -> None:
    """OUT/dpo/model -> OUT/gguf and, with a recipe, OUT/gguf-RECIPE."""
    folder, source = out / "gguf", out / "dpo" / "model"
    try:
        made = list(folder.glob("*.gguf"))
        if not made or any(is_older(file, source / "model.safetensors") for file in made):
            shutil.rmtree(folder, ignore_errors=True)
            convert_checkpoint(source, folder, config.outtype, name="demo")
        if config.quantize:
            smaller = out / f"gguf-{config.quantize}"
            smaller.mkdir(exist_ok=True)
            for file in sorted(folder.glob("*.gguf")):
                output = smaller / output_name(file, config.quantize)
                if is_older(output, file):
                    output.unlink(missing_ok=True)
                    quantize_file(file, output, config.quantize)
    except OmniVLMError as error:
        raise TrainError(str(error)) from error


def run(config: Config, out: Path) -> None:
    """All of it."""
    check(config)
    for stage in STAGES:
        print(f"{stage.__name__}: {stage.__doc__.splitlines()[0]}", flush=True)
        stage.run(config, out)
    with PartialState().main_process_first():  # the others find the files
        convert(config, out)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
