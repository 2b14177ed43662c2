"""Stage 3: direct preference optimization on minimal edits; projector and language model learn.

The stage-2 model describes training pictures by sampling. A teacher, which knows what was drawn,
changes only what is wrong in a description: the edited one is chosen, the model's own rejected.
Only those that name a thing which is not there are kept: most errors are about places, and would
drown what this stage is for. OUT/dpo/pairs.jsonl keeps the pairs, OUT/dpo/pairs.json
tells how many there are and how little they differ. Each pair of beta and learning rate is tried
for a short run (OUT/dpo/grid), and what hallucinates least on validation pictures, without naming
fewer of the things that are there, is taken for the long one.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from hashlib import sha256
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from answers import AnswerTask, token_losses
from config import Config, Dpo
from correction import correct
from data import Batches, Example, Rows, Scenes, open_picture, read_rows, stack
from errors import TrainError
from loop import check_made_with, fingerprint, mixed_precision, stage_main, train, validated
from model import OmniVLM, load_checkpoint
from phrases import LANGUAGES
from questions import Question

STREAM = 4  # of the scenes, so that no other stage sees these
CHUNK = 32  # pictures that are asked at once
RECALL_LOSS = 0.01  # at most, of what a choice of beta and rate may cost


@dataclass(frozen=True)
class Preference:
    """Two answers to a question about a picture: number `picture` of the scenes, or a file."""

    picture: int | str
    question: str
    chosen: str
    rejected: str
    language: str = ""


def edits(rejected: str, chosen: str, language: str) -> int:
    """How many words (in Chinese: characters) are put in, left out or changed."""
    a, b = (list(t) if language == "zh" else t.split() for t in (rejected, chosen))
    changes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in changes if tag != "equal")


# ---- the model's own answers, edited ----------------------------------------------------------


def ask(
    model: OmniVLM, scenes: Scenes, pictures: Sequence[int], settings: Dpo
) -> tuple[list[Preference], int]:
    """The pairs of some pictures, and how many descriptions there were."""
    pixels, asked, which = [], [], []
    for place, picture in enumerate(pictures):
        scene, rng = scenes.scene(picture)
        pixels.append(scenes.pixels(scene, rng))
        question = next(q for q in scenes.asked(scene, rng) if q.kind == "description")
        asked += [(scene, question)] * settings.answers
        which += [place] * settings.answers
    answers = model.answer(
        torch.from_numpy(np.stack(pixels)),
        [question.question for _, question in asked],
        which,
        limit=settings.limit,
        temperature=settings.temperature,
    )
    pairs = []
    for (scene, question), place, answer in zip(asked, which, answers, strict=True):
        language = question.language
        edited = correct(scene, answer, language)
        if edited != answer and LANGUAGES[language].mentions(answer) - set(scene.counts):
            pairs.append(Preference(pictures[place], question.question, edited, answer, language))
    return list(dict.fromkeys(pairs)), len(asked)


def train_scenes(config: Config, model: OmniVLM) -> Scenes:
    """The pictures that the pairs are about."""
    home_share = config.dpo.home_share
    return Scenes(config, model.image_size, "train", stream=STREAM, home_share=home_share)


def collect(model: OmniVLM, config: Config, folder: Path) -> list[Preference]:
    """All pairs; a run that was stopped goes on after the last whole chunk of pictures."""
    file, settings = folder / "pairs.jsonl", config.dpo
    if not file.exists():
        part = folder / "pairs.part.jsonl"
        scenes = train_scenes(config, model)
        lines = part.read_text("utf-8").split("\n") if part.exists() else []
        ends = [i for i, line in enumerate(lines) if "chunk" in line[:9]]
        lines = lines[: ends[-1] + 1] if ends else []
        model.eval()
        with open(part, "w", encoding="utf-8") as out:
            out.writelines(line + "\n" for line in lines)
            starts = range(CHUNK * len(ends), settings.pictures, CHUNK)
            for start in tqdm(starts, desc="answers", unit="chunk", disable=None):
                torch.manual_seed(1_000_003 * config.seed + start)  # whatever was asked before
                pictures = range(start, min(start + CHUNK, settings.pictures))
                pairs, count = ask(model, scenes, pictures, settings)
                for pair in pairs:
                    out.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")
                out.write(json.dumps({"chunk": start, "answers": count}) + "\n")
                out.flush()
        os.replace(part, file)
    rows = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    pairs = [Preference(**row) for row in rows if "chunk" not in row]
    if len(pairs) < 2:
        raise TrainError(
            f"{file} has {len(pairs)} pairs; delete it and raise dpo.pictures or dpo.temperature"
        )
    distances = [edits(pair.rejected, pair.chosen, pair.language) for pair in pairs]
    lengths = [len(p.rejected) if p.language == "zh" else len(p.rejected.split()) for p in pairs]
    summary = {
        "answers": sum(row["answers"] for row in rows if "chunk" in row),
        "pairs": len(pairs),
        "words_changed_mean": round(float(np.mean(distances)), 3),
        "words_changed_median": float(np.median(distances)),
        "words_of_answer_mean": round(float(np.mean(lengths)), 3),
    }
    (folder / "pairs.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"dpo {json.dumps(summary)}", flush=True)
    return pairs


def read_pairs(file: Path) -> list[Preference]:
    """Rows of image, question, chosen and rejected in a JSON list."""
    rows = read_rows(file)
    if len(rows) < 2:
        raise TrainError(f"{file} has {len(rows)} rows; it must have at least 2")
    fields = ("image", "question", "chosen", "rejected")
    for number, row in enumerate(rows, 1):
        for name in fields:
            if not isinstance(row.get(name), str):
                raise TrainError(f"{file}: row {number} has no text in {name!r}")
    return [Preference(*(row[name] for name in fields)) for row in rows]


# ---- learning from them -----------------------------------------------------------------------


class PairRows:
    """Example n: both answers of pair n behind its picture, as segments 1 (chosen) and 2 of one
    row, and "reference" float32 [2], what the model thought of them before."""

    def __init__(self, pairs: Sequence[Preference], config: Config, model: OmniVLM) -> None:
        self.pairs, self.images = pairs, Path(config.dpo.images)
        self.scenes = train_scenes(config, model)
        self.rows = Rows(model.tokenizer, model.image_tokens)
        longest = max(sum(map(self._length, self._both(pair))) for pair in pairs)
        self.tokens = -(-longest // 16) * 16
        self.reference = np.zeros((len(pairs), 2), np.float32)
        self.seed = config.seed
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))

    def _both(self, pair: Preference) -> list[Question]:
        return [Question("", pair.question, text, "") for text in (pair.chosen, pair.rejected)]

    def _length(self, pair: Question) -> int:
        return sum(map(len, self.rows.pair(pair)))

    def at(self, place: int) -> Example:
        """The pair at a place of the list."""
        pair = self.pairs[place]
        if isinstance(pair.picture, str):
            pixels = open_picture(self.images / pair.picture, self.scenes.size)
        else:
            pixels = self.scenes.pixels(*self.scenes.scene(pair.picture))
        row, _ = self.rows.row(self.rows.picture, self._both(pair), self.tokens)
        return {"pixels": pixels, "reference": self.reference[place]} | row

    def __call__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self.pairs))
        return self.at(int(self.order(epoch)[place]))


class DpoTask(AnswerTask):
    """-log sigmoid(beta * how much more than before the chosen answer is preferred), plus `anchor`
    times the chosen answer's negative log-likelihood per token, without which both answers become
    less likely, and right things are left out (arXiv 2404.19733)."""

    def __init__(
        self, model: OmniVLM, config: Config, beta: float, held_out: PairRows | None
    ) -> None:
        parts = (*model.projector_parts, "language_model")
        super().__init__(model, parts, config, config.dpo, ())
        self.beta, self.held_out, self.config = beta, held_out, config

    def log_probabilities(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, 2], of the chosen and of the rejected answer without their header, and how many
        tokens [B, 2] each has."""
        losses, _ = token_losses(self.model, self.decode, self.image(batch), batch["row"])
        counted, segments = batch["weights"] >= 1, batch["row"][:, 1]
        own = torch.stack([counted & (segments == s) for s in (1, 2)], 1)  # [B, 2, T]
        return -(losses[:, None] * own).sum(2), own.sum(2)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""
        known, tokens = self.log_probabilities(batch)
        gained = known - batch["reference"]
        margin = self.beta * (gained[:, 0] - gained[:, 1])
        surprise = (-known[:, 0] / tokens[:, 0]).mean()
        return -F.logsigmoid(margin).mean() + self.config.dpo.anchor * surprise, {
            "preferred": (margin > 0).float().mean(),
            "margin": margin.detach().mean(),
            "chosen_gain": gained[:, 0].detach().mean(),
            "chosen_loss": surprise.detach(),
        }

    def validate(self) -> dict[str, float]:
        """What became of held-out pairs, and, on drawn scenes, of descriptions."""
        measures: dict[str, float] = {}
        if self.held_out:
            size, count = self.batch, len(self.held_out.pairs)
            for start in range(0, count, size):
                batch = self.moved(
                    [self.held_out.at(i) for i in range(start, min(start + size, count))]
                )
                loss, numbers = self(batch)
                share = len(batch["row"]) / count
                for name, value in ({"loss": loss} | numbers).items():
                    measures[f"val_{name}"] = measures.get(f"val_{name}", 0) + share * value.item()
        return measures | ({} if self.config.dpo.json else descriptions(self.model, self.config))

    def moved(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch on the model's device."""
        return {k: v.to(self.model.language_model.device) for k, v in stack(examples).items()}


def descriptions(model: OmniVLM, config: Config) -> dict[str, float]:
    """Of greedy detailed descriptions of validation scenes: things named that are not there (per
    description, and as the share of descriptions), things there that are named, faultless ones."""
    scenes = Scenes(config, model.image_size, "validation", stream=STREAM)
    drawn, pixels, asked = [], [], []
    for picture in range(config.dpo.validation):
        scene, rng = scenes.scene(picture)
        drawn.append(scene)
        pixels.append(scenes.pixels(scene, rng))
        asked.append(next(q for q in scenes.asked(scene, rng) if q.kind == "description"))
    texts = model.answer(
        torch.from_numpy(np.stack(pixels)), [q.question for q in asked], limit=config.dpo.limit
    )
    wrong, found, there, faultless = [], 0, 0, 0
    for scene, question, text in zip(drawn, asked, texts, strict=True):
        named, present = LANGUAGES[question.language].mentions(text), set(scene.counts)
        wrong.append(len(named - present))
        found += len(named & present)
        there += len(present)
        faultless += correct(scene, text, question.language) == text
    return {
        "hallucinated": sum(wrong) / len(wrong),
        "hallucinating": sum(map(bool, wrong)) / len(wrong),
        "recall": found / there,
        "faultless": faultless / len(wrong),
    }


def remember(task: DpoTask, rows: PairRows, file: Path) -> None:
    """Fill in the reference of all pairs, from the file if it is there.

    It is computed as the training computes, so that rounding does not look like preference.
    """
    if not file.exists():
        known = []
        accelerator = Accelerator(mixed_precision=mixed_precision(task.config))
        with torch.no_grad(), accelerator.autocast():
            for start in tqdm(
                range(0, len(rows.pairs), task.batch), desc="reference", disable=None
            ):
                stop = min(start + task.batch, len(rows.pairs))
                batch = task.moved([rows.at(i) for i in range(start, stop)])
                known.append(task.log_probabilities(batch)[0].cpu())
        fresh = file.with_suffix(".tmp")
        torch.save(torch.cat(known), fresh)
        os.replace(fresh, file)
    known = torch.load(file, weights_only=True)
    if len(known) != len(rows.pairs):
        raise TrainError(f"{file} does not belong to pairs.jsonl; delete it")
    rows.reference = known.numpy()


class Trial(DpoTask):
    """A short run whose result is its measures."""

    measures: dict[str, float] | None = None  # of the last validation

    def validate(self) -> dict[str, float]:
        """See `DpoTask`."""
        self.measures = super().validate()
        return self.measures

    def export(self, folder: Path) -> None:
        """The measures, as a JSON file."""
        fresh = folder.with_name(folder.name + ".tmp")
        # A run that was stopped after its last step comes here without having validated.
        measures = self.measures or validated(self)
        fresh.write_text(json.dumps(measures, indent=2) + "\n")
        os.replace(fresh, folder)


def choices(settings: Dpo) -> Iterator[tuple[str, float, float]]:
    """The grid: a name, beta and the rate of each trial."""
    for beta in settings.beta:
        for rate in settings.rates:
            yield f"beta-{beta:g}-rate-{rate:g}", beta, rate


def choose(results: dict[str, dict[str, float]], recall: float | None) -> str:
    """The trial that hallucinates least of those that keep the recall; without scenes to tell,
    the one with the lowest loss on held-out pairs."""
    if recall is None:
        return min(results, key=lambda name: results[name]["val_loss"])
    kept = {n: r for n, r in results.items() if r["recall"] >= recall - RECALL_LOSS}
    if not kept:
        return max(results, key=lambda name: results[name]["recall"])
    return min(kept, key=lambda name: (kept[name]["hallucinated"], kept[name]["val_loss"]))


def check_source(folder: Path, config: Config, weights: Path) -> None:
    """Pairs, reference and trials belong to one model and its settings: raises TrainError if those
    in the folder were made from others, and else notes what makes them."""
    file = folder / "made_with.json"
    with open(weights, "rb") as source, mmap(source.fileno(), 0, access=ACCESS_READ) as content:
        now = fingerprint(config, config.dpo) | {
            "precision": mixed_precision(config),  # of the reference, on this machine
            "model": sha256(content).hexdigest(),
        }
    if file.exists():
        check_made_with(folder, json.loads(file.read_text()), now)
    else:
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(fresh, file)


def run(config: Config, out: Path) -> None:
    """Sample, edit, choose beta and rate, and train, unless it is done."""
    folder, settings = out / "dpo", config.dpo
    if (folder / "model").exists():
        return

    def fresh_model() -> OmniVLM:
        return load_checkpoint(out / "sft" / "model", config.attention)

    process = PartialState()
    model = fresh_model().to(process.device)
    folder.mkdir(parents=True, exist_ok=True)
    with process.main_process_first():  # the others find the files
        check_source(folder, config, out / "sft" / "model" / "model.safetensors")
        pairs = read_pairs(Path(settings.json)) if settings.json else collect(model, config, folder)
        rows = PairRows(pairs, config, model)
        remember(DpoTask(model, config, 0.0, None), rows, folder / "reference.pt")
    held = max(1, min(settings.validation, len(pairs) // 10))
    learnt, held_out = (
        PairRows(pairs[:-held], config, model),
        PairRows(pairs[-held:], config, model),
    )
    learnt.reference, held_out.reference = rows.reference[:-held], rows.reference[-held:]

    def settled(rate: float, steps: int) -> Dpo:
        return dataclasses.replace(settings, rate=rate, steps=steps)

    trials = list(choices(settings))
    results = {}
    for name, beta, rate in trials:
        trial = folder / "grid" / name
        if not (trial / "model").exists():
            torch.manual_seed(config.seed + 4)
            task = Trial(fresh_model(), config, beta, held_out)
            batches = Batches(learnt, settings.batch)
            train(task, batches, config, settled(rate, settings.grid_steps), trial)
        results[name] = json.loads((trial / "model").read_text())
    before = None if settings.json else descriptions(model.eval(), config)
    best = choose(results, before and before["recall"])
    if process.is_main_process:
        chosen = {"chosen": best, "before": before, "trials": results}
        (folder / "grid.json").write_text(json.dumps(chosen, indent=2) + "\n")
        print(f"dpo {json.dumps(chosen)}", flush=True)

    beta, rate = next((beta, rate) for name, beta, rate in trials if name == best)
    torch.manual_seed(config.seed + 4)
    task = DpoTask(fresh_model(), config, beta, held_out)
    train(task, Batches(learnt, settings.batch), config, settled(rate, settings.steps), folder)


if __name__ == "__main__":
    stage_main(run, __doc__.splitlines()[0])
