"""convert/: every tensor and key that is written, and every way in which an input can be wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType, quants

import tiny_checkpoint
from omnivlm_edge.convert import convert_checkpoint, convert_mmproj
from omnivlm_edge.convert import weights as weights_module
from omnivlm_edge.errors import ConvertError, ModelFileError, OptionError
from tiny_checkpoint import Dims, write_checkpoint, write_safetensors, write_weights

Weights = dict[str, npt.NDArray[np.float32]]

F16, BF16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F32
TYPES = {"f16": F16, "bf16": BF16, "f32": F32}

# Checkpoint name -> name in the GGUF file, without .weight and .bias; written out once more so
# that a slip in convert/tensor_map.py does not hide itself.
EXPECTED_NAMES = {
    "vision_tower.vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.vision_model.embeddings.position_embedding": "v.position_embd",
    "vision_tower.vision_model.encoder.layers.N.layer_norm1": "v.blk.N.ln1",
    "vision_tower.vision_model.encoder.layers.N.layer_norm2": "v.blk.N.ln2",
    "vision_tower.vision_model.encoder.layers.N.self_attn.q_proj": "v.blk.N.attn_q",
    "vision_tower.vision_model.encoder.layers.N.self_attn.k_proj": "v.blk.N.attn_k",
    "vision_tower.vision_model.encoder.layers.N.self_attn.v_proj": "v.blk.N.attn_v",
    "vision_tower.vision_model.encoder.layers.N.self_attn.out_proj": "v.blk.N.attn_out",
    "vision_tower.vision_model.encoder.layers.N.mlp.fc1": "v.blk.N.ffn_up",
    "vision_tower.vision_model.encoder.layers.N.mlp.fc2": "v.blk.N.ffn_down",
    "vision_tower.vision_model.post_layernorm": "v.post_ln",
    "multi_modal_projector.0": "mm.0",
    "multi_modal_projector.2": "mm.2",
    "language_model.model.embed_tokens": "token_embd",
    "language_model.model.layers.N.input_layernorm": "blk.N.attn_norm",
    "language_model.model.layers.N.self_attn.q_proj": "blk.N.attn_q",
    "language_model.model.layers.N.self_attn.k_proj": "blk.N.attn_k",
    "language_model.model.layers.N.self_attn.v_proj": "blk.N.attn_v",
    "language_model.model.layers.N.self_attn.o_proj": "blk.N.attn_output",
    "language_model.model.layers.N.post_attention_layernorm": "blk.N.ffn_norm",
    "language_model.model.layers.N.mlp.gate_proj": "blk.N.ffn_gate",
    "language_model.model.layers.N.mlp.up_proj": "blk.N.ffn_up",
    "language_model.model.layers.N.mlp.down_proj": "blk.N.ffn_down",
    "language_model.model.norm": "output_norm",
    "language_model.lm_head": "output",
}
POOLING_HEAD = "vision_tower.vision_model.head."


class Converted(NamedTuple):
    mmproj: GGUFReader
    text: GGUFReader


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "demo")
    return tmp_path / "demo"


def source_weights(dims: Dims | None = None, **changes: Any) -> Weights:
    """What `write_checkpoint` stores with the same arguments."""
    options: dict[str, Any] = {"seed": 0, "merge": 9, "tied": True, "head": True, "scale": 2.0}
    return dict(tiny_checkpoint.tensors(dims or Dims(), **options | changes))


def convert(checkpoint: Path, outtype: str = "f16", **options: Any) -> Converted:
    files = convert_checkpoint(checkpoint, checkpoint.parent / "out", outtype, **options)
    return Converted(GGUFReader(files.mmproj), GGUFReader(files.text))


def gguf_name(name: str) -> str:
    stem, _, tail = name.rpartition(".")
    parts = stem.split(".")
    number = next((part for part in parts if part.isdigit() and "layers" in parts), "")
    pattern = ".".join("N" if part == number else part for part in parts)
    return f"{EXPECTED_NAMES[pattern].replace('N', number)}.{tail}"


def keys(reader: GGUFReader) -> dict[str, Any]:
    fields = reader.fields.items()
    return {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_has_the_source_values(tmp_path: Path, dtype: str, outtype: str) -> None:
    write_checkpoint(tmp_path / "demo", dtype=dtype, tied=False)
    converted = convert(tmp_path / "demo", outtype)
    written = {tensor.name: tensor for reader in converted for tensor in reader.tensors}
    for name, values in source_weights(tied=False).items():
        if name.startswith(POOLING_HEAD):
            continue
        tensor = written.pop(gguf_name(name))
        kept = tiny_checkpoint.stored(values, dtype)
        if dtype == "bfloat16":
            kept = (kept.astype(np.uint32) << 16).view(np.float32)
        assert tuple(reversed(tensor.shape.tolist())) == values.shape, name
        assert tensor.tensor_type == (TYPES[outtype] if values.ndim > 1 else F32), name
        expected = tiny_checkpoint.stored(kept.astype(np.float32), outtype_name(tensor.tensor_type))
        raw = tensor.data.view(expected.dtype).reshape(expected.shape)
        np.testing.assert_array_equal(raw, expected, err_msg=name)
    assert not written


def test_slicing_does_not_show(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are read in slices; here all are, and the last slice is a shorter one."""
    expected = convert_checkpoint(checkpoint, checkpoint.parent / "whole")
    monkeypatch.setattr(weights_module, "_SLICE", 7)
    sliced = convert_checkpoint(checkpoint, checkpoint.parent / "sliced")
    assert sliced.mmproj.read_bytes() == expected.mmproj.read_bytes()
    assert sliced.text.read_bytes() == expected.text.read_bytes()


