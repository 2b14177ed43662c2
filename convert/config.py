"""The JSON files of a checkpoint -> checked, frozen numbers.

The only file that knows Hugging Face key names. Nothing here guesses a dimension: what the model
does not say is an error, and so is every setting that the runtime does not implement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConvertError, OmniVLMError

OUTTYPES = ("f16", "bf16", "f32")

_MAX_INTEGER = 2**31 - 1  # every integer must fit GGUF's u32 and the runtime's int
_MAX_FLOAT = 1e38  # and every other number a float32


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the pixels that it wants."""

    image_size: int
    patch_size: int
    channels: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    norm_eps: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ProjectorConfig:
    """Two linear layers; `merge` consecutive patches become one token."""

    merge: int
    hidden: int
    output: int


@dataclass(frozen=True)
class TextConfig:
    """The language model; `tied` is None where the configuration does not say."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool | None
    eos_token_id: int | None


@dataclass(frozen=True)
class Section:
    """One JSON object or key table, read by checked accessors; `where` begins every complaint."""

    values: Mapping[str, Any]
    where: str
    error: type[OmniVLMError] = ConvertError

    def integer(self, key: str) -> int:
        value = self.present(key)
        if type(value) is not int or not 0 < value <= _MAX_INTEGER:
            raise self.error(f"{self.where}: {key} is {value!r}; it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.present(key) if default is None else self.values.get(key, default)
        if not _is_finite(value) or value <= 0:
            raise self.error(f"{self.where}: {key} is {value!r}; it must be a positive number")
        return float(value)

    def numbers(self, key: str, count: int, default: float | None = None) -> tuple[float, ...]:
        """`count` finite numbers; `default` stands for each of them where the key is absent."""
        if default is not None and key not in self.values:
            return (default,) * count
        value = self.present(key)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_finite, value)):
            raise self.error(f"{self.where}: {key} is {value!r}; it must be {count} numbers")
        return tuple(float(item) for item in value)

    def items(self, key: str) -> list[Any]:
        value = self.present(key)
        if not isinstance(value, list):
            raise self.error(f"{self.where}: {key} is not a list")
        return value

    def section(self, key: str) -> Section:
        value = self.present(key)
        if not isinstance(value, dict):
            raise self.error(f"{self.where}: {key} is {value!r}; it must be an object")
        return Section(value, f"{self.where}: {key}", self.error)

    def flag(self, key: str) -> bool:
        """False when the key is absent."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{self.where}: {key} is {value!r}; it must be true or false")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuse a setting that is present and that the runtime does not implement."""
        if key in self.values and self.values[key] not in supported:
            names = " or ".join(repr(value) for value in supported)
            raise self.error(
                f"{self.where}: {key} is {self.values[key]!r}, but only {names} is supported"
            )

    def divides(self, part: str, whole: str) -> None:
        if self.integer(whole) % self.integer(part):
            raise self.error(
                f"{self.where}: {whole} {self.integer(whole)} is not a multiple of "
                f"{part} {self.integer(part)}"
            )

    def present(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(f"{self.where}: the key {key} is missing")
        return self.values[key]


def read_json(path: Path) -> Section:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConvertError(f"{path} is missing; take it from the original model") from exc
    except OSError as exc:
        raise ConvertError(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConvertError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return Section(value, str(path))


def read_optional_json(path: Path) -> Section:
    """As `read_json`, but an absent file is an empty object."""
    return read_json(path) if path.exists() else Section({}, str(path))


def read_model_config(checkpoint: Path) -> tuple[Section, VisionConfig, TextConfig]:
    """The root of config.json, the vision tower with its pixels, and the language model."""
    root = read_json(checkpoint / "config.json")
    root.present("model_type")
    root.only("model_type", "omini_vlm")
    root.only("mm_projector_type", "mlp2x_gelu")
    pixels = read_optional_json(checkpoint / "preprocessor_config.json")
    vision = _vision(root.section("vision_config"), pixels)
    root.only("mm_hidden_size", vision.hidden)
    return root, vision, _text(root.section("text_config"), root)


def _vision(section: Section, pixels: Section) -> VisionConfig:
    section.only("hidden_act", "gelu_pytorch_tanh")
    section.only("num_channels", 3)
    section.divides("num_attention_heads", "hidden_size")
    image_size, patch_size = section.integer("image_size"), section.integer("patch_size")
    if patch_size > image_size:
        raise ConvertError(
            f"{section.where}: patch_size {patch_size} is larger than image_size {image_size}"
        )
    mean, std = _pixels(pixels, image_size)
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        channels=3,
        hidden=section.integer("hidden_size"),
        ffn=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=section.integer("num_attention_heads"),
        norm_eps=section.number("layer_norm_eps", default=1e-6),
        image_mean=mean,
        image_std=std,
    )


def _pixels(section: Section, image_size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std; the runtime always resizes bicubically, divides by 255 and normalises."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        section.only(step, True, None)
    section.only("resample", 3, None)
    size = {"height": image_size, "width": image_size}
    section.only("size", size, image_size, None)
    if not math.isclose(section.number("rescale_factor", default=1 / 255), 1 / 255, rel_tol=1e-4):
        raise ConvertError(f"{section.where}: only a rescale_factor of 1/255 is supported")
    mean = section.numbers("image_mean", 3, default=0.5)
    std = section.numbers("image_std", 3, default=0.5)
    if min(std) <= 0:
        raise ConvertError(f"{section.where}: image_std {list(std)} must be positive")
    return mean, std


def _text(section: Section, root: Section) -> TextConfig:
    section.only("model_type", "qwen2")
    section.only("hidden_act", "silu")
    section.only("use_sliding_window", False, None)
    section.divides("num_attention_heads", "hidden_size")
    section.divides("num_key_value_heads", "num_attention_heads")
    hidden, heads = section.integer("hidden_size"), section.integer("num_attention_heads")
    section.only("head_dim", hidden // heads, None)
    if hidden // heads % 2:
        raise ConvertError(
            f"{section.where}: the head size {hidden // heads} is odd, so it cannot be rotated"
        )
    layers = section.items("layer_types") if section.values.get("layer_types") else []
    if any(kind != "full_attention" for kind in layers):
        raise ConvertError(f"{section.where}: layer_types may only hold 'full_attention'")
    return TextConfig(
        hidden=hidden,
        ffn=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=section.integer("num_key_value_heads"),
        vocab=section.integer("vocab_size"),
        context=section.integer("max_position_embeddings"),
        rope_base=_rope_base(section),
        norm_eps=section.number("rms_norm_eps", default=1e-6),
        tied=_flag(section, "tie_word_embeddings", _flag(root, "tie_word_embeddings", None)),
        eos_token_id=_first_id(section.values.get("eos_token_id")),
    )


def _rope_base(section: Section) -> float:
    """`rope_theta`, or `rope_parameters.rope_theta` as newer configurations write it."""
    for key in ("rope_scaling", "rope_parameters"):
        if section.values.get(key) is None:
            continue
        scaling = section.section(key)
        scaling.only("rope_type", "default")
        scaling.only("type", "default")
        scaling.only("factor", 1, None)
        if key == "rope_parameters" and "rope_theta" in scaling.values:
            return scaling.number("rope_theta")
    return section.number("rope_theta")


def _flag(section: Section, key: str, default: bool | None) -> bool | None:
    section.only(key, True, False, None)
    value: bool | None = section.values.get(key)
    return default if value is None else value


def _first_id(value: Any) -> int | None:
    """An id, or the first of a list of ids."""
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int else None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT  # which NaN is not


def check_outtype(outtype: str) -> None:
    if outtype not in OUTTYPES:
        raise ConvertError(
            f"there is no output type {outtype!r}; choose one of {', '.join(OUTTYPES)}"
        )


def projector_from_shapes(
    first: tuple[int, ...], second: tuple[int, ...], vision: VisionConfig
) -> ProjectorConfig:
    """The projector's numbers stand in no configuration: its two weights tell them."""
    if len(first) != 2 or len(second) != 2 or first[1] % vision.hidden or not all(first + second):
        raise ValueError(
            f"the projector's weights have the shapes {first} and {second}; the first must be 2-D "
            f"with an input width that is a multiple of the vision width {vision.hidden}"
        )
    merge = first[1] // vision.hidden
    if vision.patches % merge:
        raise ValueError(
            f"the projector merges {merge} patches into a token, "
            f"but a picture has {vision.patches} patches"
        )
    return ProjectorConfig(merge=merge, hidden=first[0], output=second[0])
