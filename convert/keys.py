"""Checked numbers -> GGUF keys. The reading side of the same keys is the native loader."""

from __future__ import annotations

from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFType, GGUFWriter, LlamaFileType

from .config import ProjectorConfig, TextConfig, VisionConfig
from .tokenizer import Vocabulary

MMPROJ_ARCHITECTURE = "clip"
TEXT_ARCHITECTURE = "qwen2"

PROJECTOR_TYPE = "omnivlm"
MERGE_FACTOR = "clip.vision.projector.merge_factor"
PROJECTOR_GELU = "clip.vision.projector.gelu"
PROMPT_VARIANT = "clip.omnivlm.prompt_variant"
SINGLE_TURN = "clip.omnivlm.single_turn"

MATRIX_TYPES = {"f16": GGMLType.F16, "bf16": GGMLType.BF16, "f32": GGMLType.F32}
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f32": LlamaFileType.ALL_F32,
}


def storage_type(shape: tuple[int, ...], outtype: str) -> GGMLType:
    """Matrices and the patch convolution follow `outtype`; biases and norms stay exact."""
    return MATRIX_TYPES[outtype] if len(shape) > 1 else GGMLType.F32


def add_mmproj_keys(
    writer: GGUFWriter,
    *,
    name: str,
    file_type: int,
    vision: VisionConfig,
    projector: ProjectorConfig,
    variant: str,
    single_turn: bool = False,
) -> None:
    writer.add_type(GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR_TYPE)
    writer.add_vision_use_gelu(True)  # of the vision tower: the tanh form
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden)
    writer.add_vision_feed_forward_length(vision.ffn)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(vision.norm_eps)
    writer.add_vision_projection_dim(projector.output)
    writer.add_vision_image_mean(vision.image_mean)
    writer.add_vision_image_std(vision.image_std)
    writer.add_uint32(MERGE_FACTOR, projector.merge)
    # The projector was trained with PyTorch's nn.GELU(), the erf form. The original's own C++
    # runtime computed the tanh form there, whatever the file: a small error that is not kept.
    writer.add_string(PROJECTOR_GELU, "erf")
    writer.add_string(PROMPT_VARIANT, variant)
    if single_turn:
        writer.add_bool(SINGLE_TURN, True)


def add_text_keys(
    writer: GGUFWriter, *, name: str, file_type: int, text: TextConfig, vocabulary: Vocabulary
) -> None:
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(text.layers)
    writer.add_context_length(text.context)
    writer.add_embedding_length(text.hidden)
    writer.add_feed_forward_length(text.ffn)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_rope_freq_base(text.rope_base)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_add_bos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
