"""Would drafts from repeated n-grams ("prompt lookup") speed answers up?

    python bench/prompt_lookup.py TESTSET_DIR [--questions 300]

TESTSET_DIR is what `train/testset.py` wrote. The demo answers; each answer is then replayed: where
the last two or three tokens stand earlier in the question and the answer, what followed there is
the draft, of at most eight tokens. Nothing is decoded with drafts: `steps_saved` is how many of
llama.cpp's steps perfect bookkeeping would save, and every step with a draft costs more than one
without. One JSON object is appended to bench/results/prompt_lookup.jsonl.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import click

from omnivlm_edge import OmniVLM
from omnivlm_edge.compare import read_questions
from omnivlm_edge.machine import commit, describe_machine
from omnivlm_edge.prompt import Piece

RESULTS = Path(__file__).parent / "results" / "prompt_lookup.jsonl"
MAX_DRAFT = 8


@click.command()
@click.argument("testset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--questions", default=300, show_default=True)
def main(testset: Path, questions: int) -> None:
    """Replay the demo's answers and append to bench/results/prompt_lookup.jsonl."""
    asked = read_questions(testset / "questions.jsonl")[:questions]
    answers: dict[str, list[tuple[list[int], list[int]]]] = {"descriptions": [], "others": []}
    with OmniVLM("demo", device="cpu", disk_cache=False) as model:
        for question in asked:
            prompt = model._decoder.tokenize([Piece(question.prompt, special=False)])
            tokens = list(model.answer(question.image, question.prompt).tokens)
            kind = "descriptions" if question.prompt.startswith("Describe") else "others"
            answers[kind].append((prompt, tokens))
    for kind, pairs in answers.items():
        for size in (2, 3):
            counts = [replay(prompt, tokens, size) for prompt, tokens in pairs]
            steps, drafted, accepted = map(sum, zip(*counts, strict=True))
            record = {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "commit": commit(),
                "machine": describe_machine(),
                "model": "demo-F16",
                "answers": kind,
                "count": len(pairs),
                "ngram": size,
                "tokens": sum(len(tokens) for _, tokens in pairs),
                "drafted": drafted,
                "accepted": accepted,
                "acceptance": round(accepted / max(1, drafted), 4),
                "steps_saved": round(1 - steps / sum(len(tokens) for _, tokens in pairs), 4),
            }
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            click.echo(json.dumps(record))


def replay(prompt: list[int], tokens: list[int], size: int) -> tuple[int, int, int]:
    """Steps needed, tokens drafted, and tokens of the drafts that were right."""
    steps = drafted = accepted = done = 0
    while done < len(tokens):
        guess = draft(prompt + tokens[:done], size)
        right = 0
        while right < len(guess) and tokens[done + right : done + right + 1] == [guess[right]]:
            right += 1
        steps += 1
        drafted += len(guess)
        accepted += right
        done += right + 1  # the step gives the token behind the draft as well
    return steps, drafted, accepted


def draft(known: list[int], size: int) -> list[int]:
    """What followed the newest earlier occurrence of the last `size` tokens."""
    last = known[-size:]
    for start in range(len(known) - size - 1, -1, -1):
        if known[start : start + size] == last:
            return known[start + size : start + size + MAX_DRAFT]
    return []


if __name__ == "__main__":
    main()
