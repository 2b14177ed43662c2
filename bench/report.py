"""The tables of README and MODEL_CARD, and a plot, from the committed results.

    python bench/report.py

The tables are printed, the plot is bench/results/quantization.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omnivlm_edge.compare import Loss, TextLoss, VisionLoss
from omnivlm_edge.plot import plot_losses

RESULTS = Path(__file__).parent / "results"


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
        f"{record['threads']} threads, {_commits([record])}; median of {record['repeats']} "
        "repeats, the model loaded. From `bench/results/second_question.jsonl`.",
    ]
    return "\n".join(lines)


def loss_table() -> str:
    """What each recipe loses, on the demo model: the newest record of each."""
    rows = _quantizations("demo-F16")
    lines = [
        "| recipe | cosine | error | KL text | KL whole | top-1 | exact answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for (recipe, imatrix), record in rows.items():
        loss = record["loss"]
        label = f"`--{recipe}`" + (" with imatrix" if imatrix else "")
        if loss["vision"] is None:
            lines.append(f"| F16 | | | | | | {loss['exact']:.1%} |")
            continue
        lines.append(
            f"| {label} | {loss['vision']['cosine']:.5f} | {loss['vision']['error']:.3f} "
            f"| {loss['text']['kl']:.5f} | {loss['whole']['kl']:.5f} "
            f"| {loss['whole']['top1']:.1%} | {loss['exact']:.1%} |"
        )
    lines += [
        "",
        f"The demo model of that time on the pictures of {record['pictures']} held-out scenes and "
        f"their {record['questions']:,} questions; {_commits(rows.values())}. From "
        "`bench/results/quantization.jsonl`.",
    ]
    return "\n".join(lines)


def plot() -> None:
    """Size against error of the records in the loss table that had no imatrix."""
    losses = [
        Loss(
            found["name"],
            found["text_bytes"],
            found["vision_bytes"],
            VisionLoss(**found["vision"]),
            TextLoss(**found["text"]),
            TextLoss(**found["whole"]),
        )
        for (_, imatrix), record in _quantizations("demo-F16").items()
        if (found := record["loss"])["vision"] and not imatrix
    ]
    plot_losses(losses, RESULTS / "quantization.png")


def size_table() -> str:
    """Size and speed of each recipe at full size: the newest record of each."""
    lines = [
        "| recipe | text | vision | decode |",
        "|---|---|---|---|",
    ]
    rows = _quantizations("synthetic-F16")
    for (recipe, _), record in rows.items():
        loss, seconds = record["loss"], record["seconds"]
        rate = record["completion_tokens"] / seconds["decode"]["min"]
        lines.append(
            f"| `--{recipe}` | {loss['text_bytes'] / 1e6:.1f} MB | "
            f"{loss['vision_bytes'] / 1e6:.1f} MB | {rate:.1f} tokens/s |"
        )
    machine = record["machine"]
    lines += [
        "",
        f"Full-size synthetic model (random weights: its losses say nothing); {machine['cpu']}, "
        f"{record['threads']} threads, llama-cpp-python {record['llama_cpp_python']}, "
        f"{_commits(rows.values())}; minimum of {record['repeats']} repeats. The machine is "
        "shared: speeds of other tables, measured at other hours, differ. From "
        "`bench/results/quantization.jsonl`.",
    ]
    return "\n".join(lines)


def _commits(records: Iterable[dict[str, Any]]) -> str:
    """Those that measured, in the order of their rows."""
    names = list(dict.fromkeys(str(record["commit"]) for record in records))
    return f"commit {names[0]}" if len(names) == 1 else f"commits {', '.join(names)}"


def _quantizations(model: str) -> dict[tuple[str, bool], dict[str, Any]]:
    """The newest record of a model by recipe and whether there was an imatrix."""
    found = {}
    for line in (RESULTS / "quantization.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["model"] == model and (record["recipe"], record["imatrix"]) != ("f16", True):
            found[record["recipe"], record["imatrix"]] = record
    plain = {recipe: place for place, (recipe, imatrix) in enumerate(found) if not imatrix}
    order = sorted(found, key=lambda key: (plain.get(key[0], len(plain)), key[1]))
    return {key: found[key] for key in order}


def _evaluation(name: str) -> dict[str, Any]:
    """The scores in a result.json of `omnivlm-edge eval`."""
    found = json.loads((RESULTS / "eval" / f"{name}.json").read_text())["scores"]
    assert isinstance(found, dict)
    return found


def accuracy_table() -> str:
    """What the demo answers rightly, in short."""
    held_out, unseen = _evaluation("demo"), _evaluation("demo_twemoji")
    lines = ["| | English | Chinese |", "|---|---|---|"]
    for label, scores, kind in (
        ("captions: all things and their numbers", held_out, "caption"),
        ("how many …?", held_out, "count"),
        ("is there …?", held_out, "yesno"),
        ("where is …?", held_out, "where"),
        ("what stands where to what, and which is larger?", held_out, "relation"),
        ("all questions", held_out, "all"),
        ("is there …?, in the unseen style", unseen, "yesno"),
    ):
        shares = [scores["questions"][f"{kind}, {code}"]["accuracy"] for code in ("en", "zh")]
        lines.append(f"| {label} | " + " | ".join(f"{s['value']:.1%}" for s in shares) + " |")
    return "\n".join(lines)


def score_table() -> str:
    """All scores of the demo: both styles, both languages."""
    results = [_evaluation("demo"), _evaluation("demo_twemoji")]
    columns = [(scores, code) for scores in results for code in ("en", "zh")]
    lines = [
        "| right | English | Chinese | unseen style, English | unseen style, Chinese |",
        "|---|---|---|---|---|",
    ]

    def row(label: str, cells: Iterable[str]) -> str:
        return f"| {label} | " + " | ".join(cells) + " |"

    for kind in (
        *("caption", "count", "yesno", "where", "colour", "relation", "setting", "list"),
        *("unanswerable", "all"),
    ):
        found = [scores["questions"][f"{kind}, {code}"]["accuracy"] for scores, code in columns]
        lines.append(row(kind, (f"{s['value']:.1%} of {s['n']:,}" for s in found)))
    for sampling in ("random", "popular", "adversarial"):
        groups = [
            scores["POPE"][sampling if code == "en" else f"{sampling}, {code}"]
            for scores, code in columns
        ]
        cells = (f"{g['F1']:.3f} (yes {g['yes rate']['value']:.1%})" for g in groups)
        lines.append(row(f"POPE {sampling}, F1", cells))
    return "\n".join([*lines, *_description_rows(columns)])


def stage_table() -> str:
    """What stage 3 makes of the demo: the same questions before and after it."""
    results = [_evaluation("demo"), _evaluation("demo_after_dpo")]
    columns = [(scores, code) for code in ("en", "zh") for scores in results]
    lines = [
        "| | English, before | English, after | Chinese, before | Chinese, after |",
        "|---|---|---|---|---|",
        *_description_rows(columns),
    ]
    for kind in ("caption", "yesno", "all"):
        shares = [scores["questions"][f"{kind}, {code}"]["accuracy"] for scores, code in columns]
        lines.append(f"| {kind} | " + " | ".join(f"{s['value']:.1%}" for s in shares) + " |")
    return "\n".join(lines)


def _description_rows(columns: Sequence[tuple[dict[str, Any], str]]) -> list[str]:
    """What descriptions name that is not there, and what they leave out."""
    found = [scores["descriptions"][f"description, {code}"] for scores, code in columns]
    rows = [("things hallucinated in a description", [f"{f['hallucinated']:.3f}" for f in found])]
    for label, name in (
        ("descriptions that hallucinate (CHAIR_s)", "CHAIR_s"),
        ("things hallucinated, of those named (CHAIR_i)", "CHAIR_i"),
        ("things named, of those there", "recall"),
    ):
        rows.append((label, [f"{f[name]['value']:.1%}" for f in found]))
    return [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]


def serve_table() -> str:
    """Tokens a second of the servers in the newest run, by number of streams at once."""
    lines = (RESULTS / "serve_load.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["case"] == "throughput"]
    newest = [r for r in records if r["time"] == records[-1]["time"]]
    streams = [name.split()[1] for name in newest[0]["rates"] if name.startswith("whole")]
    rows = [
        "| tokens a second, all streams | " + " | ".join(streams) + " | first token, p50 and p90 |",
        "|---|" + "---|" * (len(streams) + 1),
    ]
    for record in newest:
        rates = [f"{record['rates'][f'whole {n}']['most']:.0f}" for n in streams]
        waits = next(found for name, found in record["first_token"].items() if "text" in name)
        wait = f"{waits['p50']:.2f} s, {waits['p90']:.2f} s"
        rows.append(f"| {record['server']} | {' | '.join(rates)} | {wait} |")
    rows += [
        "",
        f"Full-size synthetic 4-bit text model, {newest[0]['tokens']} tokens an answer, one to "
        "eight clients at once; first tokens of questions without a picture while eight clients "
        f"ask on and on. {newest[0]['machine']['cpu']}, {newest[0]['threads']} threads, "
        f"{_commits(newest)}. From `bench/results/serve_load.jsonl`.",
    ]
    return "\n".join(rows)


def side_by_side_run() -> list[dict[str, Any]]:
    """The records of the newest run."""
    lines = (RESULTS / "side_by_side.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["run"] == records[-1]["run"]]


def with_most_threads(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each contender."""
    most = max(record["threads"] for record in records)
    return [record for record in records if record["threads"] == most]


