"""Stage 2: projector and language model on questions of all kinds; the tower is frozen."""

from pathlib import Path

import torch

from answers import AnswerTask
from config import Config
from data import Batches, PictureRows, Rows, open_sources
from loop import stage_main, train
from model import load_checkpoint


def run(config: Config, out: Path) -> None:
    """Fine-tune, unless it is done."""
    folder = out / "sft"
    if (folder / "model").exists():
        return
    torch.manual_seed(config.seed + 3)
    model = load_checkpoint(out / "pretrain" / "model", config.attention)
    settings = config.sft
    rows = Rows(model.tokenizer, model.image_tokens)
    learnt, held_out = (
        PictureRows(source, rows, config.data.tokens)
        for source in open_sources(
            config, settings, model.image_size, (), 3, settings.relation_share
        )
    )
    checks = [held_out.checked(i) for i in range(settings.validation)]
    parts = (*model.projector_parts, "language_model")
    task = AnswerTask(model, parts, config, settings, checks)
    train(task, Batches(learnt, settings.batch), config, settings, folder)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
