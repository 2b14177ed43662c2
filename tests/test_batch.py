"""Many pictures: every kind of input and output, resuming, and what is wrong with them."""

from __future__ import annotations

import base64
import csv
import errno
import io
import itertools
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from batch_inputs import QUESTION, answers, batch, read_rows, write_pictures
from command import COMMAND
from omnivlm_edge import DeviceError, ImageError, OmniVLM, OptionError, OutputError
from omnivlm_edge.batch.inputs import (
    Columns,
    Item,
    Slice,
    check_columns,
    count_inputs,
    read_inputs,
    read_source,
)
from omnivlm_edge.batch.output import Output, decode_row, encode_row, key_of
from omnivlm_edge.batch.runner import Answerer, Task, Work
from omnivlm_edge.batch.watch import watch_folder
from omnivlm_edge.cli import cli
from omnivlm_edge.cli.batch import _check_address

DESCRIBED = "The image shows three horses and one duck near the water."


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures in a folder and one below it, with a hidden one and what is no picture."""
    folder = write_pictures(tmp_path_factory.mktemp("batch") / "photos", 6)
    (folder / "below").mkdir()
    for name in ("004.png", "005.png"):
        (folder / name).rename(folder / "below" / name)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_text("no picture")
    return folder


def keys(inputs: list[str], columns: Columns | None = None) -> list[str]:
    return sorted(item.key for item in read_inputs(inputs, columns or Columns()))


# ---- inputs -------------------------------------------------------------------------------------


def test_folder_pattern_and_list_name_the_same_pictures(photos: Path, tmp_path: Path) -> None:
    found = keys([str(photos)])
    assert found == sorted(map(str, photos.rglob("[0-9]*.png")))
    assert keys([f"{photos}/**/[0-9]*.png"]) == found
    assert keys([f"{photos}/*/*.png"]) == [f"{photos}/below/004.png", f"{photos}/below/005.png"]
    assert keys([f"{photos}/*.jpg"]) == []
    for end in ("\n", "\r\n", "\0"):
        paths = tmp_path / "list.txt"
        paths.write_bytes(end.join(found).encode())
        assert keys([str(paths)]) == found
    assert list(count_inputs([str(photos), str(tmp_path / "list.txt")], Columns())) == [12]
    paths.write_text("a.png\ndata:image/png;base64,AAAA\n")
    assert keys([str(paths)]) == [f"{tmp_path}/a.png", f"{paths}:2"]


def test_tables_and_shards(photos: Path, tmp_path: Path) -> None:
    path = photos / "000.png"
    content = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    (tmp_path / "000.png").write_bytes(content)
    rows = [{"image": "000.png", "id": "a", "q": "one"}, {"image": uri, "id": "b", "q": "two"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "id", "q"])
        writer.writeheader()
        writer.writerows(rows)
    wrapped = [{**fields, "image": {"bytes": content, "path": "x.png"}} for fields in rows]
    pq.write_table(pa.Table.from_pylist(wrapped), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        table = str(tmp_path / name)
        items = list(read_inputs([table], Columns("image", "id", "q")))
        assert [(item.key, item.prompt) for item in items] == [("a", "one"), ("b", "two")]
        assert list(count_inputs([table], Columns())) == [2]
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(OptionError, match="has no column 'picture', but"):
            list(read_inputs([str(tmp_path / name)], Columns("picture")))
    assert keys([str(tmp_path / "t.parquet")]) == ["x.png", "x.png"]
    assert keys([str(tmp_path / "t.jsonl")]) == [f"{tmp_path}/000.png", f"{tmp_path}/t.jsonl:2"]

    shard = tmp_path / "s-000.tar"
    with tarfile.open(shard, "w") as archive:
        for name, data in (
            ("a.png", content),
            ("a.q.txt", b"one"),
            ("d/b.x.PNG", content),
            ("c.png", content),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert keys([str(shard)]) == [f"{shard}/a.png", f"{shard}/c.png", f"{shard}/d/b.x.PNG"]
    asked = list(read_inputs([str(shard)], Columns(prompt="q.txt")))
    assert asked[0].prompt == "one"
    assert "no file '.q.txt'" in asked[2].problem
    shard.write_bytes(shard.read_bytes()[: 512 + len(content) // 2])
    first, end = read_inputs([str(shard)], Columns())
    assert "cut off" in end.problem
    assert isinstance(first.source, Slice)
    with pytest.raises(ImageError, match="cut off"):
        read_source(first.source, first.key)


def test_what_is_wrong_in_a_table_is_a_row(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png"}\n{torn\n[]\n{"image": null}\n\n{"image": "b.png"}')
    problems = [item.problem for item in read_inputs([str(table)], Columns())]
    assert [bool(problem) for problem in problems] == [False, True, True, True, False]
    for name in ("absent", "absent.jsonl", "absent/"):
        with pytest.raises(ImageError, match="no such file|cannot be read"):
            list(read_inputs([str(tmp_path / name)], Columns()))
    (tmp_path / "what.bin").write_bytes(b"")
    with pytest.raises(OptionError, match="does not tell what it is"):
        list(read_inputs([str(tmp_path / "what.bin")], Columns()))


def test_halves_of_characters_and_deep_lines_are_rows(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [
        r'{"image": "a.png", "id": "\ud800", "q": "what"}',
        r'{"image": "a.png", "id": "b", "q": "\ud800"}',
        r'{"image": "\ud800.png", "id": "c", "q": "what"}',
        "[" * 100_000,
        '{"image": "a.png", "id": "e", "q": "what"}',
    ]
    table.write_text("\n".join(rows))
    items = list(read_inputs([str(table)], Columns("image", "id", "q")))
    assert [item.key for item in items] == [f"{table}:1", "b", "c", f"{table}:4", "e"]
    assert [bool(item.problem) for item in items] == [True] * 4 + [False]
    assert [item.key for item in read_inputs([str(table)], Columns())][2] == f"{table}:3"
    with pytest.raises(OptionError, match="must be UTF-8"):
        Task(("\udcff",))


def test_a_pattern_names_each_file_once(photos: Path) -> None:
    assert keys([f"{photos}/**/**/*.png"]) == keys([str(photos)])


def test_a_table_whose_reading_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /proc/self/mem does: it can be opened, and every read is an error of the system's."""
    monkeypatch.setattr("omnivlm_edge.batch.inputs.MAX_LINE", 1000)
    (tmp_path / "long.csv").write_text('"' + "x" * 5000)
    for name in ("a.csv", "a.jsonl", "a.txt"):
        (tmp_path / name).symlink_to("/proc/self/mem")
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    for name in names:
        check_columns(name, Columns())
    items = list(read_inputs(names, Columns()))
    assert [item.key for item in items] == names
    for item in items:
        assert "cannot be read to its end" in item.problem


