"""How patches become image tokens: reshape, no compression, strided convolution, at equal steps.

From the towers that OUT has, each way goes through short stages 1 and 2 on the same pictures.
OUT/ablation/ablation.json and .png tell steps of each stage, validation loss, tokens and time per
picture.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import matplotlib
import torch

import pretrain
import sft
from config import Config
from data import Scenes, to_pixels
from loop import stage_main
from model import load_checkpoint
from scenes import render

WAYS = ("reshape", "none", "convolution")
TIMED = 20  # pictures
QUESTION, ANSWER_TOKENS = "Describe the image", 24


def seconds_per_picture(folder: Path, config: Config) -> float:
    """The median time of a greedy answer of fixed length, one picture at a time, float32."""
    model = load_checkpoint(folder, config.attention).eval()
    model.end = -1  # no answer ends early
    scenes, times = Scenes(config, model.image_size, "validation"), []
    for index in range(TIMED):
        image = render(scenes.scene(index)[0], model.image_size)
        pixels = torch.from_numpy(to_pixels(image, model.image_size).copy())[None]
        began = time.perf_counter()
        model.answer(pixels, [QUESTION], limit=ANSWER_TOKENS)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def train_one(config: Config, out: Path, way: str) -> dict[str, float | int]:
    """Both stages with one way, and what came out."""
    folder = out / "ablation" / way
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("tokenizer", "tower", "language"):
        if (out / part).exists() and not (folder / part).exists():
            (folder / part).symlink_to((out / part).resolve(), target_is_directory=True)
    short = {"steps": config.ablation.steps, "report_every": config.ablation.report_every}
    settings = dataclasses.replace(
        config,
        projector=dataclasses.replace(config.projector, compression=way),
        pretrain=dataclasses.replace(config.pretrain, **short),
        sft=dataclasses.replace(config.sft, **short),
    )
    pretrain.run(settings, folder)
    sft.run(settings, folder)
    lines = [json.loads(line) for line in (folder / "sft" / "log.jsonl").read_text().splitlines()]
    model = load_checkpoint(folder / "sft" / "model")
    return {
        "steps": lines[-1]["step"],
        "image_tokens": model.image_tokens,
        "validation_loss": next(line["val_loss"] for line in lines[::-1] if "val_loss" in line),
        "training_pictures_per_second": statistics.median(
            line["pictures_per_second"] for line in lines if "pictures_per_second" in line
        ),
        "seconds_per_picture": round(seconds_per_picture(folder / "sft" / "model", config), 4),
    }


def plot(results: dict[str, dict[str, float | int]], file: Path) -> None:
    """One panel of bars for each measure."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = ("validation_loss", "image_tokens", "seconds_per_picture")
    figure, panels = pyplot.subplots(1, len(measures), figsize=(11, 3.6))
    for axes, measure in zip(panels, measures, strict=True):
        bars = axes.bar(list(results), [result[measure] for result in results.values()])
        axes.bar_label(bars, fontsize=8)
        axes.set_title(measure.replace("_", " "), fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def run(config: Config, out: Path) -> None:
    """All ways, unless they are done; the results again."""
    results = {way: train_one(config, out, way) for way in WAYS}
    content = {"batch": config.sft.batch} | results
    (out / "ablation" / "ablation.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(results, out / "ablation" / "ablation.png")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
