"""Train the demo model: first the tower on labelled patches, then all parts together.

python train/train.py --minutes 60 --out demo-checkpoint
"""

import argparse
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from evaluate import Item, exam, grade
from model import GROUP, IMAGE_TOKENS, WIDTH, DemoVLM, save_checkpoint
from scenes import IMAGE_SIZE, THINGS, Question, patch_labels, questions, render, sample_scene
from tokenizer import ANSWER, HEAD, QUESTION, train_tokenizer

LABELS, CLASSES = 3, len(THINGS) + 1  # per patch; things and "nothing"
TOKENS = 240  # length of a row: the prompt's head, the image, and pairs of question and answer
RENDER_SIZES = (IMAGE_SIZE, IMAGE_SIZE, 160, 192, 252)
HEADER_WEIGHT, DECISION_WEIGHT = 0.1, 4.0  # of "assistant", and of "Yes" and "No"
ANSWER_WEIGHT = {"describe": 3.0, "count": 1.0, "yesno": 1.0, "where": 2.0, "setting": 1.0}
TOWER_SHARE = 0.1  # of the time, for the first stage
DENSE_WEIGHT = 0.3  # of the patch labels, in the second stage
NOTHING_WEIGHT = 0.3  # of patches without a thing; others 1
PEAK_RATE, EMA = 1.5e-3, 0.998


# ---- data -------------------------------------------------------------------------------------


def to_pixels(image: Image.Image) -> np.ndarray:
    """The picture as uint8 [3, S, S], resized as the runtime resizes it."""
    if image.width != IMAGE_SIZE:
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


class Rows(IterableDataset):
    """Batches of never-repeating training scenes, each a row of one prefix and several pairs."""

    def __init__(self, tokenizer: Tokenizer, batch: int, seed: int) -> None:
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        image = [tokenizer.token_to_id("<|image_pad|>")] * IMAGE_TOKENS
        self.head = (*self.encode(HEAD), *image)
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)

    def row(self, pairs: list[Question]) -> tuple[np.ndarray, np.ndarray]:
        """Pairs -> ids, segments, positions, targets int64 [4, T] and weights float32 [T].

        Segment 0 is the shared prefix, 1, 2, ... the pairs (those that fit), -1 the padding.
        """
        start = len(self.head)
        row = np.zeros((4, TOKENS), np.int64)
        row[0], row[1], row[3] = self.pad, -1, -100
        row[:3, :start] = self.head, np.zeros(start), np.arange(start)
        weights = np.zeros(TOKENS, np.float32)
        header = len(self.encode(ANSWER.format(answer=""))) - 1
        for segment, pair in enumerate(pairs, 1):
            question = self.encode(QUESTION.format(question=pair.question))
            answer = self.encode(ANSWER.format(answer=pair.answer))
            both = question + answer
            end = start + len(both)
            if end > TOKENS:
                break
            row[0, start:end], row[1, start:end] = both, segment
            row[2, start:end] = len(self.head) + np.arange(len(both))
            first = start + len(question) - 1  # from here on the next token is to be learned
            row[3, first : end - 1] = answer
            weights[first : end - 1] = ANSWER_WEIGHT[pair.kind]
            weights[first : first + header] = HEADER_WEIGHT
            if pair.kind == "yesno":
                weights[first + header] = DECISION_WEIGHT
            start = end
        return row, weights

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng((self.seed, torch.utils.data.get_worker_info().id))
        while True:
            scenes = [sample_scene(rng, held_out=False) for _ in range(self.batch)]
            sizes = rng.choice(RENDER_SIZES, self.batch).tolist()
            pixels = [to_pixels(render(s, n)) for s, n in zip(scenes, sizes, strict=True)]
            labels = [patch_labels(scene) for scene in scenes]
            asked = [questions(scene, rng) for scene in scenes]
            rows, weights = zip(
                *(self.row([q[i] for i in rng.permutation(len(q))]) for q in asked), strict=True
            )
            yield tuple(torch.from_numpy(np.stack(x)) for x in (pixels, labels, rows, weights))


# ---- losses -----------------------------------------------------------------------------------


