"""Importance matrices: the sums, the file, and the command that makes it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

import tiny_gguf
from command import COMMAND, run
from omnivlm_edge import GenerateOptions, ImageError, ModelFileError, ModelFiles, OmniVLM
from omnivlm_edge._native import ImportanceCollector
from omnivlm_edge.calibration import collect
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.device import select_device
from omnivlm_edge.imatrix import Imatrix, Inputs, read_imatrix
from omnivlm_edge.models import find_model
from omnivlm_edge.prompt import Piece

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = find_model("demo")
OPTIONS = GenerateOptions(max_tokens=6)

KEYS = {
    "general.architecture": "imatrix",
    "general.type": "imatrix",
    "imatrix.datasets": ["photos"],
    "imatrix.chunk_count": 4,
    "imatrix.chunk_size": 512,
}
TENSORS = {
    "a.weight.in_sum2": np.array([[4, 8, 0]], np.float32),
    "a.weight.counts": np.array([[4]], np.float32),
}


@pytest.fixture(scope="module")
def tiny_files(tiny_model: Path) -> ModelFiles:
    return find_model(tiny_model)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def means(imatrix: Imatrix) -> dict[str, np.ndarray]:
    return {name: sums.squares / sums.n_rows for name, sums in imatrix.inputs.items()}


# --- the sums (those of the vision file: test_native.py) ------------------------------------------


def test_text_sums(tiny_files: ModelFiles) -> None:
    """What meets the first block's q, k and v: RMSNorm of tokens' embeddings and of a picture's."""
    collector = ImportanceCollector()
    decoder = TextDecoder(
        tiny_files.text, select_device("cpu"), n_ctx=128, n_threads=2, collector=collector
    )
    tokens = decoder.tokenize([Piece("What is in the picture?", special=False)])
    picture = np.random.default_rng(0).standard_normal((4, decoder.n_embd)).astype(np.float32)
    sequence = decoder.open(OPTIONS)
    decoder.prefill(sequence, [tokens, picture])
    more = []
    for _ in range(3):
        more.append(decoder.sample(sequence))
        decoder.decode([sequence])
    decoder.close()

    tensors = tensors_of(tiny_files.text)
    table = np.asarray(tensors["token_embd.weight"].data, np.float64)
    x = np.concatenate([table[tokens], picture, table[more]])
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x *= np.asarray(tensors["blk.0.attn_norm.weight"].data)
    found = collector.sums()
    for part in "qkv":
        sums = found[f"blk.0.attn_{part}.weight"]
        assert sums.n_rows == len(x)
        np.testing.assert_allclose(sums.squares, (x**2).sum(0), rtol=1e-4)
        np.testing.assert_allclose(sums.values, x.sum(0), atol=1e-4)
    # llama.cpp drops the rows that no logits are wanted of before the last block's MLP.
    assert found["blk.0.ffn_up.weight"].n_rows == len(x)
    assert found["blk.1.ffn_up.weight"].n_rows == found["token_embd.weight"].n_rows == 4


def test_every_matrix_is_there_with_its_width(tiny_files: ModelFiles) -> None:
    imatrix = collect(tiny_files, [EXAMPLES / "horses.png"], max_tokens=3, n_threads=2)
    matrices = {
        name: int(tensor.shape[0])
        for path in (tiny_files.text, tiny_files.mmproj)
        for name, tensor in tensors_of(path).items()
        if len(tensor.shape) == 2 and name != "v.position_embd.weight"
    }
    assert {name: len(sums.squares) for name, sums in imatrix.inputs.items()} == matrices


def test_each_prompt_is_computed_in_full(tiny_files: ModelFiles) -> None:
    """Nothing that the context still holds is left out, so that each answer counts alike."""

    def rows(*prompts: str) -> int:
        imatrix = collect(tiny_files, [EXAMPLES / "horses.png"], prompts, max_tokens=1)
        assert imatrix.inputs["mm.0.weight"].n_rows == 4  # the picture is encoded once
        return imatrix.inputs["blk.0.attn_q.weight"].n_rows

    assert rows("What?", "What?") == 2 * rows("What?") > 0


