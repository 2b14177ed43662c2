"""OmniVLM in PyTorch on transformers' own towers: the oracle of the reference tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel


class TorchOmniVLM(nn.Module):
    """SigLIP tower, reshape, Linear-GELU-Linear and Qwen2, in float32 with eager attention."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        super().__init__()
        vision = config["vision_config"] | {"vision_use_head": False}
        self.vision = SiglipVisionModel(SiglipVisionConfig(**vision, attn_implementation="eager"))
        self.text = Qwen2ForCausalLM(
            Qwen2Config(**config["text_config"], attn_implementation="eager")
        )
        n_in, n_proj = state["multi_modal_projector.0.weight"].shape[::-1]
        n_text = config["text_config"]["hidden_size"]
        self.projector = nn.Sequential(
            nn.Linear(n_in, n_proj), nn.GELU(), nn.Linear(n_proj, n_text)
        )
        _load(self.vision, state, "vision_tower.", ignore=("vision_model.head.",))
        _load(self.projector, state, "multi_modal_projector.")
        _load(self.text, state, "language_model.", may_miss=("lm_head.weight",))
        self.eval()

    @torch.no_grad()
    def logits(self, pixels: Tensor, before: list[int], after: list[int], n: int) -> Tensor:
        """Greedy decoding without a cache: logits [n, n_vocab] of the n generated tokens."""
        image = self.image_tokens(pixels)[0]  # [n_tokens, n_text]
        embed = self.text.get_input_embeddings()
        sequence = torch.cat([embed(torch.tensor(before)), image, embed(torch.tensor(after))])
        rows = []
        for _ in range(n):
            rows.append(self.text(inputs_embeds=sequence[None]).logits[0, -1])
            sequence = torch.cat([sequence, embed(rows[-1].argmax()[None])])
        return torch.stack(rows)

    @torch.no_grad()
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, n_tokens, n_text]."""
        patches = self.vision(pixel_values=pixels).last_hidden_state  # [n, n_patches, n_embd]
        merged = patches.reshape(len(patches), -1, self.projector[0].in_features)
        return self.projector(merged)


def _load(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    may_miss: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> None:
    """Loads by name; transformers 5 dropped the `vision_model.` level of the published names."""
    own = module.state_dict()
    part = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    part = {name: tensor for name, tensor in part.items() if not name.startswith(ignore or "\0")}
    if not any(name.startswith("vision_model.") for name in own):
        part = {name.removeprefix("vision_model."): tensor for name, tensor in part.items()}
    missing, unexpected = module.load_state_dict(part, strict=False)
    assert not unexpected
    assert set(missing) <= set(may_miss)


def from_checkpoint(path: Path) -> TorchOmniVLM:
    """A directory in the original's Hugging Face layout."""
    config = json.loads((path / "config.json").read_text())
    return TorchOmniVLM(config, load_file(path / "model.safetensors"))


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


# --- and back from GGUF, to check a model whose checkpoint is not at hand -------------------------

_VISION_NAMES = {
    "v.patch_embd": "embeddings.patch_embedding",
    "v.position_embd": "embeddings.position_embedding",
    "v.post_ln": "post_layernorm",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_TEXT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def from_gguf(text: Path, mmproj: Path) -> TorchOmniVLM:
    """Reads back our own layout's pair of files, whatever their types."""
    vision_file, text_file = gguf.GGUFReader(mmproj), gguf.GGUFReader(text)

    def value(reader: gguf.GGUFReader, key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    def vision(key: str) -> Any:
        return value(vision_file, f"clip.vision.{key}")

    def qwen2(key: str) -> Any:
        return value(text_file, f"qwen2.{key}")

    state = _state(vision_file, _hf_vision_name) | _state(text_file, _hf_text_name)
    config = {
        "vision_config": {
            "hidden_size": vision("embedding_length"),
            "intermediate_size": vision("feed_forward_length"),
            "num_hidden_layers": vision("block_count"),
            "num_attention_heads": vision("attention.head_count"),
            "image_size": vision("image_size"),
            "patch_size": vision("patch_size"),
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": vision("attention.layer_norm_epsilon"),
        },
        "text_config": {
            "hidden_size": qwen2("embedding_length"),
            "intermediate_size": qwen2("feed_forward_length"),
            "num_hidden_layers": qwen2("block_count"),
            "num_attention_heads": qwen2("attention.head_count"),
            "num_key_value_heads": qwen2("attention.head_count_kv"),
            "vocab_size": len(state["language_model.model.embed_tokens.weight"]),
            "rope_theta": qwen2("rope.freq_base"),
            "rms_norm_eps": qwen2("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": qwen2("context_length"),
            "tie_word_embeddings": "language_model.lm_head.weight" not in state,
        },
    }
    return TorchOmniVLM(config, state)


def _state(reader: gguf.GGUFReader, rename: Any) -> dict[str, Tensor]:
    return {
        rename(tensor.name): torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        )
        for tensor in reader.tensors
    }


def _hf_vision_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("mm."):
        return f"multi_modal_projector.{stem[3:]}.{kind}"
    if stem.startswith("v.blk."):
        _, _, layer, part = stem.split(".")
        stem = f"encoder.layers.{layer}.{_VISION_NAMES[part]}"
    else:
        stem = _VISION_NAMES[stem]
    return f"vision_tower.vision_model.{stem}.{kind}"


def _hf_text_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"language_model.model.layers.{layer}.{_TEXT_NAMES[part]}.{kind}"
    return f"language_model.{_TEXT_NAMES[stem]}.{kind}"
