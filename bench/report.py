"""Print the README's tables from the committed results: python bench/report.py"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def cost_table() -> str:
    """The newest full-size record of each layout."""
    rows = {}
    for line in (RESULTS / "full_size.jsonl").read_text().splitlines():
        record = json.loads(line)
        rows[record["layout"]] = record
    lines = [
        "| vision file | encode | prefill | decode | load to last token | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for layout, record in rows.items():
        seconds = {stage: value["min"] for stage, value in record["seconds"].items()}
        rate = record["completion_tokens"] / seconds["decode"]
        lines.append(
            f"| {layout} F16 | {seconds['encode']:.2f} s | {seconds['prefill']:.2f} s "
            f"({record['prompt_tokens']} tokens) | {rate:.1f} tokens/s "
            f"| {record['command_line_seconds']:.1f} s | {record['peak_rss_mb']['answer']} MB |"
        )
    machine = record["machine"]
    lines += [
        "",
        "Full-size synthetic model (published shapes, F16, random weights), a 512×512 photograph, "
        f"answers of {record['completion_tokens']} tokens; {machine['cpu']}, "
        f"{record['threads']} threads, llama-cpp-python {record['llama_cpp_python']}, commit "
        f"{record['commit']}; minimum of {record['repeats']} repeats, the whole command once. From "
        "`bench/results/full_size.jsonl`.",
    ]
    return "\n".join(lines)


def second_question_table() -> str:
    """Time to the first token of the newest record, for each case."""
    record = json.loads((RESULTS / "second_question.jsonl").read_text().splitlines()[-1])
    lines = [
        "| | encode | prefill | first token after |",
        "|---|---|---|---|",
    ]
    for case, found in record["cases"].items():
        new = found["prompt_tokens"] - found["cached_tokens"]
        lines.append(
            f"| {case} | {found['encode_ms'] / 1e3:.2f} s | {found['prompt_ms'] / 1e3:.2f} s "
            f"({new} of {found['prompt_tokens']} tokens) | {found['ttft_ms'] / 1e3:.2f} s |"
        )
    lines += [
        "",
        f"Full-size synthetic model, F16, a 512×512 photograph; {record['machine']['cpu']}, "
        f"{record['threads']} threads, commit {record['commit']}; median of {record['repeats']} "
        "repeats, the model loaded. From `bench/results/second_question.jsonl`.",
    ]
    return "\n".join(lines)


def accuracy_table() -> str:
    """Scores of the demo model on held-out scenes, through the GGUF runtime."""
    record = json.loads((RESULTS / "demo_accuracy.json").read_text())
    lines = [f"| {record['scenes']} held-out scenes | right |", "|---|---|"]
    for label, key in (
        ("description: the right kinds of things", "caption_things"),
        ("description: and the right numbers", "caption_counts"),
        ("how many …?", "count"),
        ("is there …? (half of the answers are no)", "yesno"),
        ("where is …?", "where"),
    ):
        lines.append(f"| {label} | {record['accuracy'][key]:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(cost_table(), second_question_table(), accuracy_table(), sep="\n\n")
