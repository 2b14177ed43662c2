"""OmniVLM: SigLIP tower, patches joined along channels, two-layer projector, Qwen2 decoder.

pixels uint8 [B, 3, S, S] -> patches [B, P, C] -> image tokens [B, P / 9, D] -> answers
"""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from config import Config, Lora, Projector, Text, Vision
from errors import TrainError
from tokenizer import ANSWER, HEAD, QUESTION, save_tokenizer

TOWER, LANGUAGE = "vision_tower.", "language_model."
LEVEL = "vision_model."  # which transformers 5 dropped from SiglipVisionModel, and the format has


def vision_config(settings: Vision, attention: str) -> SiglipVisionConfig:
    """The tower's sizes; its pooling head is left out, as this model reads the patches."""
    if settings.checkpoint:
        return SiglipVisionConfig.from_pretrained(
            settings.checkpoint, vision_use_head=False, attn_implementation=attention
        )
    return SiglipVisionConfig(
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        num_channels=3,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        attn_implementation=attention,
    )


def text_config(settings: Text, tokenizer: Tokenizer, attention: str) -> Qwen2Config:
    """The decoder's sizes."""
    if settings.checkpoint:
        return Qwen2Config.from_pretrained(settings.checkpoint, attn_implementation=attention)
    return Qwen2Config(
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        hidden_act="silu",
        tie_word_embeddings=True,
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        attn_implementation=attention,
    )


class OmniVLM(nn.Module):
    """The three parts; see the top of this file for what goes through them."""

    def __init__(
        self,
        vision: SiglipVisionConfig,
        text: Qwen2Config,
        projector: Projector,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.image_pad = tokenizer.token_to_id("<|image_pad|>")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        patches = (vision.image_size // vision.patch_size) ** 2
        if patches % projector.merge:
            raise TrainError(
                f"a picture has {patches} patches, which cannot be joined by {projector.merge}; "
                "choose another image_size or patch_size"
            )
        self.image_tokens = patches // projector.merge
        self.compression = projector.compression
        width = vision.hidden_size
        self.vision_tower = SiglipVisionModel(vision)
        if self.compression == "convolution":
            self.convolution = nn.Conv1d(width, width, projector.merge, projector.merge)
        joined = width * (projector.merge if self.compression == "reshape" else 1)
        self.multi_modal_projector = nn.Sequential(
            nn.Linear(joined, projector.hidden),
            nn.GELU(),
            nn.Linear(projector.hidden, text.hidden_size),
        )
        self.language_model = Qwen2ForCausalLM(text)

    @property
    def projector_parts(self) -> tuple[str, ...]:
        """The names of what stands between tower and decoder."""
        convolution = ("convolution",) if self.compression == "convolution" else ()
        return (*convolution, "multi_modal_projector")

    @property
    def image_size(self) -> int:
        """The side of a picture in pixels."""
        return self.vision_tower.config.image_size

    def patches(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> patch features [B, P, C]."""
        return self.vision_tower(pixels / 127.5 - 1).last_hidden_state

    def project(self, patches: Tensor) -> Tensor:
        """[B, P, C] -> image tokens [B, P / 9, D]; patch 9t + i is part i of token t."""
        batch = patches.shape[0]
        if self.compression == "convolution":
            patches = self.convolution(patches.transpose(1, 2)).transpose(1, 2)
        return self.multi_modal_projector(patches.reshape(batch, self.image_tokens, -1))

    def embed(self, ids: Tensor, image: Tensor | None) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, D]; the image tokens take the image's places."""
        embedded = self.language_model.get_input_embeddings()(ids)
        if image is None:
            return embedded
        embedded = embedded.to(image.dtype)
        places = (ids == self.image_pad)[..., None].expand_as(embedded)
        return embedded.masked_scatter(places, image)

    @torch.inference_mode()
    def answer(
        self,
        pixels: Tensor,
        questions: list[str],
        which: list[int] | None = None,
        *,
        limit: int = 160,
        temperature: float = 0.0,
        batch: int = 128,
    ) -> list[str]:
        """Answers to questions about pictures, the likeliest ones or sampled.

        uint8 [B, 3, S, S], Q questions, and the picture (0..B-1) of each -> Q texts
        """
        device = self.language_model.device
        image = self.project(self.patches(pixels.to(device)))
        picture = torch.tensor(which or range(len(questions)), device=device)
        head = self.tokenizer.encode(HEAD).ids + [self.image_pad] * self.image_tokens
        texts: list[str] = []
        for start in range(0, len(questions), batch):
            part = [QUESTION.format(question=q) for q in questions[start : start + batch]]
            prompts = [head + self.tokenizer.encode(text).ids for text in part]
            longest = max(map(len, prompts))
            ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in prompts])
            mask = torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in prompts])
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                if temperature
                else {"do_sample": False}
            )
            generated = self.language_model.generate(
                inputs_embeds=self.embed(ids.to(device), image[picture[start : start + batch]]),
                attention_mask=mask.long().to(device),
                generation_config=GenerationConfig(
                    **sampling,
                    max_new_tokens=limit,
                    eos_token_id=self.end,
                    pad_token_id=self.pad,
                ),
            )
            texts += self.tokenizer.decode_batch(generated.tolist(), skip_special_tokens=True)
        header = ANSWER.split("{")[0].replace("<|im_start|>", "").strip()
        return [text.strip().removeprefix(header).strip() for text in texts]


