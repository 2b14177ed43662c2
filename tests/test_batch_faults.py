"""A batch run that is killed, starved of disk, or disturbed: nothing is lost, nothing is twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batch_inputs import PLACE, QUESTION, answers, batch, read_rows, write_pictures
from command import COMMAND
from omnivlm_edge import ImageError
from omnivlm_edge.image import load_image


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, "batch", "demo", *map(str, arguments), *PLACE]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(path: Path, n: int, process: subprocess.Popen[str]) -> None:
    while n_lines(path) < n and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """Kills at random moments: before the first row, between rows, and within them.

    A quick machine answers some more pictures before the signal arrives, so that each kill waits
    for a share of the rows that are left.
    """
    photos = write_pictures(tmp_path / "photos", 200)
    options = (photos, "-p", QUESTION, "-n", 24)
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    assert batch(*options, "-o", undisturbed).returncode == 0
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    for kills_left in range(20, 0, -1):
        process = start(*options, "-o", out, "-q")
        share = (200 - n_lines(out)) // kills_left
        wait_for_rows(out, n_lines(out) + moments.randrange(1 + share // 2), process)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert n_lines(out) < 200
    result = batch(*options, "-o", out)
    assert result.returncode == 0, result.stderr
    assert len(answers(out)) == 200
    assert answers(out) == answers(undisturbed)


def test_ctrl_c_ends_at_once_and_the_next_run_goes_on(tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 60)
    out = tmp_path / "out.jsonl"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(photos, "-p", QUESTION, "-o", out)
        wait_for_rows(out, n_lines(out) + 2, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "the same command goes on from here" in said
        assert "Traceback" not in said
    assert batch(photos, "-p", QUESTION, "-o", out).returncode == 0
    assert len(answers(out)) == 60


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 60)
    out = tmp_path / "out.jsonl"
    process = start(photos, "-p", QUESTION, "-o", out)
    wait_for_rows(out, 1, process)
    os.kill(process.pid, signal.SIGSTOP)
    second = batch(photos, "-p", QUESTION, "-o", out)
    os.kill(process.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert "another run is writing there" in second.stderr
    process.communicate()
    assert len(answers(out)) == 60


# A disk of 48 kB with a file on it that leaves room for some rows, in a mount of its own.
FULL_DISK = """
set -u
mount -t tmpfs -o size=48k tmpfs "$1"
head -c 24000 /dev/zero > "$1/other"
shift
"$@"; first=$?
cp "$COPY/disk/out.jsonl" "$COPY/full.jsonl"
rm "$COPY/disk/other"
"$@"; second=$?
cp "$COPY/disk/out.jsonl" "$COPY/whole.jsonl"
test $first = 1 && test $second = 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_full_disk(tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 40)
    (tmp_path / "disk").mkdir()
    separate = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command = [*COMMAND, "batch", "demo", str(photos), "-p", QUESTION]
    command += ["-o", str(tmp_path / "disk" / "out.jsonl"), "-q", *PLACE]
    done = subprocess.run(
        [*separate, "sh", "-c", FULL_DISK, "sh", str(tmp_path / "disk"), *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COPY": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    kept = (tmp_path / "full.jsonl").read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < len(answers(tmp_path / "full.jsonl")) < 40
    assert (tmp_path / "whole.jsonl").read_bytes().startswith(kept)
    assert len(answers(tmp_path / "whole.jsonl")) == 40


# Every 100 microseconds a byte more.
GROW = """
import sys, time
with open(sys.argv[1], "ab", buffering=0) as file:
    while file.write(b"\\0"):
        time.sleep(1e-4)
"""


def test_a_picture_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "photos", 1) / "000.png"
    whole = path.read_bytes()
    os.truncate(path, 200_000_000)  # so that reading takes a while
    writer = subprocess.Popen([sys.executable, "-c", GROW, str(path)])
    try:
        size = path.stat().st_size
        while path.stat().st_size == size:
            time.sleep(0.01)
        with pytest.raises(ImageError, match="is changed while it is read"):
            load_image(path)
        result = batch(path, "-p", QUESTION, "-o", tmp_path / "out.jsonl")
    finally:
        writer.kill()
        writer.wait()
    assert result.returncode == 3
    assert "is changed while" in read_rows(tmp_path / "out.jsonl")[0]["error"]["message"]
    path.write_bytes(whole)
    again = batch(path, "-p", QUESTION, "-o", tmp_path / "out.jsonl", "--retry-errors")
    assert again.returncode == 0
    assert len(answers(tmp_path / "out.jsonl")) == 1


def test_a_watched_folder(tmp_path: Path) -> None:
    """Pictures of before, of later, copied in two halves, renamed, and moved with their folder."""
    more = write_pictures(tmp_path / "more", 5)
    watched = write_pictures(tmp_path / "watched", 1)
    out = tmp_path / "out.jsonl"
    process = start("--watch", watched, "-p", QUESTION, "-o", out, "-q")
    wait_for_rows(out, 1, process)
    content = (more / "001.png").read_bytes()
    with (watched / "halves.png").open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(2.5)  # longer than a file must stand still
        file.write(content[len(content) // 2 :])
    (watched / ".002.png.part").write_bytes((more / "002.png").read_bytes())
    (watched / ".002.png.part").rename(watched / "002.png")
    (more / "folder").mkdir()
    (more / "003.png").rename(more / "folder" / "003.png")
    (more / "folder").rename(watched / "folder")
    (watched / "notes.txt").write_text("no picture")
    wait_for_rows(out, 4, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    rows = {os.path.relpath(row["key"], watched): row["answer"] for row in read_rows(out)}
    assert sorted(rows) == ["000.png", "002.png", "folder/003.png", "halves.png"]
    assert all(rows.values())
    assert rows["halves.png"] == rows["folder/003.png"] or rows["halves.png"]

    (watched / "later.png").write_bytes(content)
    process = start("--watch", watched, "-p", QUESTION, "-o", out, "-q")
    wait_for_rows(out, 5, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert len(answers(out)) == 5
