"""Finding and pairing a model's two files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from omnivlm_edge import ModelFileError
from omnivlm_edge.models import find_model
from tiny_gguf import VisionShape, write_gguf, write_mmproj


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A model whose file names say nothing, or the wrong thing."""
    for path in tiny_model.glob("*.gguf"):
        name = "a.gguf" if path.name.startswith("mmproj") else "mmproj-b.gguf"
        shutil.copy(path, tmp_path / name)
    return tmp_path


def test_directory_and_file_are_paired_by_metadata(model: Path) -> None:
    for name in (model, str(model), model / "mmproj-b.gguf"):
        files = find_model(name)
        assert files.text == model / "mmproj-b.gguf"
        assert files.mmproj == model / "a.gguf"


def test_explicit_mmproj(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(model / "a.gguf", elsewhere / "projector-fp16.gguf")
    files = find_model(model, elsewhere / "projector-fp16.gguf")
    assert files.mmproj.parent == elsewhere
    with pytest.raises(ModelFileError, match="holds no mmproj"):
        find_model(model)


def test_absent(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file or directory, nor a model"):
        find_model(tmp_path / "none")
    with pytest.raises(ModelFileError, match="there is no such file"):
        find_model(model, "none.gguf")


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="holds no text model"):
        find_model(tmp_path)


def test_ambiguous(model: Path) -> None:
    shutil.copy(model / "a.gguf", model / "c.gguf")
    with pytest.raises(ModelFileError, match=r"several files for mmproj \(a.gguf, c.gguf\)"):
        find_model(model)
    shutil.copy(model / "mmproj-b.gguf", model / "d.gguf")
    with pytest.raises(ModelFileError, match=r"several files for text model"):
        find_model(model)


def test_vision_file_as_model(model: Path) -> None:
    with pytest.raises(ModelFileError, match="is a vision file"):
        find_model(model / "a.gguf")


def test_files_of_no_use_do_not_stand_in_the_way(model: Path, tmp_path: Path) -> None:
    (model / "damaged.gguf").write_bytes(b"GGUF but not really")
    (model / "empty.gguf").touch()
    write_gguf(
        model / "llava.gguf", {"general.architecture": "clip", "clip.projector_type": "mlp"}, {}
    )
    write_gguf(model / "unknown.gguf", {"general.architecture": "whisper"}, {})
    other = {"general.architecture": "llama", "llama.embedding_length": 7}
    write_gguf(model / "other width.gguf", other, {})
    write_mmproj(model / "other mmproj.gguf", VisionShape(n_text=9))
    files = find_model(model)
    assert (files.text, files.mmproj) == (model / "mmproj-b.gguf", model / "a.gguf")
    assert find_model(files.text) == files


def test_files_of_no_use_are_named_when_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "z.gguf").write_bytes(b"GGUF but not really")
    keys = {"general.architecture": "clip", "clip.projector_type": "mlp"}
    write_gguf(tmp_path / "llava.gguf", keys, {})
    with pytest.raises(
        ModelFileError, match=r"z\.gguf: is GGUF version|z\.gguf: is damaged"
    ) as caught:
        find_model(tmp_path)
    assert "llava.gguf: is a clip file with projector type 'mlp'" in str(caught.value)
    assert "give the file itself" not in str(caught.value)  # each reason has its own advice


def test_a_path_wins_only_if_written_as_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "cwd" / "omnivision")
    monkeypatch.chdir(tmp_path / "cwd")
    assert find_model("./omnivision").text == Path("omnivision/mmproj-b.gguf")
    assert find_model(Path("omnivision")).text == Path("omnivision/mmproj-b.gguf")
    with pytest.raises(ModelFileError, match="omnivision: is not on this machine"):
        find_model("omnivision", offline=True)