def test_a_pattern_passes_over_links_to_themselves(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "one.png").symlink_to(photos / "000.png")
    assert keys([f"{tmp_path}/*.png"]) == [f"{tmp_path}/one.png"]
    assert keys([f"{tmp_path}/*/*.png"]) == []


def test_a_table_that_cannot_be_read_stops_nothing_but_one_of_other_columns_does(
    photos: Path, tmp_path: Path
) -> None:
    names = ("empty.csv", "cut.parquet", "cut.tar")
    for name in names:
        (tmp_path / name).write_bytes(b"PAR1" if name.endswith("parquet") else b"")
    table = tmp_path / "table.csv"
    table.write_text(f"id,image\na,{photos}/000.png\nb,{tmp_path}/absent.png\n")
    out = tmp_path / "out.jsonl"
    inputs = [*(tmp_path / name for name in names), table]
    result = batch(*inputs, "--key-column", "id", "-p", QUESTION, "-o", out)
    assert result.returncode == 3, result.stderr
    rows = {row["key"]: row for row in read_rows(out)}
    assert rows.pop("a")["answer"]
    assert f"{tmp_path}/absent.png" in rows.pop("b")["error"]["message"]
    assert set(rows) == {str(tmp_path / name) for name in names}
    for key, row in rows.items():
        assert key in row["error"]["message"]

    result = batch(*inputs, "--key-column", "sku", "-p", QUESTION, "-o", tmp_path / "other.jsonl")
    assert (result.returncode, (tmp_path / "other.jsonl").exists()) == (1, False)
    assert f"{table}: has no column 'sku'" in result.stderr