def test_threads_make_no_difference(tiny_files: ModelFiles) -> None:
    one, three = (
        means(collect(tiny_files, [EXAMPLES / "horses.png"], max_tokens=4, n_threads=n))
        for n in (1, 3)
    )
    assert one.keys() == three.keys()
    for name, mean in one.items():
        np.testing.assert_allclose(three[name], mean, rtol=1e-3, err_msg=name)


def test_collecting_changes_no_answer(tiny_files: ModelFiles) -> None:
    def ask(collector: ImportanceCollector | None) -> Iterator[Any]:
        with OmniVLM(
            tiny_files.text,
            tiny_files.mmproj,
            device="cpu",
            vision_precision="ggml",
            disk_cache=False,
            collector=collector,
        ) as model:
            for name in ("horses.png", "shopping.png"):
                picture = model.encode(EXAMPLES / name)
                yield picture.data.tobytes(), model.answer(picture, "What is it?", OPTIONS).tokens

    assert list(ask(None)) == list(ask(ImportanceCollector()))


def test_the_demo_sees_its_answers(tmp_path: Path) -> None:
    pictures = [EXAMPLES / "horses.png", EXAMPLES / "shopping.png"]
    seen: list[tuple[int, int]] = []
    told: list[str] = []
    imatrix = collect(
        DEMO,
        [pictures[0], tmp_path / "none.png", pictures[1]],
        ["Describe the image"],
        datasets=["examples"],
        progress=lambda done, total: seen.append((done, total)),
        notify=told.append,
    )
    assert (imatrix.chunk_count, imatrix.datasets) == (2, ("examples",))
    assert seen == [(1, 3), (3, 3)]
    assert len(told) == 1 and "none.png" in told[0]
    with OmniVLM("demo", disk_cache=False) as model:
        assert imatrix.chunk_size == model.n_ctx
        answers = [model.answer(path, "Describe the image") for path in pictures]
    steps = [len(answer.tokens) for answer in answers]  # the last one is sampled, and at its end
    assert imatrix.inputs["token_embd.weight"].n_rows == sum(steps) + len(steps)
    positions = sum(answer.prompt_tokens for answer in answers) + sum(steps)
    assert imatrix.inputs["blk.0.attn_q.weight"].n_rows == positions


def test_ocr_models_read_each_picture_once(tiny_ocr_model: Path) -> None:
    files = find_model(tiny_ocr_model)
    assert collect(files, [EXAMPLES / "horses.png"], max_tokens=1).chunk_count == 1


def test_a_model_that_makes_no_numbers(tmp_path: Path, tiny_files: ModelFiles) -> None:
    """The text model's first weights are NaN."""
    damaged = tmp_path / "text.gguf"
    damaged.write_bytes(tiny_files.text.read_bytes())
    norm = tensors_of(damaged)["blk.0.attn_norm.weight"]
    with damaged.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(np.full(norm.n_elements, np.nan, np.float32).tobytes())
    files = ModelFiles(damaged, tiny_files.mmproj)
    with pytest.raises(ModelFileError, match=r"text\.gguf: the inputs of blk\.0\.attn_k\.weight"):
        collect(files, [EXAMPLES / "horses.png"], max_tokens=2)


# --- the file -------------------------------------------------------------------------------------


