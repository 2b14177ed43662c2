"""Every tensor of the model: its name in a checkpoint -> in the published file -> in ours, and its
shape (rows first). What is not in these tables is not converted, and is reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gguf import MODEL_TENSOR, TENSOR_NAMES

from .config import ProjectorConfig, TextConfig, VisionConfig

VISION = "vision_tower.vision_model"
PROJECTOR = "multi_modal_projector"
TEXT = "language_model"

LM_HEAD = f"{TEXT}.lm_head.weight"
TOKEN_EMBEDDING = f"{TEXT}.model.embed_tokens.weight"
PROJECTOR_WEIGHTS = (f"{PROJECTOR}.0.weight", f"{PROJECTOR}.2.weight")

_POOLING_HEAD = (
    # checkpoint                  published file
    ("probe", "probe"),
    ("attention.in_proj_weight", "attention.in_weight"),
    ("attention.in_proj_bias", "attention.in_bias"),
    ("attention.out_proj.weight", "attention.out.weight"),
    ("attention.out_proj.bias", "attention.out.bias"),
    ("layernorm.weight", "ln.weight"),
    ("layernorm.bias", "ln.bias"),
    ("mlp.fc1.weight", "ffn_down.weight"),
    ("mlp.fc1.bias", "ffn_down.bias"),
    ("mlp.fc2.weight", "ffn_up.weight"),
    ("mlp.fc2.bias", "ffn_up.bias"),
)
# SigLIP pools its patches into one vector with these; this model reads the patches themselves.
UNUSED = frozenset(f"{VISION}.head.{name}" for name, _ in _POOLING_HEAD)
UNUSED_PUBLISHED = frozenset(f"v.head.{name}" for _, name in _POOLING_HEAD)


@dataclass(frozen=True)
class Rule:
    """One tensor; `published` is its name in the original's own GGUF layout, if it is there."""

    source: str
    target: str
    shape: tuple[int, ...]
    published: str = ""


def mmproj_rules(vision: VisionConfig, projector: ProjectorConfig) -> Iterator[Rule]:
    """Vision tower and projector, in the order in which the picture meets them."""
    hidden, ffn, patch = vision.hidden, vision.ffn, vision.patch_size
    embeddings = f"{VISION}.embeddings"
    yield from _pair(
        f"{embeddings}.patch_embedding",
        "v.patch_embd",
        MODEL_TENSOR.V_ENC_EMBD_PATCH,
        (hidden, vision.channels, patch, patch),
    )
    yield Rule(
        f"{embeddings}.position_embedding.weight",
        _name(MODEL_TENSOR.V_ENC_EMBD_POS) + ".weight",
        (vision.patches, hidden),
        "v.position_embd.weight",
    )
    square, up, down = (hidden, hidden), (ffn, hidden), (hidden, ffn)
    for block in range(vision.layers):
        source, published = f"{VISION}.encoder.layers.{block}", f"v.blk.{block}"
        for tail, published_tail, tensor, shape in (
            ("layer_norm1", "ln1", MODEL_TENSOR.V_ENC_INPUT_NORM, (hidden,)),
            ("self_attn.q_proj", "attn_q", MODEL_TENSOR.V_ENC_ATTN_Q, square),
            ("self_attn.k_proj", "attn_k", MODEL_TENSOR.V_ENC_ATTN_K, square),
            ("self_attn.v_proj", "attn_v", MODEL_TENSOR.V_ENC_ATTN_V, square),
            ("self_attn.out_proj", "attn_out", MODEL_TENSOR.V_ENC_ATTN_O, square),
            ("layer_norm2", "ln2", MODEL_TENSOR.V_ENC_POST_ATTN_NORM, (hidden,)),
            # The published file swaps the two names: its ffn_down widens, its ffn_up narrows.
            ("mlp.fc1", "ffn_down", MODEL_TENSOR.V_ENC_FFN_UP, up),
            ("mlp.fc2", "ffn_up", MODEL_TENSOR.V_ENC_FFN_DOWN, down),
        ):
            yield from _pair(
                f"{source}.{tail}", f"{published}.{published_tail}", tensor, shape, block
            )
    yield from _pair(f"{VISION}.post_layernorm", "v.post_ln", MODEL_TENSOR.V_POST_NORM, (hidden,))
    first = (projector.hidden, projector.merge * hidden)
    second = (projector.output, projector.hidden)
    yield from _pair(f"{PROJECTOR}.0", "mm.0", MODEL_TENSOR.V_MMPROJ, first, 0)
    yield from _pair(f"{PROJECTOR}.2", "mm.2", MODEL_TENSOR.V_MMPROJ, second, 2)


def text_rules(text: TextConfig, *, head: bool) -> Iterator[Rule]:
    """The language model; `head` is False where the output matrix is the embedding's."""
    hidden, ffn, model = text.hidden, text.ffn, f"{TEXT}.model"
    kv = hidden // text.heads * text.kv_heads
    yield _weight(TOKEN_EMBEDDING, MODEL_TENSOR.TOKEN_EMBD, (text.vocab, hidden))
    for block in range(text.layers):
        source = f"{model}.layers.{block}"
        for tail, tensor, shape in (
            ("input_layernorm", MODEL_TENSOR.ATTN_NORM, (hidden,)),
            ("self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, (hidden, hidden)),
            ("post_attention_layernorm", MODEL_TENSOR.FFN_NORM, (hidden,)),
            ("mlp.gate_proj", MODEL_TENSOR.FFN_GATE, (ffn, hidden)),
            ("mlp.up_proj", MODEL_TENSOR.FFN_UP, (ffn, hidden)),
            ("mlp.down_proj", MODEL_TENSOR.FFN_DOWN, (hidden, ffn)),
        ):
            yield _weight(f"{source}.{tail}.weight", tensor, shape, block)
        for tail, tensor, shape in (  # only these three have a bias
            ("self_attn.q_proj", MODEL_TENSOR.ATTN_Q, (hidden, hidden)),
            ("self_attn.k_proj", MODEL_TENSOR.ATTN_K, (kv, hidden)),
            ("self_attn.v_proj", MODEL_TENSOR.ATTN_V, (kv, hidden)),
        ):
            yield from _pair(f"{source}.{tail}", "", tensor, shape, block)
    yield _weight(f"{model}.norm.weight", MODEL_TENSOR.OUTPUT_NORM, (hidden,))
    if head:
        yield _weight(LM_HEAD, MODEL_TENSOR.OUTPUT, (text.vocab, hidden))


def _pair(
    source: str, published: str, tensor: MODEL_TENSOR, shape: tuple[int, ...], block: int = 0
) -> Iterator[Rule]:
    """A weight, and the bias that has one value for each of the weight's rows."""
    for tail, tail_shape in (("weight", shape), ("bias", shape[:1])):
        yield Rule(
            f"{source}.{tail}",
            f"{_name(tensor, block)}.{tail}",
            tail_shape,
            f"{published}.{tail}" if published else "",
        )


def _weight(source: str, tensor: MODEL_TENSOR, shape: tuple[int, ...], block: int = 0) -> Rule:
    return Rule(source, f"{_name(tensor, block)}.weight", shape)


def _name(tensor: MODEL_TENSOR, block: int = 0) -> str:
    return TENSOR_NAMES[tensor].format(bid=block)
