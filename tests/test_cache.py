"""What is kept for next time, and that nothing stale or damaged is ever used."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from PIL import Image

from omnivlm_edge import ModelFileError, cache
from omnivlm_edge.cache import DiskCache, EmbeddingCache
from omnivlm_edge.device import select_device
from omnivlm_edge.encoder import PictureEncoder
from omnivlm_edge.files import identity, loaded_digest, write_whole

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

    def digest(memo: Path | None = memo) -> str | None:
        return loaded_digest(file, identity(file), memo)

    for content in (b"one", b"two", b"three"):
        file.write_bytes(content)
        os.utime(file, (1, 1))  # an old time, but the inode's own change time tells
        for _ in range(2):
            assert digest() == hashlib.sha256(content).hexdigest()
    want = hashlib.sha256(b"three").hexdigest()
    for nonsense in (b"", b"[]", b'{"x": 3}', b"\xff"):
        memo.write_bytes(nonsense)
        assert digest() == want
    assert digest(None) == digest(file / "no directory") == want


def test_a_file_that_was_replaced_has_no_digest(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    loaded = identity(file)
    write_whole(file, b"two")
    assert loaded_digest(file, loaded, tmp_path / "memo") is None
    file.unlink()
    assert loaded_digest(file, loaded, tmp_path / "memo") is None


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
    monkeypatch.setattr(cache, "version", lambda _: "99.0")
    assert open_encoder(mmproj).encode(picture).cached == ""


def test_a_vision_file_replaced_after_loading_poisons_nothing(
    mmproj: Path, tmp_path: Path, picture: Image.Image
) -> None:
    loaded = open_encoder(mmproj)
    changed = bytearray(mmproj.read_bytes())
    changed[-1] ^= 1
    write_whole(mmproj, bytes(changed))
    assert loaded.encode(picture).cached == ""
    assert loaded.encode(picture).cached == "memory"
    assert open_encoder(mmproj).encode(picture).cached == ""
    loaded = open_encoder(mmproj)
    mmproj.unlink()
    assert loaded.encode(picture).data.shape == SHAPE


def test_without_a_disk_cache_no_file_is_hashed(
    mmproj: Path, tmp_path: Path, picture: Image.Image
) -> None:
    alone = PictureEncoder(mmproj, select_device("cpu"), 1, disk_cache=False)
    assert alone.encode(picture).cached == ""
    assert alone.encode(picture).cached == "memory"
    assert not (tmp_path / "home").exists()


def test_what_is_no_number_is_refused_and_not_kept(mmproj: Path, picture: Image.Image) -> None:
    reader = gguf.GGUFReader(mmproj, "r+")
    (weight,) = (tensor for tensor in reader.tensors if tensor.name == "mm.2.weight")
    weight.data[:] = np.nan
    reader.data.flush()
    del reader, weight
    for _ in range(2):
        with pytest.raises(ModelFileError, match="makes no numbers of the image on CPU"):
            open_encoder(mmproj).encode(picture)
