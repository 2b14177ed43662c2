"""`ls`, `show` and `rm` over a cache that was filled from a hub of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_hub import DEMO, MAKE, REPO, Cli, FakeHub, pulled, python
from omnivlm_edge.memory import memory_needed
from omnivlm_edge.model_file import inspect_file

FOLDER = REPO.replace("/", "--")


@pytest.fixture
def filled(hub: FakeHub, hub_cli: Cli, hub_env: dict[str, str]) -> None:
    """Q8_0 and F16 from the hub, Q4_K_M of both parts made here."""
    pulled(hub_cli("pull", "omnivision", "omnivision:f16"))
    pulled(python(hub_env, MAKE.format(vision=True)))
    hub.requests.clear()


def listing(hub_cli: Cli) -> dict[str, Any]:
    result = hub_cli("ls", "--json")
    assert result.returncode == 0, result.stderr
    return {entry["name"]: entry for entry in json.loads(result.stdout)}


def files_under(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("*") if file.is_file() and file.suffix != ".TAG")


def test_list_of_a_new_user(hub_cli: Cli) -> None:
    result = hub_cli("ls")
    size = sum(path.stat().st_size for path in DEMO.glob("*.gguf"))
    assert result.stdout == (
        f"NAME  TEXT  VISION  SIZE   WHERE\ndemo  F16   F16     {size / 1e6:.0f} MB  package\n"
    )
    assert hub_cli("list").stdout == result.stdout
    assert hub_cli("ls", HF_HUB_OFFLINE="1").stdout == result.stdout


@pytest.mark.usefixtures("filled")
def test_list(hub: FakeHub, hub_cli: Cli, tmp_path: Path) -> None:
    # Other programs' models, a text model without a vision file, an unfinished download.
    for repo, name in (("bert/base", "model.safetensors"), ("x/text-only", "text.gguf")):
        folder = tmp_path / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "snapshots" / "0").mkdir(parents=True)
        (folder / "snapshots" / "0" / name).write_bytes((DEMO / "demo-F16.gguf").read_bytes())
    models = listing(hub_cli)
    types = {
        name: (entry["text"]["quantization"], entry["vision"]["quantization"], entry["where"])
        for name, entry in models.items()
    }
    assert types == {
        "demo": ("F16", "F16", "package"),
        "omnivision:f16": ("F16", "F16", "hub cache"),
        "omnivision:q4_k_m": ("Q4_K_M", "Q4_K_M", "made here"),
        "omnivision:q8_0": ("Q8_0", "F16", "hub cache"),
    }
    for name, entry in models.items():
        sizes = [Path(entry[part]["file"]).stat().st_size for part in ("text", "vision")]
        assert entry["size"] == sum(sizes)
        assert hub_cli("show", name).returncode == 0
    assert [line.split()[0] for line in hub_cli("ls").stdout.splitlines()] == ["NAME", *models]
    assert hub.requests == []


def test_show(hub_cli: Cli) -> None:
    whole = json.loads(hub_cli("show", "demo", "--json").stdout)
    text, vision = whole["text"], whole["vision"]
    assert (text["architecture"], text["quantization"], text["context_length"]) == (
        "qwen2",
        "F16",
        1024,
    )
    assert vision["image_size"] == 126
    assert vision["image_tokens"] == 9
    assert vision["variant"] == "vlm-81-instruct"
    assert text["parameters"] + vision["parameters"] == 8_183_808  # README: 8.2 M
    for part in (text, vision):
        assert part["size"] == Path(part["file"]).stat().st_size
    files = (inspect_file(Path(part["file"])) for part in (text, vision))
    assert whole["memory"] == memory_needed(*files, 2048)
    lines = hub_cli("show", "demo").stdout.splitlines()
    assert "  parameters      2,749,696" in lines
    assert "  image size      126x126 pixels" in lines

    assert json.loads(hub_cli("show", DEMO, "--json").stdout)["memory"] == whole["memory"]
    text_alone = json.loads(hub_cli("show", DEMO / "demo-F16.gguf", "--json").stdout)
    assert text_alone.keys() == {"name", "text"}
    vision_alone = json.loads(hub_cli("show", DEMO / "mmproj-demo-F16.gguf", "--json").stdout)
    assert vision_alone.keys() == {"name", "vision"}


def test_show_of_what_is_not_here(hub: FakeHub, hub_cli: Cli, tmp_path: Path) -> None:
    result = hub_cli("show", "omnivision")
    assert result.returncode == 1
    assert "omnivision: is not on this machine" in result.stderr
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf: is damaged" in hub_cli("show", tmp_path / "x.gguf").stderr
    assert hub.requests == []


@pytest.mark.usefixtures("filled")
def test_remove_one_quantization_after_the_other(hub_cli: Cli, tmp_path: Path) -> None:
    cache, own = tmp_path / "hf" / "hub" / f"models--{FOLDER}", tmp_path / "own"
    size = listing(hub_cli)["omnivision:q8_0"]["text"]["file"]
    freed = Path(size).stat().st_size
    removed = hub_cli("rm", "omnivision:q8_0", "--json")
    assert json.loads(removed.stdout) == [{"name": "omnivision:q8_0", "freed": freed}]
    assert listing(hub_cli).keys() == {"demo", "omnivision:f16", "omnivision:q4_k_m"}
    assert hub_cli("rm", "omnivision:q8_0").returncode == 1

    # The source goes, what was made of it stays.
    hub_cli("rm", "omnivision:f16")
    assert listing(hub_cli).keys() == {"demo", "omnivision:q4_k_m"}
    assert files_under(cache / "snapshots") == ["omnivision-text-optimized-mmproj-f16.gguf"]

    # The last text model takes the vision file with it.
    assert hub_cli("remove", "omnivision:q4_k_m").stdout.startswith("Removed omnivision:q4_k_m: ")
    assert listing(hub_cli).keys() == {"demo"}
    assert files_under(tmp_path / "hf") == files_under(own) == []


def test_remove_one_quantization_among_files_of_others(
    hub: FakeHub, hub_cli: Cli, tmp_path: Path
) -> None:
    pulled(hub_cli("pull", "omnivision"))
    snapshot = tmp_path / "hf" / "hub" / f"models--{FOLDER}" / "snapshots" / hub.commit(REPO)
    (snapshot / "model.safetensors").touch()
    assert hub_cli("rm", "omnivision:q8_0").returncode == 0
    assert files_under(snapshot) == ["model.safetensors"]


@pytest.mark.usefixtures("filled")
def test_remove_a_whole_model(hub_cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "hf" / "hub" / "models--bert--base" / "snapshots" / "0" / "model.bin"
    other.parent.mkdir(parents=True)
    other.touch()
    result = hub_cli("rm", "omnivision")
    assert result.returncode == 0
    assert result.stdout == "Removed omnivision: 39 MB freed.\n"
    assert listing(hub_cli).keys() == {"demo"}
    assert files_under(tmp_path / "hf") == ["model.bin"]
    assert "hf:bert/base: is not on this machine" in hub_cli("rm", "hf:bert/base").stderr
    assert other.exists()


def test_files_that_the_cache_only_links_to_are_not_removed(
    hub_cli: Cli, hub_env: dict[str, str], tmp_path: Path
) -> None:
    """Another program's cache, or a user's own files, linked into a snapshot."""
    mine = tmp_path / "mine"
    shutil.copytree(DEMO, mine)
    snapshot = Path(hub_env["HF_HOME"]) / "hub" / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for file in mine.glob("*.gguf"):
        (snapshot / file.name).symlink_to(file)
    assert hub_cli("rm", "hf:a/b").returncode == 0
    assert not any(snapshot.parent.parent.glob("**/*.gguf"))
    assert len(list(mine.glob("*.gguf"))) == 2


def test_what_is_never_removed(hub_cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.touch()
    for model, reason in {
        "demo": "'demo': belongs to the package and is not removed",
        str(mine): "is no name of a stored model and is not removed",
        str(tmp_path): "is no name of a stored model and is not removed",
        "omnivision": "omnivision: is not on this machine",
    }.items():
        result = hub_cli("rm", model)
        assert result.returncode == 1
        assert result.stdout == ""
        assert reason in result.stderr
    assert mine.exists()


def test_unfinished_downloads_can_be_removed(hub_cli: Cli, tmp_path: Path) -> None:
    blobs = tmp_path / "hf" / "hub" / f"models--{FOLDER}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0.incomplete").write_bytes(bytes(2_000_000))
    assert hub_cli("rm", "omnivision").stdout == "Removed omnivision: 2 MB freed.\n"
    assert not blobs.exists()