class DenseHeads(nn.Module):
    """Tells the `patch_labels` of each patch, from the patch and from its image token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(WIDTH, LABELS * CLASSES)
        self.token = nn.Linear(WIDTH, GROUP * LABELS * CLASSES)

    def forward(self, patches: Tensor, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 81, C], [B, 9, C], [B, 3, 81] -> the loss, and the share right where a thing is."""
        truth = labels.transpose(1, 2).flatten()
        of_patch = self.patch(patches).float().view(-1, CLASSES)
        of_token = self.token(image).float().view(-1, CLASSES)
        importance = torch.ones(CLASSES)
        importance[0] = NOTHING_WEIGHT
        loss = F.cross_entropy(of_patch, truth, importance)
        loss = loss + F.cross_entropy(of_token, truth, importance)
        return loss, (of_token.argmax(-1) == truth)[truth > 0].float().mean()


def attention_mask(segments: Tensor) -> Tensor:
    """Segments [B, T] -> additive mask [B, 1, T, T]: a pair sees the prefix and itself, causally.

    So each pair is computed as if it stood alone behind the prefix.
    """
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    hidden = ~((key == 0) | (key == query)).tril()
    return torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill(hidden, -1e9)


def answer_loss(model: DemoVLM, image: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    """The weighted cross-entropy of the answers: [B, 9, C], [B, 4, T], [B, T] -> scalar."""
    ids, segments, positions, targets = row.unbind(1)
    hidden = model.language_model.model(
        inputs_embeds=model.embed(ids, image),
        attention_mask=attention_mask(segments),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    learned = targets >= 0
    logits = model.language_model.lm_head(hidden[learned]).float()
    losses = F.cross_entropy(logits, targets[learned], reduction="none")
    return (losses * weights[learned]).sum() / weights.sum()


# ---- training ---------------------------------------------------------------------------------


def make_optimizers(model: DemoVLM, heads: DenseHeads) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for embeddings, biases, norms and heads."""
    inner, outer = [], list(heads.parameters())
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and ("layers" in name or "projector" in name)
        (inner if inside else outer).append(parameter)
    return [
        torch.optim.Muon(inner, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(progress: float) -> float:
    """The learning rate at a share of the time: a short rise, level, then a straight fall."""
    return PEAK_RATE * min(1, progress / 0.01 + 0.02, (1 - progress) / 0.45 + 0.01)


def evaluate(model: DemoVLM, items: list[Item], batch: int = 200) -> dict[str, float]:
    """The share of right answers by measure."""
    answers: list[str] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        pixels = torch.from_numpy(np.stack([to_pixels(item.image) for item in part]))
        answers += model.answer(pixels, [item.asked.question for item in part])
    return grade(items, answers)


def train(args: argparse.Namespace) -> None:
    """Train for `args.minutes`, with a report and a checkpoint every `args.every` minutes."""
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model, heads = DemoVLM(tokenizer), DenseHeads()
    average = deepcopy(model).eval().requires_grad_(False)
    model.language_model.model.compile()
    optimizers = make_optimizers(model, heads)
    parts = {"model": model, "heads": heads, "average": average}
    parts |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    state_file = args.out.with_name(args.out.name + ".state.pt")
    spent = steps = 0
    if args.resume:
        state = torch.load(state_file)
        spent, steps = state["spent"], state["steps"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    items = exam(args.scenes, seed=1)
    rows = Rows(tokenizer, args.batch, args.seed + steps)
    batches = iter(DataLoader(rows, batch_size=None, num_workers=1, prefetch_factor=8))
    began = reported = time.monotonic()
    reported_steps, losses = steps, []
    while True:
        now = time.monotonic()
        progress = (spent + now - began) / (60 * args.minutes)
        joint = progress >= TOWER_SHARE
        if now - reported > 60 * args.every or progress >= 1:
            report = {
                "minutes": round(progress * args.minutes, 1),
                "steps": steps,
                "pictures_per_second": round(
                    (steps - reported_steps) * args.batch / (now - reported), 1
                ),
                "loss, answers, patches": np.mean(losses, 0).round(4).tolist(),
            }
            save_checkpoint(average, args.out)
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"spent": progress * 60 * args.minutes, "steps": steps}, state_file)
            if joint:
                report |= evaluate(average, items)
            print(json.dumps(report), flush=True)
            if progress >= 1:
                return
            reported, reported_steps, losses = time.monotonic(), steps, []

        pixels, labels, row, weights = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            patches = model.patches(pixels)
            image = model.project(patches)
            dense, right = heads(patches, image, labels)
            answers = answer_loss(model, image, row, weights) if joint else torch.zeros(())
        loss = answers + DENSE_WEIGHT * dense if joint else dense
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate(progress)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
        with torch.no_grad():
            decay = min(EMA, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append([loss.item(), answers.item(), right.item()])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=4, help="minutes between reports")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes per report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT.state.pt")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
