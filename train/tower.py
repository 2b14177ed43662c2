"""The vision tower: SigLIP's contrastive loss on captions, and labels of every patch.

Through captions or answers alone the tower learns next to nothing in hours; the labels (which thing
is on a patch, whose centre is there, how many of that kind the scene has, its colour and size, the
setting) teach it in minutes. The centres make places easy to tell; the numbers make captions
countable, because a caption says "two" before it says of what.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from config import Config
from data import Batches, Example, Scenes
from loop import Task, stage_main, train
from model import replace_folder, vision_config
from questions import LABELS, caption, description
from scenes import Scene, patch_labels
from things import COLOURS, SETTINGS
from tokenizer import get_tokenizer

COLOUR = {name: label for label, name in enumerate(COLOURS, 1)}
SETTING = {name: label for label, name in enumerate(SETTINGS, 1)}
KINDS = ("thing", "centre", "number", "colour", "size", "setting")


def labels_of(scene: Scene, image_size: int, patch: int) -> np.ndarray:
    """int64 [6, P]: the rows of `patch_labels`, the covering thing's colour and size where these
    can be named, and the setting where nothing is; -100 for what is not to be learned."""
    known = patch_labels(scene, image_size, patch)
    things = known[0]
    more = np.full((3, len(things)), -100)
    for kind in scene.counts:
        here = things == kind + 1
        if colour := scene.colour(kind):
            more[0, here] = COLOUR[colour]
        more[1, here] = 2 + scene.size(kind)
    more[2, things == 0] = SETTING[scene.setting]
    return np.concatenate((known, more))


class TowerExamples:
    """Picture n: "pixels", "labels" int64 [6, P] and the ids of a caption or description."""

    def __init__(self, config: Config, tokenizer: Tokenizer, split: str = "train") -> None:
        self.vision, self.length = config.vision, config.tower.text_tokens
        self.scenes = Scenes(
            config, self.vision.image_size, split, stream=0, home_share=config.tower.home_share
        )
        self.encode = lru_cache(maxsize=20_000)(lambda text: tokenizer.encode(text).ids)
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def __call__(self, index: int) -> Example:
        scene, rng = self.scenes.scene(index)
        language = str(rng.choice(self.scenes.languages))
        text = description(scene, rng, language) if rng.random() < 0.5 else caption(scene, language)
        # SigLIP's text encoder reads the last place: the text is cut, then padded.
        ids = self.encode(text)[: self.length - 1]
        return {
            "pixels": self.scenes.pixels(scene, rng),
            "labels": labels_of(scene, self.vision.image_size, self.vision.patch_size),
            "caption": np.array(ids + [self.pad] * (self.length - len(ids))),
        }


class TowerTask(Task):
    """SigLIP with its pooling head and text encoder, and a linear map from patches to labels."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.settings, self.examples = config.tower, TowerExamples(config, tokenizer, "validation")
        vision = vision_config(config.vision, config.attention)
        text = {
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": config.tower.text_width,
            "intermediate_size": 2 * config.tower.text_width,
            "num_hidden_layers": config.tower.text_layers,
            "num_attention_heads": config.tower.text_heads,
            "max_position_embeddings": config.tower.text_tokens,
            "projection_size": vision.hidden_size,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        }
        both = SiglipConfig(
            text_config=text, vision_config=vision.to_dict() | {"vision_use_head": True}
        )
        both._attn_implementation = config.attention
        self.siglip = SiglipModel(both)
        with torch.no_grad():  # SigLIP's own start
            self.siglip.logit_scale.fill_(np.log(10))
            self.siglip.logit_bias.fill_(-10)
        self.labels = nn.Linear(vision.hidden_size, len(KINDS) * LABELS)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""
        pixels = batch["pixels"] / 127.5 - 1
        out = self.siglip(input_ids=batch["caption"], pixel_values=pixels, return_loss=True)
        contrast, pairs = out.loss, out.logits_per_image  # [B, B]
        logits = self.labels(out.vision_model_output.last_hidden_state)  # [B, P, 6 * LABELS]
        logits = logits.float().view(-1, LABELS)
        truth = batch["labels"].transpose(1, 2).flatten()
        importance = torch.ones(LABELS, device=logits.device)
        importance[0] = self.settings.nothing
        dense = F.cross_entropy(logits, truth, importance)
        right = (logits.argmax(-1) == truth).view(-1, len(KINDS))
        there = (truth > 0).view(-1, len(KINDS))
        numbers = {"contrast_loss": contrast, "patch_loss": dense}
        for i, kind in enumerate(KINDS):
            numbers[kind] = right[:, i][there[:, i]].float().mean()
        wanted = torch.arange(len(pairs), device=pairs.device)
        numbers["retrieval"] = (pairs.argmax(-1) == wanted).float().mean()
        return dense + self.settings.contrast * contrast, numbers

    def validate(self) -> dict[str, float]:
        """The shares of right labels where things are, and of captions found in their batch."""
        size = self.settings.batch
        batches = Batches(self.examples, size)
        sums: dict[str, float] = {}
        count = max(1, self.settings.validation // size)
        for number in range(count):
            batch = {k: v.to(self.labels.weight.device) for k, v in batches[number].items()}
            for name, value in self(batch)[1].items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + value.item() / count
        return sums

    def export(self, folder: Path) -> None:
        """The tower in transformers' format, with its head."""
        fresh = folder.with_name(folder.name + ".tmp")
        self.siglip.vision_model.save_pretrained(fresh)
        replace_folder(fresh, folder)


def run(config: Config, out: Path) -> None:
    """Train the tower, unless it is there or comes from a checkpoint."""
    folder = out / "tower"
    if config.vision.checkpoint or (folder / "model").exists():
        return
    torch.manual_seed(config.seed)
    tokenizer = get_tokenizer(config, out)
    batches = Batches(TowerExamples(config, tokenizer), config.tower.batch)
    train(TowerTask(config, tokenizer), batches, config, config.tower, folder)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
