"""What is kept for next time, and that nothing stale or damaged is ever used."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnivlm_edge import cache, encoder
from omnivlm_edge.cache import DiskCache, EmbeddingCache
from omnivlm_edge.device import select_device
from omnivlm_edge.encoder import PictureEncoder
from omnivlm_edge.files import remembered_digest, write_whole

SHAPE = (4, 64)
DATA = np.arange(256, dtype=np.float32).reshape(SHAPE)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_values_survive_the_object(tmp_path: Path) -> None:
    DiskCache(tmp_path / "new").put("a", b"value")
    assert DiskCache(tmp_path / "new").get("a") == b"value"
    assert DiskCache(tmp_path / "new").get("b") is None
    DiskCache(None).put("a", b"value")
    assert DiskCache(None).get("a") is None


def test_a_damaged_file_is_ignored_and_rewritten(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path)
    for spoil in (damage, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 40)):
        disk.put("a", b"a value of some length")
        spoil(tmp_path / "a")
        assert disk.get("a") is None
    disk.put("a", b"value")
    assert disk.get("a") == b"value"


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    disk = DiskCache(tmp_path / "file" / "cache")
    disk.put("a", b"value")
    assert disk.get("a") is None


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "DISK_BYTES", 3 * (100 + 32))
    disk = DiskCache(tmp_path)
    for age, key in enumerate("abc"):
        disk.put(key, bytes(100))
        os.utime(tmp_path / key, (age, age))
    assert disk.get("a") is not None  # used now
    disk.put("d", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_embeddings_in_memory_and_on_disk(tmp_path: Path) -> None:
    kept = EmbeddingCache(SHAPE, DiskCache(tmp_path))
    kept.put("a", DATA)
    for found, where in (
        (kept.get("a"), "memory"),
        (EmbeddingCache(SHAPE, DiskCache(tmp_path)).get("a"), "disk"),
    ):
        assert found is not None
        assert found[1] == where
        np.testing.assert_array_equal(found[0], DATA)
    assert EmbeddingCache((4, 63), DiskCache(tmp_path)).get("a") is None


def test_memory_is_bounded() -> None:
    kept = EmbeddingCache(SHAPE, DiskCache(None))
    for i in range(cache.MEMORY_ENTRIES + 1):
        kept.get("0")
        kept.put(str(i), DATA)
    assert kept.get("0") is not None
    assert kept.get("1") is None


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, memo = tmp_path / "file", tmp_path / "new" / "memo.json"
    for content in (b"one", b"two", b"three"):
        file.write_bytes(content)
        os.utime(file, (1, 1))  # an old time, but the inode's own change time tells
        for _ in range(2):
            assert remembered_digest(file, memo) == hashlib.sha256(content).hexdigest()
    for nonsense in (b"", b"[]", b'{"x": 3}', b"\xff"):
        memo.write_bytes(nonsense)
        assert remembered_digest(file, memo) == hashlib.sha256(b"three").hexdigest()
    assert remembered_digest(file, None) == hashlib.sha256(b"three").hexdigest()
    assert remembered_digest(file, file / "no directory") == hashlib.sha256(b"three").hexdigest()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def open_encoder(mmproj: Path) -> PictureEncoder:
    return PictureEncoder(mmproj, select_device("cpu"), 1, disk_cache=True)


@pytest.fixture
def mmproj(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNIVLM_HOME", str(tmp_path / "home"))
    (source,) = tiny_model.glob("mmproj*.gguf")
    return Path(shutil.copy(source, tmp_path / "mmproj.gguf"))


def test_pictures_are_known_by_what_the_model_sees(
    mmproj: Path, tmp_path: Path, picture: Image.Image
) -> None:
    first = open_encoder(mmproj)
    fresh = first.encode(picture)
    assert fresh.cached == ""
    assert first.encode(picture).cached == "memory"
    picture.save(tmp_path / "picture.bmp")
    again = open_encoder(mmproj).encode(tmp_path / "picture.bmp")
    assert again.cached == "disk"
    np.testing.assert_array_equal(again.data, fresh.data)
    assert not again.data.flags.writeable
    changed = picture.copy()
    changed.putpixel((40, 40), (0, 0, 0))
    assert first.encode(changed).cached == ""


def test_another_vision_file_at_the_same_place_is_noticed(
    mmproj: Path, picture: Image.Image
) -> None:
    fresh = open_encoder(mmproj).encode(picture)
    content = bytearray(mmproj.read_bytes())
    content[-1] ^= 1  # the lowest bits of one weight
    mmproj.write_bytes(content)
    changed = open_encoder(mmproj).encode(picture)
    assert changed.cached == ""
    assert fresh.data.shape == changed.data.shape


def test_another_device_or_version_is_another_embedding(
    mmproj: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_encoder(mmproj).encode(picture)
    other = open_encoder(mmproj)
    other._device = "CUDA0"
    assert other.encode(picture).cached == ""
    monkeypatch.setattr(encoder, "version", lambda _: "99.0")
    assert open_encoder(mmproj).encode(picture).cached == ""
