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


def convert(config: Config, out: Path) -> None:
    """OUT/dpo/model -> OUT/gguf and, with a recipe, OUT/gguf-RECIPE."""
    folder, source = out / "gguf", out / "dpo" / "model"
    try:
        made = min((file.stat().st_mtime for file in folder.glob("*.gguf")), default=0.0)
        if made < (source / "model.safetensors").stat().st_mtime:
            for earlier in out.glob("gguf*"):
                shutil.rmtree(earlier)
            convert_checkpoint(source, folder, config.outtype, name="demo")
        if config.quantize:
            smaller = out / f"gguf-{config.quantize}"
            smaller.mkdir(exist_ok=True)
            for source in sorted(folder.glob("*.gguf")):
                output = smaller / output_name(source, config.quantize)
                if not output.exists():
                    quantize_file(source, output, config.quantize)
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