def outtype_name(kind: GGMLQuantizationType) -> str:
    return {F16: "float16", BF16: "bfloat16", F32: "float32"}[kind]


def test_shards_and_a_single_file_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for shards in (1, 3):
        write_checkpoint(tmp_path / f"{shards}" / "demo", shards=shards)
        files = convert_checkpoint(tmp_path / f"{shards}" / "demo", tmp_path / f"out{shards}")
        contents.append((files.mmproj.read_bytes(), files.text.read_bytes()))
    assert contents[0] == contents[1]


def test_input_is_not_changed(checkpoint: Path) -> None:
    def state() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    before = state()
    convert(checkpoint)
    assert state() == before


def test_other_dimensions(tmp_path: Path) -> None:
    dims = Dims(vision_layers=3, text_layers=1, vision_hidden=24, text_kv_heads=4, patch_size=7)
    write_checkpoint(tmp_path / "demo", dims=dims, image_size=84)
    converted = convert(tmp_path / "demo")
    written = {tensor.name: tensor.shape.tolist() for tensor in converted.mmproj.tensors}
    assert written["v.position_embd.weight"] == [24, 144]
    assert written["mm.0.weight"] == [9 * 24, 64]
    assert "v.blk.2.ln1.weight" in written and "v.blk.3.ln1.weight" not in written


# ---- keys ---------------------------------------------------------------------------------------


def test_mmproj_keys(checkpoint: Path) -> None:
    edit(
        checkpoint / "preprocessor_config.json",
        lambda c: c.update(image_mean=[0.25, 0.5, 0.75], image_std=[0.5, 0.25, 1]),
    )
    found = keys(convert(checkpoint).mmproj)
    assert found.pop("clip.vision.attention.layer_norm_epsilon") == pytest.approx(1e-6)
    assert found == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "demo",
        "general.file_type": 1,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "omnivlm",
        "clip.use_gelu": True,
        "clip.vision.image_size": 42,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 4,
        "clip.vision.projection_dim": 64,
        "clip.vision.image_mean": [0.25, 0.5, 0.75],
        "clip.vision.image_std": [0.5, 0.25, 1.0],
        "clip.vision.projector.merge_factor": 9,
        "clip.vision.projector.gelu": "erf",
        "clip.omnivlm.prompt_variant": "vlm-81-instruct",
    }