def test_a_pattern_of_tables_is_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = pa.Table.from_pylist([{"image": "x.png"}] * 2)
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    assert list(count_inputs([f"{tmp_path}/*.parquet"], Columns())) == [4]


def test_names_of_any_bytes_come_back(tmp_path: Path) -> None:
    names = [b"new\nline.png", b"not\xffutf8.png", "\u2028\u00e4.png".encode(), b"back\\xff.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    lines = [
        encode_row({"key": item.key, "prompt": "p"})
        for item in read_inputs([str(tmp_path)], Columns())
    ]
    assert all(line.count(b"\n") == 1 for line in lines)
    assert all(line.decode() for line in lines)  # strict UTF-8
    back = {os.fsencode(key_of(row)) for line in lines if (row := decode_row(line))}
    assert back == {os.fsencode(tmp_path) + b"/" + name for name in names}
    assert sum(b"key_base64" in line for line in lines) == 1


def test_hidden_folders_and_links_come_while_one_watches(tmp_path: Path) -> None:
    """And are left out, as they would have been before."""
    watched = write_pictures(tmp_path / "watched", 1)
    for name in (".hidden", "seen", "elsewhere"):
        write_pictures(tmp_path / name, 1)
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (0, 0))  # complete since long ago
    stop = threading.Event()
    items = watch_folder(str(watched), stop)
    assert next(items).key == f"{watched}/000.png"
    (watched / "link").symlink_to(tmp_path / "elsewhere")
    for name in (".hidden", "seen"):
        (tmp_path / name).rename(watched / name)
    threading.Timer(2, stop.set).start()
    assert [item.key for item in items] == [f"{watched}/seen/000.png"]


# ---- whole runs ---------------------------------------------------------------------------------


