"""Stage 1: the projector alone, on captions; tower and language model are frozen."""

from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM, SiglipVisionModel

from answers import AnswerTask
from config import Config
from data import CAPTIONS, Batches, PictureRows, Rows, open_sources
from errors import TrainError
from loop import stage_main, train
from model import OmniVLM, new_model
from tokenizer import get_tokenizer


def assemble(config: Config, out: Path) -> OmniVLM:
    """A fresh projector between the towers of the stages before, or of their checkpoints."""
    model = new_model(config, get_tokenizer(config, out))
    for name, stage, kind, settings in (
        ("vision_tower", "tower", SiglipVisionModel, config.vision),
        ("language_model", "language", Qwen2ForCausalLM, config.text),
    ):
        if not settings.checkpoint:
            folder = out / stage / "model"
            if not folder.exists():
                raise TrainError(f"{folder} is missing; run train/{stage}.py first")
            part = getattr(model, name)
            loaded = kind.from_pretrained(folder, config=part.config, dtype=torch.float32)
            setattr(model, name, loaded)
    return model


def run(config: Config, out: Path) -> None:
    """Train the projector, unless it is there."""
    folder = out / "pretrain"
    if (folder / "model").exists():
        return
    torch.manual_seed(config.seed + 2)
    model, settings = assemble(config, out), config.pretrain
    rows = Rows(model.tokenizer, model.image_tokens)
    learnt, held_out = (
        PictureRows(source, rows, config.data.caption_tokens)
        for source in open_sources(config, settings, model.image_size, CAPTIONS, stream=2)
    )
    checks = [held_out.checked(i) for i in range(settings.validation)]
    task = AnswerTask(model, model.projector_parts, config, settings, checks)
    train(task, Batches(learnt, settings.batch), config, settings, folder)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