# ---- from parts -------------------------------------------------------------------------------


def new_model(config: Config, tokenizer: Tokenizer) -> OmniVLM:
    """Random weights, or the towers' own where the configuration names their checkpoints."""
    vision = vision_config(config.vision, config.attention)
    text = text_config(config.text, tokenizer, config.attention)
    model = OmniVLM(vision, text, config.projector, tokenizer)
    for name, settings, kind in (
        ("vision_tower", config.vision, SiglipVisionModel),
        ("language_model", config.text, Qwen2ForCausalLM),
    ):
        if settings.checkpoint:
            part = getattr(model, name)
            loaded = kind.from_pretrained(
                settings.checkpoint, config=part.config, dtype=torch.float32
            )
            setattr(model, name, loaded)
    return model


def add_lora(model: OmniVLM, settings: Lora) -> None:
    """Put low-rank updates beside all matrices of the decoder, which else is frozen."""
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    get_peft_model(model.language_model, lora)  # changes the decoder in place


def merged(model: OmniVLM) -> OmniVLM:
    """The model, or a copy in which LoRA's updates have become part of the matrices."""
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return model
    copy = deepcopy(model)
    for name, module in list(copy.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            copy.set_submodule(name, module.get_base_layer())
    return copy


# ---- checkpoints ------------------------------------------------------------------------------


def config_json(model: OmniVLM) -> dict[str, object]:
    """config.json in the original's layout."""
    vision, text = model.vision_tower.config.to_dict(), model.language_model.config.to_dict()
    for section in (vision, text):
        for key in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
            section.pop(key, None)
    return {
        "architectures": ["OminiVLMForConditionalGeneration"],
        "model_type": "omini_vlm",
        "hidden_size": model.multi_modal_projector[0].out_features,
        "mm_hidden_size": model.vision_tower.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "image_token_index": model.image_pad,
        "single_turn": True,  # our converter's key: no conversations in the data
        "torch_dtype": "float32",
        "vision_config": vision,
        "text_config": text | {"torch_dtype": "float32"},
    }


def preprocessor_json(model: OmniVLM) -> dict[str, object]:
    """preprocessor_config.json."""
    size = model.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def weights(model: OmniVLM) -> dict[str, Tensor]:
    """The tensors under the original's names; a tied head is not stored."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(TOWER) and not name.startswith(TOWER + LEVEL):
            name = TOWER + LEVEL + name.removeprefix(TOWER)
        state[name] = tensor.float().cpu().contiguous()
    if model.language_model.config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    return state


def replace_folder(fresh: Path, folder: Path) -> None:
    """The complete folder `fresh` under its final name, in whose place nothing half-written is."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(model: OmniVLM, folder: Path, source: str = "") -> None:
    """Write the Hugging Face checkpoint; the tokenizer's files are those of `source` if given."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, content in (
        ("config.json", config_json(model)),
        ("preprocessor_config.json", preprocessor_json(model)),
        ("generation_config.json", {"do_sample": False, "eos_token_id": model.end}),
        ("training.json", {"compression": model.compression}),
    ):
        (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(model.tokenizer, fresh, source)
    save_file(weights(model), fresh / "model.safetensors", metadata={"format": "pt"})
    replace_folder(fresh, folder)


def load_checkpoint(folder: Path, attention: str = "eager") -> OmniVLM:
    """Read what `save_checkpoint` wrote."""
    try:
        root = json.loads((folder / "config.json").read_text())
        compression = json.loads((folder / "training.json").read_text())["compression"]
        state = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vision = SiglipVisionConfig(**root["vision_config"], attn_implementation=attention)
        text = Qwen2Config(**root["text_config"], attn_implementation=attention)
        projector = Projector(compression, root["hidden_size"])
    except Exception as error:  # whatever a damaged file makes these libraries raise
        raise TrainError(
            f"{folder} is no complete checkpoint ({error}); delete it and run its stage again"
        ) from error
    model = OmniVLM(vision, text, projector, tokenizer)
    if text.tie_word_embeddings:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    if not hasattr(model.vision_tower, LEVEL.rstrip(".")):
        state = {n.replace(TOWER + LEVEL, TOWER): tensor for n, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise TrainError(
            f"{folder}/model.safetensors does not fit its config.json; "
            "delete the folder and run its stage again"
        ) from error
    return model