def test_text_keys(checkpoint: Path) -> None:
    found = keys(convert(checkpoint).text)
    ids = tiny_checkpoint.token_ids()
    assert found.pop("qwen2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    tokens = found.pop("tokenizer.ggml.tokens")
    types = found.pop("tokenizer.ggml.token_type")
    merges = [" ".join(pair) for pair in tiny_checkpoint.merges()]
    template = tiny_checkpoint.tokenizer_config()["chat_template"]
    assert found == {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "demo",
        "general.file_type": 1,
        "qwen2.block_count": 2,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }
    assert tokens == [*ids, *(f"[PAD{i}]" for i in range(len(ids), 320))]
    assert types[ids["<|im_end|>"]] == TokenType.CONTROL
    assert types[ids["<tool_call>"]] == TokenType.USER_DEFINED
    assert types[0] == TokenType.NORMAL and types[len(ids)] == TokenType.UNUSED


@pytest.mark.parametrize(("outtype", "file_type"), [("f16", 1), ("bf16", 32), ("f32", 0)])
def test_names_and_file_types(checkpoint: Path, outtype: str, file_type: int) -> None:
    files = convert_checkpoint(checkpoint, checkpoint.parent / "out", outtype, name="other")
    assert files.mmproj.name == f"mmproj-other-{outtype.upper()}.gguf"
    assert files.text.name == f"other-{outtype.upper()}.gguf"
    for path in (files.mmproj, files.text):
        assert keys(GGUFReader(path))["general.file_type"] == file_type
        assert keys(GGUFReader(path))["general.name"] == "other"


def test_pixels_without_a_preprocessor_config(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    found = keys(convert(checkpoint).mmproj)
    assert found["clip.vision.image_mean"] == found["clip.vision.image_std"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("merge", "variant", "expected"),
    [
        (9, None, "vlm-81-instruct"),
        (1, None, "nano-vlm-instruct"),
        (9, "vlm-81-ocr", "vlm-81-ocr"),
        (1, "vlm-81-ocr", "vlm-81-ocr"),
    ],
)
def test_prompt_variant(tmp_path: Path, merge: int, variant: str | None, expected: str) -> None:
    write_checkpoint(tmp_path / "demo", merge=merge)
    found = keys(convert(tmp_path / "demo", variant=variant).mmproj)
    assert found["clip.omnivlm.prompt_variant"] == expected
    assert found["clip.vision.projector.merge_factor"] == merge


def test_newer_rope_parameters(checkpoint: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["text_config"]["rope_theta"]
        content["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000}

    edit(checkpoint / "config.json", change)
    assert keys(convert(checkpoint).text)["qwen2.rope.freq_base"] == 5000


# ---- the output matrix --------------------------------------------------------------------------


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def output_matrices(reader: GGUFReader) -> int:
    return sum(tensor.name == "output.weight" for tensor in reader.tensors)


@pytest.mark.parametrize(("tied", "expected"), [(True, 0), (False, 1)])
def test_tied_and_untied(tmp_path: Path, tied: bool, expected: int) -> None:
    write_checkpoint(tmp_path / "demo", tied=tied)
    assert output_matrices(convert(tmp_path / "demo").text) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_unsaid_tie_follows_the_stored_tensors(tmp_path: Path, tied: bool) -> None:
    write_checkpoint(tmp_path / "demo", tied=tied)
    edit(tmp_path / "demo/config.json", lambda c: c["text_config"].pop("tie_word_embeddings"))
    assert output_matrices(convert(tmp_path / "demo").text) == (0 if tied else 1)


def test_tied_copy_is_accepted_if_identical(checkpoint: Path) -> None:
    weights = source_weights()
    write_weights(checkpoint, weights | {HEAD: weights[EMBEDDING]})
    assert output_matrices(convert(checkpoint).text) == 0


def test_tied_copy_that_differs_is_refused(checkpoint: Path) -> None:
    weights = source_weights()
    changed = weights[EMBEDDING].copy()
    changed[-1, -1] += 1
    write_weights(checkpoint, weights | {HEAD: changed})
    with pytest.raises(ConvertError, match=r"tie_word_embeddings is true, but .*lm_head"):
        convert(checkpoint)


def test_untied_without_an_output_matrix(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False))
    with pytest.raises(ConvertError, match=r"lm_head\.weight is missing"):
        convert(checkpoint)


# ---- the tensors must be the configured ones ----------------------------------------------------


def test_pooling_head_is_left_out_and_said(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted = convert(checkpoint)
    assert not any("head" in tensor.name for tensor in converted.mmproj.tensors)
    assert capfd.readouterr().err.count("left out the 11 tensors") == 1


def test_without_pooling_head_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "demo", head=False)
    convert(tmp_path / "demo")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", sorted(n for n in source_weights() if ".head." not in n))
def test_every_tensor_is_needed(checkpoint: Path, name: str) -> None:
    weights = source_weights()
    del weights[name]
    write_weights(checkpoint, weights)
    with pytest.raises(ConvertError, match=f"{name} is missing"):
        convert(checkpoint)
    assert left_behind(checkpoint.parent / "out") == []


@pytest.mark.parametrize("name", sorted(n for n in source_weights() if ".head." not in n))
def test_every_shape_is_checked(checkpoint: Path, name: str) -> None:
    weights = source_weights()
    weights[name] = np.concatenate([weights[name], weights[name][:1]])  # one row more
    write_weights(checkpoint, weights)
    # What is said of the projector depends on the tensor: its weights define its widths.
    with pytest.raises(ConvertError, match="multi_modal_projector|" + name.replace(".", r"\.")):
        convert(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.2.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.bias",
        "vision_tower.vision_model.head.other",
        "multi_modal_projector.4.weight",
        "extra",
    ],
)
def test_unknown_tensor_is_refused(checkpoint: Path, name: str) -> None:
    write_weights(checkpoint, source_weights() | {name: np.zeros(3, np.float32)})
    with pytest.raises(ConvertError, match=f"{name} is not part of this model"):
        convert(checkpoint)


def test_projector_that_does_not_divide_the_picture(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "demo", merge=2)
    with pytest.raises(ConvertError, match="merges 2 patches into a token, but .* 9 patches"):
        convert(tmp_path / "demo")


def test_projector_input_that_is_no_multiple_of_the_tower(checkpoint: Path) -> None:
    weights = source_weights()
    weights["multi_modal_projector.0.weight"] = np.zeros((64, 100), np.float32)
    write_weights(checkpoint, weights)
    with pytest.raises(ConvertError, match="multiple of the vision width 32"):
        convert(checkpoint)


def test_value_too_large_for_f16(checkpoint: Path) -> None:
    weights = source_weights()
    weights["multi_modal_projector.0.weight"][0, 0] = 1e6
    write_weights(checkpoint, weights)
    with pytest.raises(ConvertError, match=r"projector\.0\.weight .* too large for f16"):
        convert(checkpoint)
    assert left_behind(checkpoint.parent / "out") == []
    convert(checkpoint, "bf16")


# ---- weight files -------------------------------------------------------------------------------


def weights_error(checkpoint: Path) -> str:
    """What is said of a checkpoint that cannot be converted."""
    with pytest.raises(ConvertError) as caught:
        convert(checkpoint)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is damaged" in weights_error(checkpoint)


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"PK\x03\x04" * 9])
def test_garbage_weights(checkpoint: Path, garbage: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(garbage)
    assert "model.safetensors is damaged" in weights_error(checkpoint)


def test_unknown_dtype(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    assert "has the type I32; only F32, F16, BF16 are supported" in weights_error(checkpoint)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_weights_are_refused(checkpoint: Path, suffix: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / f"model{suffix}")
    assert re.search(
        "a pickle, and opening a pickle runs code .* safetensors", weights_error(checkpoint)
    )


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in weights_error(checkpoint)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "demo", shards=2)
    return tmp_path / "demo"


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


def test_absent_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    assert f"names {SHARD}, which is missing" in weights_error(sharded)


@pytest.mark.parametrize("shard", ["../" + SHARD, "/etc/passwd", 7])
def test_shard_elsewhere(sharded: Path, shard: Any) -> None:
    edit(sharded / INDEX, lambda c: c["weight_map"].update({EMBEDDING: shard}))
    assert "not a file beside it" in weights_error(sharded)


def test_index_names_what_a_shard_does_not_hold(sharded: Path) -> None:
    edit(sharded / INDEX, lambda c: c["weight_map"].update(other=SHARD))
    assert "does not hold other, as the index says" in weights_error(sharded)


def test_shard_holds_what_the_index_denies(sharded: Path) -> None:
    edit(sharded / INDEX, lambda c: c["weight_map"].pop(EMBEDDING))
    assert "but the index denies it" in weights_error(sharded)


def test_index_without_a_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    assert "the key weight_map is missing" in weights_error(sharded)


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key", "value", "match"),
    [
        ("", "model_type", "llava", "'llava', but only 'omini_vlm'"),
        ("", "mm_projector_type", "linear", "mm_projector_type"),
        ("", "mm_hidden_size", 33, "mm_hidden_size is 33, but only 32"),
        ("", "hidden_size", 63, "64 rows, but config.json .* hidden_size 63"),
        ("", "vision_config", 5, "must be an object"),
        ("vision_config", "hidden_size", 0, "positive integer"),
        ("vision_config", "hidden_size", "32", "positive integer"),
        ("vision_config", "hidden_size", True, "positive integer"),
        ("vision_config", "hidden_size", 34, "not a multiple of num_attention_heads"),
        ("vision_config", "num_attention_heads", -4, "positive integer"),
        ("vision_config", "num_attention_heads", 5, "not a multiple of num_attention_heads 5"),
        ("vision_config", "num_hidden_layers", 10**12, "positive integer"),
        ("vision_config", "num_hidden_layers", 10**9, "layers.2.layer_norm1.weight is missing"),
        ("vision_config", "num_hidden_layers", 1, "layers.1.* is not part of this model"),
        ("vision_config", "intermediate_size", 49, "fc1.weight has the shape"),
        ("vision_config", "image_size", 13, "larger than image_size 13"),
        ("vision_config", "patch_size", 0, "positive integer"),
        ("vision_config", "num_channels", 1, "num_channels is 1, but only 3"),
        ("vision_config", "hidden_act", "gelu", "only 'gelu_pytorch_tanh'"),
        ("vision_config", "layer_norm_eps", -1e-6, "positive number"),
        ("vision_config", "layer_norm_eps", float("nan"), "positive number"),
        ("vision_config", "layer_norm_eps", 10**40, "positive number"),
        ("text_config", "model_type", "llama", "only 'qwen2'"),
        ("text_config", "hidden_act", "gelu", "only 'silu'"),
        ("text_config", "hidden_size", 0, "positive integer"),
        ("text_config", "num_attention_heads", 7, "not a multiple of num_attention_heads 7"),
        ("text_config", "num_key_value_heads", 3, "not a multiple of num_key_value_heads 3"),
        ("text_config", "num_key_value_heads", 0, "positive integer"),
        ("text_config", "num_attention_heads", 64, "head size 1 is odd"),
        ("text_config", "head_dim", 32, "head_dim is 32, but only 16"),
        ("text_config", "vocab_size", 100, "there are 100 embeddings"),
        ("text_config", "vocab_size", 300, "embed_tokens.weight has the shape"),
        ("text_config", "max_position_embeddings", 2.5, "positive integer"),
        ("text_config", "rope_theta", 0, "positive number"),
        ("text_config", "rope_theta", float("inf"), "positive number"),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 4}, "only 'default'"),
        ("text_config", "rope_scaling", {"factor": 4}, "factor is 4"),
        ("text_config", "rope_scaling", "yarn", "must be an object"),
        ("text_config", "rope_parameters", {"rope_type": "linear"}, "only 'default'"),
        ("text_config", "use_sliding_window", True, "use_sliding_window is True"),
        ("text_config", "layer_types", ["sliding_attention"], "layer_types"),
        ("text_config", "layer_types", 5, "layer_types is not a list"),
        ("text_config", "tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'"),
    ],
)
def test_unusable_configuration(
    checkpoint: Path, part: str, key: str, value: Any, match: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        (content[part] if part else content)[key] = value

    edit(checkpoint / "config.json", change)
    with pytest.raises(ConvertError, match=match):
        convert(checkpoint)
    assert left_behind(checkpoint.parent / "out") == []


@pytest.mark.parametrize("part", ["", "vision_config", "text_config"])
@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 0, 1e30, True])
def test_any_wrong_value_is_a_convert_error_or_harmless(
    checkpoint: Path, part: str, value: Any
) -> None:
    content = json.loads((checkpoint / "config.json").read_text())
    for key in content[part] if part else content:
        changed = json.loads(json.dumps(content))
        (changed[part] if part else changed)[key] = value
        (checkpoint / "config.json").write_text(json.dumps(changed))
        try:
            convert(checkpoint)
        except ConvertError as exc:
            assert "config.json" in str(exc) or str(checkpoint) in str(exc), key


