"""Models by name: the real huggingface_hub client against a hub of our own on the loopback."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from command import COMMAND
from fake_hub import (
    DEMO,
    MAKE,
    REPO,
    Cli,
    FakeHub,
    git_sha1,
    pulled,
    python,
    sha256,
    with_file_type,
)
from omnivlm_edge import ModelFileError
from omnivlm_edge.hub import Reference, parse_reference
from omnivlm_edge.models import find_model
from tiny_gguf import write_gguf, write_mmproj

HORSES = Path(__file__).parents[1] / "examples" / "horses.png"
TEXT = "omnivision-text-optimized-llm-Q8_0.gguf"
VISION = "omnivision-text-optimized-mmproj-f16.gguf"
SOURCE = "omnivision-text-optimized-llm-f16.gguf"
CHUNK = 10 * 2**20  # what huggingface_hub writes at once


def megabytes(*names: str, hub: FakeHub) -> str:
    """As messages give the size of published files."""
    return f"{sum(len(hub.repos[REPO][name]) for name in names) / 1e6:.0f} MB"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"


REFERENCES = {
    "omnivision": Reference("omnivision", REPO),
    "omniVLM:fp16": Reference("omnivlm", REPO, "F16"),
    "OMNIVISION:Q4_k_M": Reference("omnivision", REPO, "Q4_K_M"),
    "omnivision-ocr:f32": Reference(
        "omnivision-ocr", "NexaAIDev/vlm-81-ocr-gguf", "F32", "vlm-81-ocr"
    ),
    "omnivision-preview": Reference(
        "omnivision-preview", "NexaAIDev/nano-vlm-instruct-gguf", None, "nano-vlm-instruct"
    ),
    "hf:a.b/C_d:bf16": Reference("hf:a.b/C_d", "a.b/C_d", "BF16"),
    "demo": None,
    "./omnivision": None,
    "omnivision.gguf": None,
    "USER/REPO": None,
}


@pytest.mark.parametrize(("text", "reference"), REFERENCES.items())
def test_names(text: str, reference: Reference | None) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["hf:", "hf:x", "hf:../x", "hf:a/b/c", "hf:a--b/c", "hf:a/" + "b" * 99]
)
def test_impossible_repositories(text: str) -> None:
    with pytest.raises(ModelFileError, match="is no repository"):
        parse_reference(text)


def test_impossible_quantization() -> None:
    with pytest.raises(ModelFileError, match="'q9': is no quantization; the names are .*q8_0"):
        parse_reference("omnivision:q9")


def test_first_run_downloads_and_the_next_needs_no_network(hub: FakeHub, hub_cli: Cli) -> None:
    ask = ("run", "omnivision", "-i", HORSES, "-p", "Describe the image", "--device", "cpu")
    first = hub_cli(*ask)
    assert first.stdout == "The image shows three horses and one duck near the water.\n"
    assert first.stderr == ""
    hub.requests.clear()
    assert hub_cli(*ask).stdout == first.stdout
    assert hub_cli(*ask, "--offline").stdout == first.stdout
    assert hub_cli(*ask, HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub.requests == []


def test_pull_takes_the_newest_generation_and_keeps_the_caches_layout(
    hub: FakeHub, hub_cli: Cli, cache: Path
) -> None:
    text, vision = pulled(hub_cli("pull", "omnivision"))
    assert (text.name, vision.name) == (TEXT, VISION)
    assert text.parent == cache / "snapshots" / hub.commit(REPO)
    assert (cache / "refs" / "main").read_text() == hub.commit(REPO)
    for path in (text, vision):
        data = hub.repos[REPO][path.name]
        assert path.read_bytes() == data
        assert path.resolve() == cache / "blobs" / sha256(data)
    assert len(list((cache / "blobs").iterdir())) == 2


def test_pull_asks_the_hub_and_loads_only_what_changed(hub: FakeHub, hub_cli: Cli) -> None:
    before = pulled(hub_cli("pull", "omnivision"))
    hub.requests.clear()
    assert pulled(hub_cli("pull", "omnivision")) == before
    assert hub.requests
    assert hub.downloads() == []
    hub.repos[REPO][TEXT] += b"newer"
    text, vision = pulled(hub_cli("pull", "omnivision"))
    assert text.read_bytes() == hub.repos[REPO][TEXT]
    assert vision.resolve() == before[1].resolve()
    assert len(hub.downloads()) == 1
    hub.requests.clear()
    shown = hub_cli("show", "omnivision", "--json")
    assert str(text) in shown.stdout


def test_quantization_by_tag(hub: FakeHub, hub_cli: Cli) -> None:
    text, vision = pulled(hub_cli("pull", "omniVLM:FP16"))
    assert text.name == "omnivision-text-optimized-llm-f16.gguf"
    result = hub_cli("pull", "omnivision:q8_0")
    assert pulled(result) == [text.with_name(TEXT), vision]
    assert re.fullmatch(
        "The vision file is not published as Q8_0: using F16 "
        rf"\({megabytes(VISION, hub=hub)}\)\. .*--yes.*\n",
        result.stderr,
    )


def test_the_token_stays_with_the_hub(hub: FakeHub, hub_cli: Cli) -> None:
    pulled(hub_cli("pull", "omnivision", HF_TOKEN="hf_secret"))
    tokens = {
        (request.path.split("/")[1] == "cdn", request.headers.get("authorization"))
        for request in hub.requests
        if REPO in request.path or "/cdn/" in request.path
    }
    assert tokens == {(False, "Bearer hf_secret"), (True, None)}


def test_connection_cut_in_the_middle(hub: FakeHub, hub_cli: Cli) -> None:
    hub.repos[REPO][TEXT] += bytes(2 * CHUNK)
    hub.cut = CHUNK + 1_000_000
    text, _ = pulled(hub_cli("pull", "omnivision"))
    assert text.read_bytes() == hub.repos[REPO][TEXT]
    assert [request.range for request in hub.downloads()] == [None, f"bytes={CHUNK}-", None]


def test_killed_process_goes_on_where_it_stopped(
    hub: FakeHub, hub_cli: Cli, hub_env: dict[str, str], cache: Path
) -> None:
    hub.repos[REPO][TEXT] += bytes(2 * CHUNK)
    hub.stall = CHUNK + 1_000_000
    process = subprocess.Popen([*COMMAND, "pull", "omnivision"], env=hub_env)
    partial = cache / "blobs" / f"{sha256(hub.repos[REPO][TEXT])}.incomplete"
    wait_for(lambda: partial.exists() and partial.stat().st_size == CHUNK)
    process.kill()
    process.wait()
    assert hub_cli("run", "omnivision", "--offline").returncode == 1
    hub.requests.clear()
    text, _ = pulled(hub_cli("pull", "omnivision"))
    assert text.read_bytes() == hub.repos[REPO][TEXT]
    assert not partial.exists()
    assert [request.range for request in hub.downloads()] == [f"bytes={CHUNK}-", None]


def test_interrupt_keeps_what_was_loaded(
    hub: FakeHub, hub_env: dict[str, str], cache: Path
) -> None:
    hub.stall = 3_000_000
    process = subprocess.Popen(
        [*COMMAND, "pull", "omnivision"],
        env=hub_env,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: bool(hub.downloads()))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert [path.suffix for path in (cache / "blobs").iterdir()] == [".incomplete"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_wrong_hash(hub: FakeHub, hub_cli: Cli, cache: Path) -> None:
    hub.damaged = True
    result = hub_cli("pull", "omnivision")
    assert result.returncode == 1
    assert f"{TEXT} arrived damaged" in result.stderr
    assert list((cache / "blobs").iterdir()) == []
    hub.damaged = False
    pulled(hub_cli("pull", "omnivision"))


def test_remains_of_another_file_are_not_resumed(hub: FakeHub, hub_cli: Cli, cache: Path) -> None:
    (cache / "blobs").mkdir(parents=True)
    data = hub.repos[REPO][TEXT]
    (cache / "blobs" / f"{sha256(data)}.incomplete").write_bytes(bytes(len(data) + 1))
    assert pulled(hub_cli("pull", "omnivision"))[0].read_bytes() == data


FAILURES = {
    401: ({}, "does not exist on .* or is private; check the name, or set HF_TOKEN"),
    403: ({}, "is private; check the name, or set HF_TOKEN"),
    404: ({}, "is not on http://"),
    429: ({"Retry-After": "77"}, "too many requests from here; try again in 77 seconds"),
    500: ({}, "answers with status 500; try again later"),
}


@pytest.mark.parametrize("status", FAILURES)
def test_refusals(hub: FakeHub, hub_cli: Cli, status: int) -> None:
    hub.status = status
    hub.headers, message = FAILURES[status]
    result = hub_cli("run", "omnivision", "-i", HORSES, "-p", "?")
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(f"Error: .*{message}.*\n", result.stderr)


def test_gated_and_absent_repositories(hub: FakeHub, hub_cli: Cli) -> None:
    hub.gated = True
    assert "is gated: accept its terms on" in hub_cli("pull", "omnivision").stderr
    assert "nobody/nothing: does not exist on" in hub_cli("pull", "hf:nobody/nothing").stderr


def test_no_network(hub_cli: Cli) -> None:
    closed = hub_cli("pull", "omnivision", HF_ENDPOINT="http://127.0.0.1:9")
    assert closed.returncode == 1
    assert re.fullmatch(
        r"Error: omnivision: cannot be downloaded from http://127\.0\.0\.1:9 \(.+\); "
        r"check the network and try again\n",
        closed.stderr,
    )
    forbidden = hub_cli("pull", "omnivision", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to download it" in forbidden.stderr
    offline = hub_cli("run", "omnivision", "--offline")
    assert offline.returncode == 1
    assert (
        "omnivision: is not on this machine; where there is a network, `omnivlm-edge pull"
        in offline.stderr
    )


def test_too_little_space(hub: FakeHub, hub_env: dict[str, str], cache: Path) -> None:
    code = (
        "import shutil\n"
        "shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9e9, 9e9, 2_500_000)\n"
        "from omnivlm_edge.hub import resolve\nresolve('omnivision')"
    )
    stderr = python(hub_env, code).stderr
    needed = megabytes(TEXT, VISION, hub=hub)
    assert f"{needed} are to be downloaded and 2 MB are free; make room, or set HF_HOME" in stderr
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("error", "message"),
    {
        OSError(errno.ENOSPC, "No space left"): "omnivision: the disk is full; make room",
        PermissionError(errno.EACCES, "no", "/x"): "omnivision: /x cannot be written; change its",
    }.items(),
)
def test_disks_that_refuse(error: OSError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelFileError, match=message):
        find_model("omnivision")


def test_two_processes_at_once(hub: FakeHub, hub_env: dict[str, str]) -> None:
    command = [*COMMAND, "pull", "omnivision"]
    processes = [
        subprocess.Popen(
            command, env=hub_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len(set(outputs)) == 1
    assert len(hub.downloads()) == 2


def test_other_repositories_by_metadata(hub: FakeHub, hub_cli: Cli, tmp_path: Path) -> None:
    """Names that say nothing, a file outside of LFS, files of other models."""
    text = (DEMO / "demo-F16.gguf").read_bytes()
    vision = (DEMO / "mmproj-demo-F16.gguf").read_bytes()
    other = write_mmproj(tmp_path / "other.gguf", layout="siglip").read_bytes()
    llava = {"general.architecture": "clip", "clip.projector_type": "mlp"}
    hub.repos["who/knows"] = {
        "mmproj-1.gguf": with_file_type(text, "Q4_0"),
        "weights/projector-2.gguf": vision,
        "a.gguf": other,
        "b.gguf": write_gguf(tmp_path / "llava.gguf", llava, {}).read_bytes(),
        "c.gguf": b"not a GGUF file",
    }
    hub.small = {"weights/projector-2.gguf"}
    paths = pulled(hub_cli("pull", "hf:who/knows"))
    assert [path.name for path in paths] == ["mmproj-1.gguf", "projector-2.gguf"]
    assert paths[1].resolve().name == git_sha1(vision)
    assert "hf:who/knows:q4_0" in hub_cli("ls").stdout
    assert hub_cli("show", "hf:who/knows").returncode == 0
    del hub.repos["who/knows"]["weights/projector-2.gguf"]
    nothing = hub_cli("pull", "hf:who/knows")
    assert "publishes no text model and vision file of OmniVLM that fit" in nothing.stderr


def test_a_listing_cannot_choose_where_files_go(hub: FakeHub, hub_cli: Cli, cache: Path) -> None:
    hub.small = {TEXT, VISION}
    hub.git_sha1 = lambda _: "../../../escaped"
    result = hub_cli("pull", "omnivision")
    assert result.returncode == 1
    assert not list(cache.parents[2].rglob("escaped*"))


def test_only_headers_are_read_to_choose(hub: FakeHub, hub_cli: Cli) -> None:
    hub.repos["who/knows"] = {
        name: data for name, data in hub.repos[REPO].items() if "optimized" in name
    }
    pulled(hub_cli("pull", "hf:who/knows"))
    headers = [request for request in hub.requests if (request.range or "").startswith("bytes=0-")]
    assert {request.range for request in headers} == {"bytes=0-262143"}
    assert len(hub.downloads()) == 2


def test_what_is_not_published_is_offered(hub: FakeHub, hub_cli: Cli) -> None:
    result = hub_cli("run", "omnivision:q4_k_m", "-i", HORSES, "-p", "?")
    assert result.returncode == 1
    assert result.stderr == (
        "Error: omnivision:q4_k_m: is not published (published: F16, Q8_0); `omnivlm-edge pull "
        "omnivision:q4_k_m --yes` makes it here, once, from the F16 file of "
        f"{megabytes(SOURCE, hub=hub)}\n"
    )
    assert hub.downloads() == []
    for name in list(hub.repos[REPO]):
        if name.endswith("llm-f16.gguf"):
            del hub.repos[REPO][name]
    nothing = hub_cli("pull", "omnivision:q4_k_m", "--yes").stderr
    assert "nor an F16, BF16 or F32 file to make it from" in nothing


def test_made_once_and_again_when_the_source_changed(
    hub: FakeHub, hub_cli: Cli, hub_env: dict[str, str], tmp_path: Path
) -> None:
    made = tmp_path / "own" / "models" / "NexaAI--OmniVLM-968M"
    text, vision = pulled(python(hub_env, MAKE.format(vision=True)))
    name = "omnivision-text-optimized-llm-Q4_K_M.gguf"
    assert text == made / sha256(hub.repos[REPO][SOURCE])[:12] / name
    assert vision.name == "mmproj-omnivision-text-optimized-Q4_K_M.gguf"
    hub.requests.clear()
    assert pulled(hub_cli("pull", "omnivision:q4_k_m")) == [text, vision]
    assert hub.downloads() == []
    shown = hub_cli("show", "omnivision:q4_k_m", "--json")
    assert str(text) in shown.stdout
    assert str(vision) in shown.stdout

    hub.repos[REPO][SOURCE] += b"newer"
    assert "is not published" in hub_cli("pull", "omnivision:q4_k_m").stderr
    newer, _ = pulled(python(hub_env, MAKE.format(vision=False)))
    assert newer == made / sha256(hub.repos[REPO][SOURCE])[:12] / name
    assert not text.exists()
    assert vision.exists()


def test_a_terminal_is_asked(hub: FakeHub, hub_env: dict[str, str]) -> None:
    arguments = [*COMMAND[1:], "pull", "omnivision:q4_k_m"]
    with pexpect.spawn(COMMAND[0], arguments, env=hub_env, encoding="utf-8") as terminal:
        question = f"make it here, once, from the F16 file of {megabytes(SOURCE, hub=hub)}? [y/N]:"
        terminal.expect_exact(question, timeout=60)
        terminal.sendline("n")
        terminal.expect(pexpect.EOF, timeout=60)
        assert "Error: omnivision:q4_k_m: is not published" in terminal.before
    assert terminal.exitstatus == 1


def test_pull_mends_a_file_that_was_damaged_here(hub_cli: Cli) -> None:
    files = pulled(hub_cli("pull", "omnivision"))
    for path, spoilt in zip(files, (b"GGUF", b"no header at all"), strict=True):
        whole = path.read_bytes()
        path.resolve().write_bytes(spoilt)
        assert pulled(hub_cli("pull", "omnivision")) == files
        assert path.read_bytes() == whole


def test_quantize_takes_the_f16_files_of_a_name(hub_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "small"
    written = pulled(hub_cli("quantize", "omnivision", out, "--q8_0"))
    assert [path.name for path in written] == [
        "omnivision-text-optimized-llm-Q8_0.gguf",
        "mmproj-omnivision-text-optimized-Q8_0.gguf",
    ]