def test_a_folder_becomes_rows(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = batch(photos, "-p", QUESTION, "-o", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "6 rows in" in result.stderr
    rows = {row["key"]: row for row in read_rows(out)}
    assert sorted(rows) == sorted(map(str, photos.rglob("[0-9]*.png")))
    first = rows[f"{photos}/000.png"]
    assert first["answer"] == DESCRIBED
    assert first["finish_reason"] == "stop"
    assert first["error"] is None
    assert first["usage"]["image_tokens"] > 0
    assert set(first["timings"]) >= {"image_encode_ms", "prompt_ms", "ttft_ms", "predicted_ms"}
    assert all(
        len(first[name]) == 64 for name in ("model_sha256", "mmproj_sha256", "prompt_sha256")
    )

    before = out.read_bytes()
    again = batch(photos, "-p", QUESTION, "-o", out)
    assert again.returncode == 0
    assert "0 rows in" in again.stderr
    assert out.read_bytes() == before

    for changed in (
        ("-p", "Is there an egg?"),
        ("-p", QUESTION, "-n", 5),
        ("-p", QUESTION, "-s", "Be brief."),
    ):
        refused = batch(photos, *changed, "-o", out)
        assert refused.returncode == 1
        assert "was begun with another" in refused.stderr
        assert out.read_bytes() == before
    fresh = batch(photos / "000.png", "-p", "Is there an egg?", "-o", out, "--overwrite")
    assert fresh.returncode == 0, fresh.stderr
    assert [row["prompt"] for row in read_rows(out)] == ["Is there an egg?"]


def test_bad_pictures_stop_nothing(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = (photos / "000.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("no picture")
    Image.new("1", (25_000, 20_000)).save(folder / "bomb.png")  # 500 megapixels
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "self.png").symlink_to("self.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder)
    out = tmp_path / "out.jsonl"
    result = batch(folder, "-p", QUESTION, "-o", out)
    assert result.returncode == 3, result.stderr
    rows = {Path(row["key"]).name: row for row in read_rows(out)}
    assert rows["good.png"]["answer"] == DESCRIBED
    messages = {name: row["error"]["message"] for name, row in rows.items() if row["error"]}
    assert {row["error"]["kind"] for row in rows.values() if row["error"]} == {"ImageError"}
    expected = {
        "empty.png": "not a picture",
        "cut.png": "damaged",
        "text.jpg": "not a picture",
        "bomb.png": "too many pixels",
        "gone.png": "no such file",
        "self.png": "cannot be read",
        "pipe.png": "is not a file",
    }
    assert set(messages) == set(expected)
    for name, part in expected.items():
        assert part in messages[name], messages[name]

    (folder / "empty.png").write_bytes(good)
    assert batch(folder, "-p", QUESTION, "-o", out).returncode == 3
    assert len(read_rows(out)) == len(rows)
    retried = batch(folder, "-p", QUESTION, "-o", out, "--retry-errors")
    assert retried.returncode == 3
    assert "7 rows in" in retried.stderr
    assert len(answers(out)) == len(rows)
    assert sum(row["error"] is None for row in read_rows(out)) == 2


def without_root_rights() -> None:
    """Root reads every folder until it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    import ctypes

    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("given", ["{}", "{}/**/*.png"])
def test_a_folder_that_cannot_be_read_is_a_row(given: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_pictures(folder, 1)
    write_pictures(folder / "closed", 1)
    (folder / "closed").chmod(0)
    command = [
        *COMMAND,
        "batch",
        "demo",
        given.format(folder),
        "-p",
        QUESTION,
        "-o",
        str(tmp_path / "out.jsonl"),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=without_root_rights
        )
    finally:
        (folder / "closed").chmod(0o700)
    assert done.returncode == 3, done.stderr
    rows = {row["key"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert "folder cannot be read" in rows[f"{folder}/closed"]["error"]["message"]
    assert rows[f"{folder}/000.png"]["answer"]


def test_several_prompts_choices_and_schema(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asked = ("-p", "Is there a duck?", "-p", "Is there an egg?")
    result = batch(f"{photos}/00[01].png", *asked, "--choices", "yes,no", "-o", out)
    assert result.returncode == 0, result.stderr
    found = {(Path(row["key"]).stem, row["prompt"]): row for row in read_rows(out)}
    assert len(found) == 4
    row = found["000", "Is there a duck?"]
    assert row["answer"] == "yes"
    assert row["choices"]["yes"] > 0.9
    assert sum(row["choices"].values()) == pytest.approx(1, abs=1e-4)
    assert found["000", "Is there an egg?"]["answer"] == "no"
    assert found["001", "Is there an egg?"]["answer"] == "yes"

    out = tmp_path / "schema.jsonl"
    allowed = ["There are no carrots.", "There are two carrots."]
    schema = json.dumps({"enum": allowed})
    prompts = tmp_path / "t.jsonl"
    fields = {"image": str(photos / "001.png"), "q": "How many carrots?"}
    prompts.write_text(json.dumps(fields))
    result = batch(prompts, "--prompt-column", "q", "--schema", schema, "-o", out)
    assert result.returncode == 0, result.stderr
    (row,) = read_rows(out)
    # Which of them is chance: the demo never saw JSON.
    assert json.loads(row["answer"]) in allowed
    cut = batch(
        prompts, "--prompt-column", "q", "--schema", schema, "-n", 2, "-o", tmp_path / "cut.jsonl"
    )
    assert cut.returncode == 3
    assert "cut off" in read_rows(tmp_path / "cut.jsonl")[0]["error"]["message"]


def test_parquet_and_shards(photos: Path, tmp_path: Path) -> None:
    single = tmp_path / "out.parquet"
    assert batch(photos, "-p", QUESTION, "-o", single).returncode == 0
    table = pq.read_table(single).to_pylist()
    assert len(table) == 6
    assert {row["finish_reason"] for row in table} == {"stop"}
    assert table[0]["usage"]["image_tokens"] > 0

    shards = tmp_path / "shards"
    half = (
        f"{photos}/*.png",
        "-p",
        QUESTION,
        "-o",
        f"{shards}/",
        "--format",
        "parquet",
        "--shard-rows",
        3,
    )
    assert batch(*half).returncode == 0
    assert sorted(path.name for path in shards.glob("part*.parquet")) == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    (photos / "below").rename(tmp_path / "below")
    try:
        assert batch(tmp_path / "below", *half).returncode == 0
    finally:
        (tmp_path / "below").rename(photos / "below")
    parts = [pq.read_table(path).to_pylist() for path in sorted(shards.glob("*.parquet"))]
    assert len({row["key"] for part in parts for row in part}) == 6
    assert sum(map(len, parts)) == 6

    lines = tmp_path / "lines"
    assert batch(photos, "-p", QUESTION, "-o", f"{lines}/", "--shard-rows", 4).returncode == 0
    assert [len(read_rows(path)) for path in sorted(lines.glob("part-*"))] == [4, 2]


def test_files_named_as_addresses_of_ray_confuse_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("None", "auto", "local", "a:1"):
        (tmp_path / name).write_bytes(b"")
    for address in (None, "auto", "local", "ray://host:1"):
        _check_address(address)
    with pytest.raises(click.UsageError, match="took a:1 for an address"):
        _check_address("a:1")


def test_usage_errors(photos: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.jsonl")
    for wrong in (
        (photos, *out),
        ("-p", "x", *out),
        (photos, "-p", "x", "--prompt-column", "q", *out),
        (photos, "-p", "x", *out, "--ray", "photos"),
        (photos, "-p", "x", *out, "--ray-actors", "3,1"),
        (photos, "-p", "x", *out, "--schema", "{}", "--choices", "a,b"),
        (photos, "-p", "x", *out, "--ray-actors", "2"),
        (photos, "-p", "x", *out, "--image-column", "picture"),
        (photos, "--prompt-column", "q", *out),
        ("--watch", photos, "-p", "x", "--key-column", "k", *out),
    ):
        arguments = ["batch", "demo", *map(str, wrong)]
        assert CliRunner().invoke(cli, arguments).exit_code == 2, wrong
    assert (
        "ends with .jsonl, .parquet or /" in batch(photos, "-p", "x", "-o", tmp_path / "out").stderr
    )
    for output, more in (
        (photos, ()),
        (out[1], ("--format", "parquet")),
        (out[1], ("--shard-rows", 9)),
    ):
        assert "directory" in batch(photos, "-p", "x", "-o", output, *more).stderr
    assert not list(photos.glob("part*"))
    assert "no such file" in batch(tmp_path / "absent", "-p", "x", *out).stderr
    assert not (tmp_path / "out.jsonl").exists()


# ---- the output ---------------------------------------------------------------------------------

ABOUT = {"model": "m"}


def row(key: str, error: bool = False) -> dict[str, Any]:
    return {
        "key": key,
        "prompt": "p",
        "error": {"kind": "ImageError", "message": "x"} if error else None,
    }


def fill(path: Path | str, *rows: dict[str, Any], **options: Any) -> tuple[int, int]:
    """Appends what is not there; how many rows, and how many of them failed."""
    with Output(str(path), ABOUT, **options) as output:
        for each in rows:
            if output.is_new(each["key"], each["prompt"]):
                output.append(each)
        output.finish()
        return output.n_rows, output.n_errors


def test_torn_and_damaged_lines_are_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert fill(out, row("a"), row("b", error=True), row("c")) == (3, 1)
    whole = out.read_bytes()
    for n in range(1, len(whole)):  # killed at any byte
        out.write_bytes(whole[:n])
        assert fill(out, row("a"), row("b", error=True), row("c")) == (3, 1)
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    first, second, third = whole.splitlines(True)
    for damaged in (first + b"\0" * 9 + third, first + second[:9] + third, first + first + third):
        out.write_bytes(damaged)
        assert fill(out, row("a"), row("b", error=True), row("c")) == (3, 1)
        assert len(answers_of(out)) == 3
    assert fill(out, retry_errors=True) == (2, 0)
    assert answers_of(out) == ["a", "c"]


def answers_of(path: Path) -> list[str]:
    return sorted(each["key"] for each in read_rows(path))


def test_two_runs_and_another_run_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Output(str(out), ABOUT) as first:
        first.append(row("a"))
        with pytest.raises(OutputError, match="another run is writing there"):
            Output(str(out), ABOUT)
    with pytest.raises(OutputError, match="begun with another model"):
        Output(str(out), {"model": "other"})
    run_file = tmp_path / "out.jsonl.run"
    for content in (b"", b'{"torn": '):
        run_file.write_bytes(content)
        with pytest.raises(OutputError, match="missing or damaged"):
            Output(str(out), ABOUT)
    assert fill(out, row("b"), overwrite=True) == (1, 0)
    assert answers_of(out) == ["b"]


def test_a_shard_is_there_once_after_a_kill_between_its_two_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "parquet", "shard_rows": 2}
    out = tmp_path / "out"
    fill(f"{out}/", row("a"), **options)
    table = (out / "part-00000.parquet").read_bytes()
    (out / "part-00000.jsonl").write_bytes(encode_row(row("a")))
    rows = row("a"), row("b", error=True), row("c"), row("d", error=True)
    assert fill(f"{out}/", *rows, **options) == (4, 2)
    assert (out / "part-00000.parquet").read_bytes() == table
    assert not list(out.glob("*.jsonl")) or not read_rows(*out.glob("*.jsonl"))
    assert fill(f"{out}/", retry_errors=True, **options) == (2, 0)
    assert fill(f"{out}/", row("b"), row("d"), **options) == (4, 0)
    found = [
        each["key"] for path in out.glob("*.parquet") for each in pq.read_table(path).to_pylist()
    ]
    assert sorted(found) == ["a", "b", "c", "d"]


def test_other_files_beside_the_shards_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(f"{out}/", row("a"), format="jsonl")
    copy = out / "part-00000.bak"
    copy.write_bytes((out / "part-00000.jsonl").read_bytes() + b"mine")
    assert fill(f"{out}/", row("b"), format="jsonl") == (2, 0)
    assert answers_of(out / "part-00000.jsonl") == ["a", "b"]
    assert copy.read_bytes().endswith(b"mine")


def test_a_disk_that_fails_at_the_end_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    out = tmp_path / "out.jsonl"
    output = Output(str(out), ABOUT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OutputError, match="cannot be written"):
            output.close()
    assert fill(out, row("a")) == (1, 0)  # the lock is free


# ---- the runner ---------------------------------------------------------------------------------


def test_only_a_few_pictures_are_in_flight(tiny_model: Path, photos: Path) -> None:
    taken = 0

    def endless() -> Iterator[Work]:
        nonlocal taken
        for taken in itertools.count(1):
            yield Work(Item(str(taken), photos / "000.png"), ("What?",))

    model = OmniVLM(tiny_model, device="cpu", n_sequences=2, n_threads=1, disk_cache=False)
    task = Task(("What?",))
    with Answerer(model, task, n_parallel=2, n_readers=2) as answerer:
        rows = answerer.run(endless())
        for n in range(1, 8):
            assert next(rows)["answer"] is not None
            assert taken <= n + 5
        rows.close()


def test_a_broken_device_or_input_ends_the_run(tiny_model: Path, photos: Path) -> None:
    class BrokenTask(Task):
        def make(self, *_: object) -> Any:
            raise DeviceError("gone")

    def broken() -> Iterator[Work]:
        yield Work(Item("a", photos / "000.png"), ("What?",))
        raise ImageError("the table is gone")

    model = OmniVLM(tiny_model, device="cpu", n_sequences=2, n_threads=1, disk_cache=False)
    with Answerer(model, BrokenTask(()), n_parallel=2) as answerer:
        with pytest.raises(DeviceError, match="gone"):
            list(answerer.run([Work(Item("a", photos / "000.png"), ("What?",))]))
        with pytest.raises((ImageError, DeviceError), match="gone"):
            list(answerer.run(broken()))


def test_nothing_to_ask_about_is_an_error_and_a_corrected_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty").mkdir()
    result = batch(tmp_path / "empty", "-p", QUESTION, "-o", out)
    assert (result.returncode, result.stdout) == (1, "")
    assert "empty: nothing to ask about was found there" in result.stderr
    photos = write_pictures(tmp_path / "photos", 1)
    result = batch(photos, "-p", "What is in the image?", "-n", 8, "-o", out)
    assert result.returncode == 0, result.stderr
    assert len(answers(out)) == 1


def test_rows_of_one_key_are_told(tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 2)
    table = tmp_path / "table.jsonl"
    lines = [json.dumps({"id": "same", "image": str(path)}) for path in sorted(photos.iterdir())]
    table.write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    command = (table, "--key-column", "id", "-p", QUESTION, "-n", 8, "-o", out)
    for _ in range(2):  # and again when the run goes on
        result = batch(*command)
        assert result.returncode == 0, result.stderr
        assert "1 more were left out: another one has the same key and prompt" in result.stderr
    assert len(answers(out)) == 1


def test_an_input_is_never_written_to(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"image": str(photos / "000.png")}) + "\n")
    folder = tmp_path / "io"
    folder.mkdir()
    part = folder / "part-00000.jsonl"
    part.write_text(table.read_text())
    for given, output in (
        (table, table),
        (tmp_path / "*.jsonl", table),
        (part, f"{folder}/"),
    ):
        for more in ((), ("--overwrite",)):
            result = batch(given, "-p", QUESTION, "-o", output, *more)
            assert result.returncode == 1
            assert "is an input, and would be written to" in result.stderr
    assert table.read_text() == part.read_text() != ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["io", part.name, table.name]


def test_an_output_that_is_no_file(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    for name in ("fifo.jsonl", "full.jsonl"):
        result = batch(photos, "-p", QUESTION, "-o", tmp_path / name)
        assert (result.returncode, "is no regular file" in result.stderr) == (1, True)


def test_shards_of_parquet_are_a_data_set(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    command = (photos, "-p", QUESTION, "-n", 8, "-o", f"{out}/")
    command += ("--format", "parquet", "--shard-rows", 4)
    for _ in range(2):  # and when nothing is left to do
        assert batch(*command).returncode == 0
        assert pq.read_table(out).num_rows == 6
    names = ["_run", "part-00000.parquet", "part-00001.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_choices_are_checked_before_the_first_picture(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = batch(photos, "-p", QUESTION, "--choices", "yes,yes", "-o", out)
    assert (result.returncode, out.exists()) == (1, False)
    assert "two or more different words" in result.stderr


def test_pictures_without_a_question_are_rows_with_an_error(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"image": str(photos / "000.png"), "q": QUESTION}))
    assert batch(photos, table, "--prompt-column", "q", "-o", out).returncode == 3
    errors = [row["error"]["message"] for row in read_rows(out) if row["error"]]
    assert len(errors) == 6
    assert all("has no question of its own" in message for message in errors)
