"""Records of `bench` as Markdown, JSON, JSON lines and CSV, and beside earlier ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench import Record, describe_case, find_partner, peak_memory

_COLUMNS = (
    *("model", "size MB", "device", "precision", "threads", "test"),
    *("min ms", "median ms", "mean ± sd ms", "mean ± sd t/s", "of limit"),
)
_SHARES = {"encode": "encode_share", "decode": "decode_share"}
_BUSY = 0.8  # cpu_share below which other programs have slowed a case down
# What must be equal for two records to tell something of the software alone.
_CONDITIONS = (
    *("version", "build_commit", "llama_cpp_python", "cpu_info", "gpu_info", "model_filename"),
    *("model_sha256", "mmproj_filename", "mmproj_sha256", "device", "n_threads"),
    *("vision_precision", "low_memory", "n_gpu_layers", "picture", "prompt", "max_tokens"),
    "completion_tokens",
)


def render(records: Sequence[Record], output: str) -> str:
    """The records as `md`, `json`, `jsonl` or `csv`, with a newline at the end."""
    if output == "json":
        return json.dumps(records, indent=1) + "\n"
    if output == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records)
    return _csv(records) if output == "csv" else _markdown(records)


def comparison(records: Sequence[Record], earlier: Sequence[Record]) -> str:
    """A table of medians before and now for each record that has a partner in `earlier`."""
    texts = []
    for record in records:
        before = find_partner(record, earlier)
        if before is None:
            texts.append(f"No earlier record of {describe_case(record)}.\n")
        elif record["stages"]:
            texts.append(_compare(before, record))
    return "\n".join(texts)


def _markdown(records: Sequence[Record]) -> str:
    rows = [cells for record in records for cells in _rows(record)]
    lines = [*_table(_COLUMNS, rows, n_words=6), ""]
    for record in records:
        lines += _notes(record)
    return "\n".join([*lines, *_conditions(records[-1])]) + "\n"


def _rows(record: Record) -> Iterator[list[str]]:
    size = (record["model_size"] + record["mmproj_size"]) / 1e6
    case = [record["model_filename"].removesuffix(".gguf"), f"{size:.1f}", record["device"]]
    case += [_precision(record), str(record["n_threads"])]
    for row in record["stages"]:
        tokens = f" {row['n_tokens']}" if row["n_tokens"] else ""
        share = record.get(_SHARES.get(row["test"], ""))
        yield [
            *case,
            row["test"].replace("_", " ") + tokens,
            f"{row['min_ns'] / 1e6:.2f}",
            f"{row['median_ns'] / 1e6:.2f}",
            _with_deviation(row["avg_ns"] / 1e6, row["stddev_ns"] / 1e6),
            _with_deviation(row["avg_ts"], row["stddev_ts"]) if row["avg_ts"] else "",
            f"{share:.0%}" if share else "",
        ]
    if record["error"]:
        yield [*case, "failed", *[""] * 5]


def _precision(record: Record) -> str:
    """What was asked for, and what became of it where that was `auto`."""
    asked, used = record["vision_precision"], record["vision_precision_used"]
    return f"{asked} ({used})" if asked == "auto" and used else str(asked)


def _with_deviation(mean: float, deviation: float) -> str:
    """As llama-bench has it: 132.19 ± 0.55."""
    return f"{mean:.2f} ± {deviation:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], n_words: int) -> list[str]:
    """Lines of a Markdown table; columns from `n_words` on are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rules = [
        "-" * width if i < n_words else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < n_words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return [line(header), line(rules), *map(line, rows)]


def _notes(record: Record) -> Iterator[str]:
    """What does not fit into a table of times."""
    name = describe_case(record)
    if not record["stages"]:
        return
    memory = peak_memory(record)
    parts = [] if memory is None else [f"peak memory {memory / 1e6:.1f} MB"]
    if record.get("device_memory_bytes"):
        parts.append(f"{record['device_memory_bytes'] / 1e6:.1f} MB of the device's")
    parts.append(f"from the process's start to the first token {_seconds(record)} s")
    if power := record["power"]:
        parts.append(f"{power['mean_w']:.1f} W ({power['source']})")
    limits = [f"{record['peak_gbs']:.1f} GB/s"] if record["peak_gbs"] else []
    limits += [f"{record['peak_gops']:.0f} GOP/s"] if record["peak_gops"] else []
    if limits:
        parts.append(f"measured limit {' and '.join(limits)}")
    if record["partial"]:
        done = f"{record['repeats_done']} of {_repeats(record)}"
        parts.append(f"partial: interrupted after {done}")
    yield f"- {name}: {', '.join(parts)}"
    if record["device"] == "CPU" and (record["cpu_share"] or 1) < _BUSY:
        share = f"{record['cpu_share']:.0%}"
        yield f"- {name}: got {share} of its threads' time: other programs slowed it down"


def _seconds(record: Record) -> str:
    return f"{record['start_to_first_token_ns'] / 1e9:.2f}"


def _conditions(record: Record) -> list[str]:
    """What all records of a run share."""
    picture, machine = record["picture"], record["machine"]
    build = record["build_commit"] or "not known"
    places = [record["cpu_info"], f"{machine['cores']} cores"]
    places += [machine[key] for key in ("board", "power_mode") if machine[key]]
    places += [record["gpu_info"]] if record["gpu_info"] else []
    return [
        "",
        f"{', '.join(places)}; omnivlm-edge {record['version']} (commit {build}), "
        f"llama-cpp-python {record['llama_cpp_python']}",
        f"{record['model_filename']} {record['model_size'] / 1e6:.1f} MB, "
        f"{record['mmproj_filename']} {record['mmproj_size'] / 1e6:.1f} MB; "
        f"{_picture(picture)}; "
        f"{_repeats(record)}",
    ]


def _repeats(record: Record) -> str:
    n = record["repeats"]
    return "1 repeat" if n == 1 else f"{n} repeats"


def _picture(about: Mapping[str, Any]) -> str:
    return f"{about.get('name')} {about.get('width')} x {about.get('height')}"


def _compare(before: Record, now: Record) -> str:
    old = {row["test"]: row["median_ns"] / 1e6 for row in before["stages"]}
    new = {row["test"]: row["median_ns"] / 1e6 for row in now["stages"]}
    values = [(f"{test.replace('_', ' ')} ms", old[test], new[test]) for test in new if test in old]
    memories = peak_memory(before), peak_memory(now)
    if memories[0] is not None and memories[1] is not None:
        values.append(("peak memory MB", memories[0] / 1e6, memories[1] / 1e6))
    sizes = [(record["model_size"] + record["mmproj_size"]) / 1e6 for record in (before, now)]
    values.append(("files MB", sizes[0], sizes[1]))
    rows = [
        [what, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.1%}" if a else ""] for what, a, b in values
    ]
    lines = [*_table(("median", "before", "now", "change"), rows, n_words=1), ""]
    lines += [f"- {name}: {a} -> {b}" for name, a, b in _differences(before, now)]
    return f"{describe_case(now)}\n\n" + "\n".join(lines) + "\n"


def _differences(before: Record, now: Record) -> Iterator[tuple[str, Any, Any]]:
    for name in _CONDITIONS:
        if before.get(name) != now.get(name):
            yield name, _short(before.get(name)), _short(now.get(name))


def _short(value: Any) -> str:
    text = _picture(value) if isinstance(value, dict) else str(value)
    return text if len(text) < 60 else text[:12] + "…"


def _csv(records: Sequence[Record]) -> str:
    """A line for each stage, with everything that is known of its case."""
    rows = []
    for record in records:
        case = {key: value for key, value in record.items() if key != "stages"}
        rows += [case | row for row in record["stages"] or [{"test": None}]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
