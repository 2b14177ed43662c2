"""Learning to answer: the losses of rows of question-answer pairs (see `data.Rows`), and the stage
that language.py, pretrain.py and sft.py are with different parts frozen."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config, Stage
from data import DECISION_WEIGHT, Example, stack
from loop import Task
from model import OmniVLM, add_lora, merged, save_checkpoint
from questions import Question

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Segments [B, T] -> additive mask [B, 1, T, T]: a pair sees the prefix and itself, causally.

    So each pair is computed as if it stood alone behind the prefix.
    """
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    hidden = ~((key == 0) | (key == query)).tril()
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -1e9)


def decoder_of(model: OmniVLM, compile: bool) -> Decode:
    """Embeddings [B, T, D], mask and positions -> hidden states [B, T, D].

    Compiled for training's one shape, if wanted; generation keeps the plain modules. A function,
    so that no module which holds it registers the decoder a second time.
    """
    decoder = model.language_model.model

    def decode(embedded: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return decoder(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    return torch.compile(decode) if compile else decode


def token_losses(
    model: OmniVLM, decode: Decode, image: Tensor | None, row: Tensor
) -> tuple[Tensor, Tensor]:
    """For the targets of rows [B, 4, T] behind image tokens [B, N, D]: negative log-likelihoods
    float32 [B, T], 0 where there is no target, and bool [B, T]: is the target the likeliest?"""
    ids, segments, positions, targets = row.unbind(1)
    embedded = model.embed(ids, image)
    hidden = decode(embedded, attention_mask(segments, embedded.dtype), positions)
    learned = targets >= 0
    logits = model.language_model.lm_head(hidden[learned]).float()
    losses = torch.zeros(targets.shape, device=targets.device)
    losses = losses.masked_scatter(
        learned, F.cross_entropy(logits, targets[learned], reduction="none")
    )
    right = torch.zeros_like(learned).masked_scatter(learned, logits.argmax(-1) == targets[learned])
    return losses, right


class AnswerTask(Task):
    """The model learns the answers; `parts` names the modules that learn, all else is frozen.

    `checks` are validation rows and the pairs in each. With LoRA the decoder learns only that.
    """

    def __init__(
        self,
        model: OmniVLM,
        parts: Sequence[str],
        config: Config,
        settings: Stage,
        checks: Sequence[tuple[Example, list[Question]]],
    ) -> None:
        super().__init__()
        self.model, self.batch, self.checks = model, settings.batch, checks
        self.source = config.text.checkpoint
        model.requires_grad_(False)
        for part in parts:
            if part == "language_model" and config.lora.rank:
                add_lora(model, config.lora)
            else:
                getattr(model, part).requires_grad_(True)
        self.decode = decoder_of(model, config.compile)

    def image(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The image tokens of a batch that has pictures."""
        if "pixels" not in batch:
            return None
        return self.model.project(self.model.patches(batch["pixels"]))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""
        losses, _ = token_losses(self.model, self.decode, self.image(batch), batch["row"])
        weights = batch["weights"]
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6), {}

    def validate(self) -> dict[str, float]:
        """The loss, and by kind and language the share of pairs whose likeliest answer is the
        right one to the letter; for yes/no also of those whose first word is."""
        losses: list[float] = []
        seen: dict[str, list[bool]] = defaultdict(list)
        device = self.model.language_model.device
        for start in range(0, len(self.checks), self.batch):
            part = self.checks[start : start + self.batch]
            batch = {k: v.to(device) for k, v in stack([row for row, _ in part]).items()}
            loss, right = token_losses(self.model, self.decode, self.image(batch), batch["row"])
            weights, segments, targets = batch["weights"], batch["row"][:, 1], batch["row"][:, 3]
            losses.append(float((loss * weights).sum() / weights.sum().clamp(min=1e-6)))
            for i, (_, pairs) in enumerate(part):
                for segment, pair in enumerate(pairs, 1):
                    # A target stands one place before its token: the first in the question's end.
                    own = right[i][(segments[i] == segment) & (targets[i] >= 0)]
                    name = f"{pair.kind}_{pair.language}".rstrip("_")
                    seen[name].append(bool(own.all()))
                    if pair.kind == "yesno":
                        decisive = (segments[i] == segment) & (weights[i] == DECISION_WEIGHT)
                        seen[f"decision_{pair.language}"].append(bool(right[i][decisive].all()))
        measures = {name: sum(all_) / len(all_) for name, all_ in sorted(seen.items())}
        return {"val_loss": sum(losses) / len(losses)} | measures

    def export(self, folder: Path) -> None:
        """The whole model as a checkpoint that can be converted."""
        save_checkpoint(merged(self.model), folder, self.source)
