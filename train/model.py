"""The demo model: OmniVLM's architecture, small, and its Hugging Face checkpoint."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from scenes import IMAGE_SIZE, PATCH
from tokenizer import HEAD, QUESTION, save_tokenizer

WIDTH = 256
PROJECTOR_WIDTH = 512
GROUP = 9  # consecutive patches that make one image token
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2 // GROUP
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
ATTENTION = {"attn_implementation": "eager"}  # the fastest here: plain bf16 matrix products


class DemoVLM(nn.Module):
    """SigLIP tower, nine patches joined along channels, two-layer projector, Qwen2 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.image_pad = tokenizer.token_to_id("<|image_pad|>")
        text = Qwen2Config(
            **TEXT,
            **ATTENTION,
            vocab_size=tokenizer.get_vocab_size(),
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id("<|im_end|>"),
            pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        )
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**VISION, **ATTENTION))
        self.multi_modal_projector = nn.Sequential(
            nn.Linear(GROUP * WIDTH, PROJECTOR_WIDTH),
            nn.GELU(),
            nn.Linear(PROJECTOR_WIDTH, WIDTH),
        )
        self.language_model = Qwen2ForCausalLM(text)

    def patches(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> patch features [B, 81, C]."""
        return self.vision_tower(pixels / 127.5 - 1).last_hidden_state

    def project(self, patches: Tensor) -> Tensor:
        """[B, 81, C] -> image tokens [B, 9, C]; patch 9t + i is part i of token t."""
        batch = patches.shape[0]
        return self.multi_modal_projector(patches.reshape(batch, IMAGE_TOKENS, GROUP * WIDTH))

    def embed(self, ids: Tensor, image: Tensor) -> Tensor:
        """Token ids [B, T] with 9 image places each -> embeddings [B, T, C]."""
        embedded = self.language_model.model.embed_tokens(ids).to(image.dtype)
        places = (ids == self.image_pad)[..., None].expand_as(embedded)
        return embedded.masked_scatter(places, image)

    @torch.inference_mode()
    def answer(self, pixels: Tensor, questions: list[str], limit: int = 48) -> list[str]:
        """Greedy answers: uint8 [B, 3, S, S] and B questions -> B texts."""
        head = self.tokenizer.encode(HEAD).ids + [self.image_pad] * IMAGE_TOKENS
        prompts = [head + self.tokenizer.encode(QUESTION.format(question=q)).ids for q in questions]
        longest = max(map(len, prompts))
        config = self.language_model.config
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor(
            [[config.pad_token_id] * n + p for n, p in zip(padding, prompts, strict=True)]
        )
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        generated = self.language_model.generate(
            inputs_embeds=self.embed(ids, self.project(self.patches(pixels))),
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
        )
        texts = self.tokenizer.decode_batch(generated.tolist(), skip_special_tokens=True)
        return [text.strip().removeprefix("assistant\n") for text in texts]


def config(model: DemoVLM) -> dict:
    """config.json in the original's layout."""
    text = model.language_model.config
    return {
        "architectures": ["OminiVLMForConditionalGeneration"],
        "model_type": "omini_vlm",
        "hidden_size": PROJECTOR_WIDTH,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "image_token_index": model.image_pad,
        "single_turn": True,  # our converter's key: no conversations in the data
        "torch_dtype": "float32",
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **TEXT,
            "vocab_size": text.vocab_size,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
            "use_sliding_window": False,
            "torch_dtype": "float32",
        },
    }


def weights(model: DemoVLM) -> dict[str, Tensor]:
    """The tensors under the original's names; the tied head is not stored."""
    state = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor.float().contiguous()
        for name, tensor in model.state_dict().items()
    }
    del state["language_model.lm_head.weight"]
    return state


def save_checkpoint(model: DemoVLM, folder: Path) -> None:
    """Write the Hugging Face checkpoint; the folder appears, or is replaced, only when complete."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    generation = {"do_sample": False, "eos_token_id": model.language_model.config.eos_token_id}
    for name, content in (
        ("config.json", config(model)),
        ("preprocessor_config.json", preprocessor),
        ("generation_config.json", generation),
    ):
        (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(model.tokenizer, fresh)
    save_file(weights(model), fresh / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_checkpoint(folder: Path) -> DemoVLM:
    """Read what `save_checkpoint` wrote."""
    model = DemoVLM(Tokenizer.from_file(str(folder / "tokenizer.json")))
    state = {
        name.replace("vision_tower.vision_model.", "vision_tower."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()