def test_the_format_is_llama_cpps(tmp_path: Path) -> None:
    inputs = {
        "v.blk.0.attn_q.weight": Inputs(
            np.array([2, 6], np.float32), 4, np.array([-1, 3], np.float32)
        ),
        "blk.0.attn_q.weight": Inputs(np.array([1, 0, 5], np.float32), 7),
    }
    Imatrix(inputs, ("photos", "*.jpg"), 12, 2048).write(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    u32, text = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
    fields = {
        "general.type": ([text], "imatrix"),
        "imatrix.datasets": ([gguf.GGUFValueType.ARRAY, text], ["photos", "*.jpg"]),
        "imatrix.chunk_count": ([u32], 12),
        "imatrix.chunk_size": ([u32], 2048),
    }
    for key, want in fields.items():
        assert (reader.fields[key].types, reader.fields[key].contents()) == want
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: (t.shape.tolist(), t.data.tolist()) for name, t in tensors.items()} == {
        "v.blk.0.attn_q.weight.in_sum2": ([2, 1], [[2, 6]]),
        "v.blk.0.attn_q.weight.counts": ([1, 1], [[4]]),
        "v.blk.0.attn_q.weight.in_sum": ([2, 1], [[-1, 3]]),
        "blk.0.attn_q.weight.in_sum2": ([3, 1], [[1, 0, 5]]),
        "blk.0.attn_q.weight.counts": ([1, 1], [[7]]),
    }
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}

    again = read_imatrix(tmp_path / "imatrix.gguf")
    assert (again.datasets, again.chunk_count, again.chunk_size) == (("photos", "*.jpg"), 12, 2048)
    for name, sums in inputs.items():
        read = again.inputs[name]
        assert (read.squares.tolist(), read.n_rows) == (sums.squares.tolist(), sums.n_rows)
    values = again.inputs["v.blk.0.attn_q.weight"].values
    assert values is not None and values.tolist() == [-1, 3]
    assert again.inputs["blk.0.attn_q.weight"].values is None


def test_a_file_of_llama_imatrix(tmp_path: Path) -> None:
    """Without general.architecture, and with as few dimensions as a tensor needs."""
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "none")
    del writer.kv_data[0]["general.architecture"]
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.array([30, 60], np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.array([30], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imatrix = read_imatrix(tmp_path / "imatrix.gguf")
    importance = imatrix.importance("blk.0.ffn_up.weight")
    assert importance is not None and importance.tolist() == [1, 2]
    assert importance.dtype == np.float32
    assert imatrix.importance("blk.0.ffn_down.weight") is None


@pytest.mark.parametrize(
    ("squares", "n_rows", "want"),
    [
        ([6, 2, 4], 2, [3, 1, 2]),
        ([6, 0, 0], 2, [3, 1e-6, 1e-6]),
        ([0, 0, 0], 2, [1, 1, 1]),
        ([1e-40, 0, 1e-40], 1, [1, 1, 1]),
        ([0, 0, 0], 0, None),
    ],
)
def test_importance_suits_quantizers(
    squares: list[float], n_rows: int, want: list[float] | None
) -> None:
    inputs = {"a": Inputs(np.array(squares, np.float32), n_rows)}
    importance = Imatrix(inputs, (), 1, 1).importance("a")
    if want is None:
        assert importance is None
    else:
        assert importance is not None and importance.min() > 0
        np.testing.assert_allclose(importance, want, rtol=1e-6)


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"general.type": "model"}, {}, r"its general\.type is 'model'"),
        ({"general.type": None}, {}, r"its general\.type is None"),
        ({"imatrix.chunk_count": None}, {}, "a key imatrix.… is missing"),
        ({"imatrix.chunk_size": "many"}, {}, "a key imatrix.… is missing"),
        ({"imatrix.datasets": "photos"}, {}, "a key imatrix.… is missing"),
        ({}, {"a.weight.in_sum2": None}, "it holds no statistics"),
        ({}, {"a.weight.counts": None}, r"the tensor a\.weight\.counts is missing"),
        ({}, {"a.weight.counts": row(1, 2)}, r"the tensors of a\.weight do not fit"),
        ({}, {"a.weight.in_sum": row(1, 2)}, r"the tensors of a\.weight do not fit"),
        ({}, {"a.weight.in_sum2": np.ones((2, 3), np.float32)}, "is no single row of F32"),
        ({}, {"a.weight.in_sum2": np.ones((1, 3), np.float16)}, "is no single row of F32"),
        ({}, {"a.weight.in_sum2": row(1, np.nan, 2)}, "values that are no numbers"),
        ({}, {"a.weight.in_sum2": row(1, -1, 2)}, "negative numbers"),
        ({}, {"a.weight.counts": row(-1)}, "negative numbers"),
        ({}, {"a.weight.counts": row(np.inf)}, "values that are no numbers"),
    ],
)
def test_wrong_files(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    wrong = [
        {name: value for name, value in (right | change).items() if value is not None}
        for right, change in ((KEYS, keys), (TENSORS, tensors))
    ]
    path = tiny_gguf.write_gguf(tmp_path / "imatrix.gguf", *wrong)
    with pytest.raises(ModelFileError, match=f"imatrix.gguf: .*{said}") as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    whole = tiny_gguf.write_gguf(tmp_path / "imatrix.gguf", KEYS, TENSORS).read_bytes()
    read_imatrix(tmp_path / "imatrix.gguf")
    for size in range(0, len(whole) - 32, 7):  # the last tensor is padded to 32 bytes
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match="cut.gguf"):
            read_imatrix(tmp_path / "cut.gguf")
    with pytest.raises(ModelFileError, match="none.gguf is missing"):
        read_imatrix(tmp_path / "none.gguf")


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("imatrix", "demo", "--images", EXAMPLES, "-t", 2)
    assert (result.returncode, result.stdout, result.stderr) == (0, "demo-imatrix.gguf\n", "")
    imatrix = read_imatrix(tmp_path / "demo-imatrix.gguf")
    assert (imatrix.datasets, imatrix.chunk_count) == (("examples",), 6)
    assert {name.split(".")[0] for name in imatrix.inputs} == {"blk", "token_embd", "v", "mm"}
    assert str(tmp_path).encode() not in (tmp_path / "demo-imatrix.gguf").read_bytes()
    assert os.listdir(tmp_path) == ["demo-imatrix.gguf"]