def side_by_side_tables(records: Sequence[dict[str, Any]]) -> str:
    """The vision paths, the whole programs, and what was measured, of one run."""
    records = with_most_threads(records)
    lines = [
        "| vision path | encode | of stock | load | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [_encoder_row(record) for record in records if record["kind"] == "encode"]
    lines += [
        "",
        "| program | first token after | of stock | decode | of stock | load | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_answerer_row(record) for record in records if record["kind"] == "answer"]
    record = records[0]
    versions = sorted(
        {f"{name} {number}" for found in records for name, number in found["libraries"].items()}
    )
    lines += [
        "",
        f"Full-size synthetic models of the same shapes, {record['picture']}; "
        f"{record['machine']['cpu']}, {record['threads']} threads, {_commits(records)}; "
        f"{', '.join(versions)}. Taking turns in one run, minimum of {record['repeats']} repeats, "
        "the model loaded. From `bench/results/side_by_side.jsonl`.",
    ]
    return "\n".join(lines)


def _encoder_row(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"| {record['contender']} | {record['status']}: {record['reason']} | | | |"
    return (
        f"| {record['contender']} | {record['seconds']['encode']['min']:.2f} s "
        f"| {_ratio(record, 'encode')} | {_load_and_memory(record)} |"
    )


def _answerer_row(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"| {record['contender']} | {record['status']}: {record['reason']} | | | | | |"
    seconds = record["seconds"]
    return (
        f"| {record['contender']} | {seconds['first_token']['min']:.2f} s "
        f"| {_ratio(record, 'first_token')} | {1 / seconds['decode']['min']:.1f} tokens/s "
        f"| {_ratio(record, 'decode', speed=True)} | {_load_and_memory(record)} |"
    )


def _ratio(record: dict[str, Any], stage: str, speed: bool = False) -> str:
    """A time, or a speed, as a multiple of the stock path's; empty when that did not run."""
    if stage not in record["ratio_to_stock"]:
        return ""
    ratio = record["ratio_to_stock"][stage]["min"]
    return f"{1 / ratio if speed else ratio:.2f}×"


def _load_and_memory(record: dict[str, Any]) -> str:
    return f"{record['load_seconds']:.2f} s | {record['peak_rss_mb']} MB"


def batch_records() -> list[dict[str, Any]]:
    """Those of bench/batch.py: of each kind the newest run."""
    records = [json.loads(line) for line in (RESULTS / "batch.jsonl").read_text().splitlines()]
    newest = {record["kind"]: record["run"] for record in records}
    return [record for record in records if record["run"] == newest[record["kind"]]]


def batch_table() -> str:
    """Pictures per second of one process."""
    latest = [record for record in batch_records() if record["kind"] != "workers"]
    turns = {r["name"]: r["pictures_per_second"] for r in latest if r["kind"] == "turns"}
    one, stock = turns.get("ours, one at a time"), turns.get("llama.cpp, one at a time")
    lines = [
        "| | pictures/s | a picture | of ours one at a time | of llama.cpp | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for record in latest:
        rate = record["pictures_per_second"]
        full_size = record["kind"] in ("turns", "batch")
        ratios = [f"{rate / other:.2f}×" if other and full_size else "" for other in (one, stock)]
        lines.append(
            f"| {record['name']} | {rate:.3f} | {1 / rate:.3f} s | {ratios[0]} | {ratios[1]} "
            f"| {record['peak_rss_mb']} MB |"
        )
    record = latest[-1]
    lines += [
        "",
        f"Answers of {record['tokens']} tokens; full-size synthetic model with 4-bit files, but "
        f"for the lines of the demo; {record['machine']['cpu']}, {record['threads']} threads, "
        f"{_commits(latest)}. From `bench/results/batch.jsonl`.",
    ]
    return "\n".join(lines)


def worker_table() -> str:
    """What several processes get done, and what memory they share."""
    lines = [
        "| | pictures/s | proportional set size, each | of it from files | private, each |",
        "|---|---|---|---|---|",
    ]
    for record in (record for record in batch_records() if record["kind"] == "workers"):
        memory = record["memory"]
        means = [
            sum(each[name] for each in memory) / len(memory)
            for name in ("pss_mb", "pss_file_mb", "private_mb")
        ]
        lines.append(
            f"| {record['name']} | {record['pictures_per_second']:.3f} | "
            + " | ".join(f"{mean:.0f} MB" for mean in means)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    tables = second_question_table, serve_table, accuracy_table, loss_table, size_table
    print(*(table() for table in (*tables, score_table, stage_table)), sep="\n\n")
    if (RESULTS / "side_by_side.jsonl").exists():
        print("", side_by_side_tables(side_by_side_run()), sep="\n")
    if (RESULTS / "batch.jsonl").exists():
        print("", batch_table(), "", worker_table(), sep="\n")
    plot()