@pytest.mark.parametrize(
    ("part", "key"),
    [("", "model_type"), ("", "vision_config"), ("", "text_config")]
    + [("vision_config", key) for key in ("hidden_size", "image_size", "num_hidden_layers")]
    + [("text_config", key) for key in ("hidden_size", "vocab_size", "rope_theta")],
)
def test_missing_configuration(checkpoint: Path, part: str, key: str) -> None:
    edit(checkpoint / "config.json", lambda c: (c[part] if part else c).pop(key))
    with pytest.raises(ConvertError, match=f"the key {key} is missing"):
        convert(checkpoint)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no JSON object"),
        (None, "is missing"),
    ],
)
def test_damaged_config(checkpoint: Path, content: bytes | None, match: str) -> None:
    if content is None:
        (checkpoint / "config.json").unlink()
    else:
        (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ConvertError, match=rf"config\.json.* {match}"):
        convert(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [0.5, 0.0, 0.5]),
        ("size", {"height": 224, "width": 224}),
        ("do_normalize", False),
        ("do_resize", False),
        ("resample", 2),
        ("rescale_factor", 1.0),
    ],
)
def test_unusable_preprocessing(checkpoint: Path, key: str, value: Any) -> None:
    edit(checkpoint / "preprocessor_config.json", lambda c: c.update({key: value}))
    with pytest.raises(ConvertError, match=rf"preprocessor_config\.json.*{key}"):
        convert(checkpoint)