def test_prompts_patterns_and_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.png").write_text("no picture")
    out = tmp_path / "new" / "x.gguf"
    images = ("--images", tmp_path / "in", "--images", EXAMPLES / "*.png")
    result = run("imatrix", "demo", *images, "-p", "Is there an egg?", "-o", out, "-n", 2)
    assert (result.returncode, result.stdout) == (0, f"{out}\n")
    assert result.stderr.count("\n") == 1
    assert f"left out: {tmp_path / 'in' / 'notes.png'}: " in result.stderr
    imatrix = read_imatrix(out)
    assert (imatrix.datasets, imatrix.chunk_count) == (("in", "*.png"), 2)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (9, 9)).save(picture)
    (tmp_path / "notes.txt").write_text("no picture")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "x.gguf"
    for arguments, code, said in (
        (("demo", "-o", out), 2, "--images"),
        (("demo", "--images", picture, "-o", tmp_path), 2, "is a directory"),
        (("demo", "--images", picture, "-o", picture), 1, "is the input itself"),
        (("demo", "--images", tmp_path / "none", "-o", out), 1, "there is no such file"),
        (("demo", "--images", tmp_path / "*.txt", "-o", out), 1, "none of the pictures"),
        (("demo", "--images", picture, "-o", picture / "x"), 1, "cannot be made a directory"),
        (("demo", "--images", picture, "-n", 9999, "-o", out), 1, "do not fit into the context"),
        ((tmp_path / "notes.txt", "--images", picture, "-o", out), 1, "not a GGUF file"),
    ):
        result = run("imatrix", *arguments)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert said in result.stderr
        assert "Traceback" not in result.stderr
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_interrupted(tmp_path: Path) -> None:
    """The damaged picture is told of before the first of very many questions."""
    (tmp_path / "0.png").write_bytes(b"no picture")
    for i in range(1, 400):
        (tmp_path / f"{i}.png").symlink_to(EXAMPLES / "horses.png")
    arguments = ["imatrix", "demo", "--images", str(tmp_path), "-o", str(tmp_path / "x.gguf")]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None and "left out" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=60)
    assert (child.returncode, output) == (130, "")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_no_pictures_at_all(tiny_files: ModelFiles) -> None:
    with pytest.raises(ImageError, match="none of the pictures can be used"):
        collect(tiny_files, [])