# ---- tokenizer ----------------------------------------------------------------------------------

TEXTS = [
    "the theory, in 2024: an error there",
    "  two   spaces \n\n\n\tand\r\n lines  ",
    "你好，世界！ Ünïcödé café",
    "😀👩‍👩‍👧 emoji",
    "1234567890 3.14 x²",
    "I'm YOU'RE we'll don't",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>",
    "<tool_call>{}</tool_call>",
    "",
]


@pytest.mark.parametrize("outtype", ["f16", "bf16", "f32"])
def test_llama_cpp_runs_it(checkpoint: Path, outtype: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    files = convert_checkpoint(checkpoint, checkpoint.parent / "out", outtype)
    model = llama_cpp.Llama(str(files.text), n_ctx=64, verbose=False)
    try:
        ids = model.tokenize(b"the image", add_bos=False)
        model.eval(ids)
        assert 0 <= model.sample(temp=0) < len(tiny_checkpoint.token_ids())
        assert model.token_eos() == tiny_checkpoint.token_ids()["<|im_end|>"]
    finally:
        model.close()


def test_llama_cpp_tokenises_as_tokenizers_does(checkpoint: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    files = convert_checkpoint(checkpoint, checkpoint.parent / "out")
    model = llama_cpp.Llama(str(files.text), vocab_only=True, verbose=False)
    try:
        for text in TEXTS:
            ids = model.tokenize(text.encode(), add_bos=True, special=True)
            assert ids == reference.encode(text).ids, text
    finally:
        model.close()


def test_vocab_json_and_merges_txt_give_the_same_file(checkpoint: Path) -> None:
    out = checkpoint.parent / "out"
    expected = convert_checkpoint(checkpoint, out).text.read_bytes()
    split_tokenizer(checkpoint)
    assert convert_checkpoint(checkpoint, out).text.read_bytes() == expected


def split_tokenizer(checkpoint: Path) -> None:
    model = tiny_checkpoint.tokenizer()["model"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (checkpoint / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def test_both_forms_of_merges_give_the_same_file(checkpoint: Path) -> None:
    out = checkpoint.parent / "out"
    expected = convert_checkpoint(checkpoint, out).text.read_bytes()

    def join(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    edit(checkpoint / "tokenizer.json", join)
    assert convert_checkpoint(checkpoint, out).text.read_bytes() == expected


def test_chat_template_file_wins(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert keys(convert(checkpoint).text)["tokenizer.chat_template"] == "{{ messages }}"


def test_end_token_of_the_configuration(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    with pytest.raises(ConvertError, match="no eos_token says"):
        convert(checkpoint)
    edit(checkpoint / "config.json", lambda c: c["text_config"].update(eos_token_id=[5, 6]))
    assert keys(convert(checkpoint).text)["tokenizer.ggml.eos_token_id"] == 5


def set_model(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["model"].update(values)


def set_split(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_model(type="Unigram"), "only 'BPE'"),
        (set_model(byte_fallback=True), "byte_fallback"),
        (set_model(ignore_merges=True), "ignore_merges"),
        (set_model(merges=[]), "no merges"),
        (set_model(merges=7), "merges is not a list"),
        (set_model(merges=[["x", "zz"]]), "does not join two known tokens"),
        (set_model(merges=["a b c"]), "does not join two known tokens"),
        (set_model(merges=[[1, 2]]), "does not join two known tokens"),
        (lambda c: c["model"]["vocab"].pop("Ġ"), "no token for the byte"),
        (lambda c: c["model"]["vocab"].update(x=500), "'x' has the id 500"),
        (lambda c: c["model"]["vocab"].update(x="7"), "'x' has the id '7'"),
        (lambda c: c["model"]["vocab"].update(x=7), "have the same id 7"),
        (lambda c: c["model"]["vocab"].update({"▁x": 300}), "not written in byte characters"),
        (lambda c: c["added_tokens"][0].update(id=-1), "has the id -1"),
        (lambda c: c["added_tokens"][0].pop("content"), "not an added token"),
        (lambda c: c["added_tokens"].append(3), "not an added token"),
        (lambda c: c.update(added_tokens=3), "added_tokens is not a list"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "only 'NFC'"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "only 'Sequence'"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0), r"Qwen2's is \['Split'"),
        (lambda c: c["pre_tokenizer"].update(pretokenizers=None), "pretokenizers is not a list"),
        (set_split(pattern={"Regex": r"\s+"}), "not Qwen2's expression"),
        (set_split(behavior="Removed"), "behavior"),
        (lambda c: c.pop("model"), "the key model is missing"),
    ],
)
def test_unusable_tokenizer(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    edit(checkpoint / "tokenizer.json", change)
    with pytest.raises(ConvertError, match=rf"tokenizer\.json.*{match}"):
        convert(checkpoint)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class"),
        ({"eos_token": "<end>"}, "eos_token is '<end>'"),
        ({"bos_token": []}, r"bos_token is \[\]"),
        ({"pad_token": {"content": "<pad>"}}, "pad_token is '<pad>'"),
    ],
)
def test_unusable_tokenizer_settings(checkpoint: Path, values: dict[str, Any], match: str) -> None:
    edit(checkpoint / "tokenizer_config.json", lambda c: c.update(values))
    with pytest.raises(ConvertError, match=rf"tokenizer_config\.json.*{match}"):
        convert(checkpoint)


@pytest.mark.parametrize("missing", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_missing_tokenizer(checkpoint: Path, missing: str) -> None:
    if missing != "tokenizer.json":
        split_tokenizer(checkpoint)
    (checkpoint / missing).unlink()
    with pytest.raises(ConvertError, match=r"neither tokenizer\.json nor vocab\.json"):
        convert(checkpoint)


# ---- arguments and output files -----------------------------------------------------------------


def test_wrong_arguments(checkpoint: Path, tmp_path: Path) -> None:
    for options, match in (
        ({"outtype": "q4_0"}, "no output type 'q4_0'; choose one of f16, bf16, f32"),
        ({"name": "../x"}, "cannot be part of a file name"),
        ({"name": ""}, "cannot be part of a file name"),
    ):
        with pytest.raises(ConvertError, match=match):
            convert_checkpoint(checkpoint, tmp_path / "out", **options)
    with pytest.raises(OptionError, match="variant 'ocr' is unknown: it must be one of vlm-81"):
        convert_checkpoint(checkpoint, tmp_path / "out", variant="ocr")
    with pytest.raises(ConvertError, match="is not a directory"):
        convert_checkpoint(checkpoint / "config.json", tmp_path / "out")
    with pytest.raises(ConvertError, match="cannot be made a directory"):
        convert_checkpoint(checkpoint, checkpoint / "config.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 5, 60])
def test_interrupted_conversion_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    write = GGUFWriter.write_tensor_data
    written: list[int] = []

    def fail_later(writer: GGUFWriter, tensor: npt.NDArray[Any]) -> None:
        if len(written) == after:
            assert left_behind(out) != []  # it really was in the middle
            raise error
        written.append(tensor.nbytes)
        write(writer, tensor)

    out = checkpoint.parent / "out"
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail_later)
    wanted = ConvertError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        convert_checkpoint(checkpoint, out)
    assert left_behind(out) == []


def test_failure_keeps_the_earlier_output(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = convert_checkpoint(checkpoint, checkpoint.parent / "out")
    before = files.mmproj.read_bytes(), files.text.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(ConvertError, match="cannot be written to"):
        convert_checkpoint(checkpoint, checkpoint.parent / "out")
    assert (files.mmproj.read_bytes(), files.text.read_bytes()) == before
    assert left_behind(files.text.parent) == sorted([files.mmproj.name, files.text.name])


def test_too_little_space(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(checkpoint)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConvertError, match="0 MB free, but the result needs"):
        convert(checkpoint)
    assert left_behind(checkpoint.parent / "out") == []


def test_output_that_is_an_input(checkpoint: Path) -> None:
    os.link(checkpoint / "model.safetensors", checkpoint / "demo-F16.gguf")
    with pytest.raises(ConvertError, match="is the input itself"):
        convert_checkpoint(checkpoint, checkpoint)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    """About 300 MB; the largest tensor is a tenth of that."""
    dims = Dims(
        vision_hidden=768,
        vision_ffn=3072,
        vision_layers=6,
        projector_hidden=1024,
        text_hidden=512,
        text_ffn=2048,
        text_layers=4,
        vocab=8192,
    )
    write_checkpoint(tmp_path / "demo", dims=dims, head=False)
    size = (tmp_path / "demo/model.safetensors").stat().st_size
    script = """
        import sys
        from pathlib import Path
        from omnivlm_edge.convert import convert_checkpoint

        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024

        before = peak()
        convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
        print(peak() - before)
        assert not {"torch", "transformers"} & sys.modules.keys()
    """
    paths = [str(tmp_path / "demo"), str(tmp_path / "out")]
    command = [sys.executable, "-c", textwrap.dedent(script), *paths]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 250e6
    assert growth < size / 3


# ---- the published mmproj -----------------------------------------------------------------------


def published_weights(weights: Weights) -> Weights:
    """The published file's names: the projector first, the MLP's names swapped, the head kept."""
    words = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    head = {
        "probe": "probe",
        "attention.in_proj_weight": "attention.in_weight",
        "attention.in_proj_bias": "attention.in_bias",
        "attention.out_proj": "attention.out",
        "layernorm": "ln",
        "mlp.fc1": "ffn_down",
        "mlp.fc2": "ffn_up",
    }
    renamed: Weights = {}
    for name, values in sorted(weights.items(), key=lambda item: not item[0].startswith("multi")):
        if name.startswith("language_model."):
            continue
        if name.startswith(POOLING_HEAD):
            stem, _, tail = name.removeprefix(POOLING_HEAD).rpartition(".")
            whole = name.removeprefix(POOLING_HEAD)
            target = f"v.head.{head[whole]}" if whole in head else f"v.head.{head[stem]}.{tail}"
            renamed[target] = values.reshape(-1) if whole == "probe" else values
        else:
            parts = gguf_name(name).split(".")
            renamed[".".join(words.get(part, part) for part in parts)] = values
    return renamed


PUBLISHED_KEYS: dict[str, Any] = {
    "general.architecture": "siglip",
    "siglip.has_omni_vlm_projector": True,
    "general.file_type": 1,
    "general.name": "omni-vlm",
    "general.description": "image encoder for omni-vlm",
    "siglip.vision.image_size": 42,
    "siglip.vision.embedding_length": 32,
    "siglip.vision.attention.head_count": 4,
    "siglip.vision.patch_size": 14,
    "siglip.vision.block_count": 2,
    "siglip.vision.feed_forward_length": 48,
    "siglip.vision.projection_dim": 64,
    "siglip.vision.image_mean": [0.5, 0.5, 0.5],
    "siglip.vision.image_std": [0.5, 0.5, 0.5],
}


def write_published(
    path: Path,
    weights: Weights,
    file_keys: dict[str, Any] = PUBLISHED_KEYS,
    halved: GGMLQuantizationType = F16,
) -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = GGUFWriter(path, file_keys["general.architecture"])
    for key, value in file_keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    for name, values in weights.items():
        if values.ndim == 4:
            writer.add_tensor(name, values.astype(np.float16))
        elif values.ndim == 2 and name.endswith(".weight") and values.shape[1] % 32 == 0:
            writer.add_tensor(name, quants.quantize(values, halved), raw_dtype=halved)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "old/mmproj.gguf", published_weights(source_weights()))


@pytest.mark.parametrize("halved", [F16, GGMLQuantizationType.Q8_0, BF16])
def test_published_tensors_keep_type_and_bytes(
    tmp_path: Path, halved: GGMLQuantizationType, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = source_weights()
    old = write_published(tmp_path / "old/m.gguf", published_weights(weights), halved=halved)
    before = old.read_bytes()
    new = convert_mmproj(old, tmp_path / "new")
    assert new == tmp_path / "new/m.gguf"
    assert old.read_bytes() == before
    assert "left out the 11 tensors" in capfd.readouterr().err

    tensors = {tensor.name: tensor for tensor in GGUFReader(new).tensors}
    for source in GGUFReader(old).tensors:
        if source.name.startswith("v.head."):
            continue
        swapped = source.name.replace("ffn_up", "#").replace("ffn_down", "ffn_up")
        tensor = tensors.pop(swapped.replace("#", "ffn_down"))
        assert tensor.tensor_type == source.tensor_type
        assert tensor.shape.tolist() == source.shape.tolist()
        assert tensor.data.tobytes() == source.data.tobytes()
    assert not tensors


def test_published_mmproj_becomes_what_the_checkpoint_becomes(
    checkpoint: Path, published: Path
) -> None:
    """Both ways end in the same keys, tensors and order, but for the name."""
    ours = convert(checkpoint, "f32").mmproj
    theirs = GGUFReader(convert_mmproj(published, checkpoint.parent / "new"))
    expected = keys(ours) | {"general.name": "omni-vlm", "general.file_type": 1}
    assert keys(theirs) == expected
    assert list(keys(theirs)) == list(expected)
    assert [t.name for t in theirs.tensors] == [t.name for t in ours.tensors]
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        np.testing.assert_array_equal(one.data.astype(other.data.dtype), other.data, one.name)


def test_published_variant(published: Path, tmp_path: Path) -> None:
    new = convert_mmproj(published, tmp_path / "new", variant="vlm-81-ocr")
    assert keys(GGUFReader(new))["clip.omnivlm.prompt_variant"] == "vlm-81-ocr"
    with pytest.raises(OptionError, match="prompt variant 'x' is unknown"):
        convert_mmproj(published, tmp_path / "new", variant="x")


def test_published_without_merging_and_head(tmp_path: Path) -> None:
    weights = published_weights(source_weights(merge=1, head=False))
    old = write_published(tmp_path / "old/m.gguf", weights)
    found = keys(GGUFReader(convert_mmproj(old, tmp_path / "new")))
    assert found["clip.omnivlm.prompt_variant"] == "nano-vlm-instruct"
    assert found["clip.vision.projector.merge_factor"] == 1


def test_published_over_itself(published: Path) -> None:
    with pytest.raises(ConvertError, match="is the input itself"):
        convert_mmproj(published, published.parent)
    assert left_behind(published.parent) == [published.name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"general.architecture": "clip"}, "'clip'; only a published vision file"),
        ({"general.architecture": "llama"}, "'llama'; only a published vision file"),
        ({"siglip.vision.block_count": 3}, r"v\.blk\.2\.ln1\.weight is missing"),
        ({"siglip.vision.block_count": 1}, r"v\.blk\.1\..* is not part of this model"),
        ({"siglip.vision.block_count": 0}, "positive integer"),
        ({"siglip.vision.embedding_length": 64}, "shape"),
        ({"siglip.vision.attention.head_count": 5}, "not a multiple"),
        ({"siglip.vision.feed_forward_length": 50}, "ffn_down.weight has the shape"),
        ({"siglip.vision.patch_size": 50}, "larger than image_size"),
        ({"siglip.vision.patch_size": "14"}, "positive integer"),
        ({"siglip.vision.image_size": 56}, "merges 9 patches"),
        ({"siglip.vision.image_mean": [0.5]}, "3 numbers"),
        ({"siglip.vision.image_std": [0.5, 0.0, 0.5]}, "must be positive"),
    ],
)
def test_unusable_published_keys(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    weights = published_weights(source_weights())
    old = write_published(tmp_path / "old/m.gguf", weights, PUBLISHED_KEYS | change)
    with pytest.raises(ModelFileError, match=match):
        convert_mmproj(old, tmp_path / "new")
    assert left_behind(tmp_path / "new") == []


def test_published_key_missing(tmp_path: Path) -> None:
    file_keys = dict(PUBLISHED_KEYS)
    del file_keys["siglip.vision.image_size"]
    old = write_published(tmp_path / "old/m.gguf", published_weights(source_weights()), file_keys)
    with pytest.raises(ModelFileError, match=r"siglip\.vision\.image_size is missing"):
        convert_mmproj(old, tmp_path / "new")


def test_published_tensor_missing_or_unknown(tmp_path: Path) -> None:
    weights = published_weights(source_weights())
    extra = weights | {"v.extra": np.zeros(4, np.float32)}
    old = write_published(tmp_path / "old/m.gguf", extra)
    with pytest.raises(ModelFileError, match=r"v\.extra is not part of this model"):
        convert_mmproj(old, tmp_path / "new")
    for name in ("mm.2.weight", "v.post_ln.bias"):
        rest = {key: values for key, values in weights.items() if key != name}
        old = write_published(tmp_path / "old/m.gguf", rest)
        with pytest.raises(ModelFileError, match=f"{name} is missing"):
            convert_mmproj(old, tmp_path / "new")


def test_published_file_damaged(published: Path, tmp_path: Path) -> None:
    whole = published.read_bytes()
    for keep in (0, 3, 12, 30, 200, 1500, len(whole) // 2, len(whole) - 1000):
        published.write_bytes(whole[:keep])
        with pytest.raises(ModelFileError, match=r"mmproj\.gguf is damaged or not a GGUF file"):
            convert_mmproj(published, tmp_path / "new")
    published.unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        convert_mmproj(published, tmp_path / "new")


def test_published_header_with_flipped_bytes(published: Path, tmp_path: Path) -> None:
    """A damaged count or length is an error too, and never a file that cannot be read again."""
    whole = bytearray(published.read_bytes())
    for position in range(0, 1200, 7):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        published.write_bytes(damaged)
        try:
            GGUFReader(convert_mmproj(published, tmp_path / "new"))
        except (ConvertError, ModelFileError):
            assert all(name == published.name for name in left_behind(tmp_path / "new"))


def test_hand_written_safetensors_are_what_the_package_reads(tmp_path: Path) -> None:
    """The fixture writes the format by itself; this holds it to the real reader."""
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = source_weights()
    write_safetensors(tmp_path / "x.safetensors", weights)
    for name, values in safetensors.load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(values, weights.pop(name))
    assert not weights
