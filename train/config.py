"""One TOML file for each size of model -> checked, frozen numbers of all stages."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from errors import TrainError
from scenes import HOME_SHARE

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")
PRECISIONS = ("bf16", "no")
COMPRESSIONS = ("reshape", "none", "convolution")
LANGUAGES = ("en", "zh")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _share(name: str, value: float) -> None:
    """Raises TrainError unless the value is a share."""
    if not 0 <= value <= 1:
        raise TrainError(f"{name} is {value}; it must be a share from 0 to 1")


@dataclass(frozen=True)
class Vision:
    """The SigLIP tower; with a `checkpoint` (a local directory) the sizes are that one's."""

    checkpoint: str = ""
    image_size: int = 126
    patch_size: int = 14
    width: int = 256
    inner: int = 768
    layers: int = 6
    heads: int = 4


@dataclass(frozen=True)
class Text:
    """The Qwen2 decoder and its tokenizer; with a `checkpoint` both are that one's."""

    checkpoint: str = ""
    width: int = 256
    inner: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 1024
    vocabulary: int = 2048


@dataclass(frozen=True)
class Projector:
    """Patches -> image tokens, in one of COMPRESSIONS; "convolution" cannot be converted."""

    compression: str = "reshape"
    hidden: int = 512

    def __post_init__(self) -> None:
        _one_of("projector.compression", self.compression, COMPRESSIONS)

    @property
    def merge(self) -> int:
        """How many consecutive patches make one image token."""
        return 1 if self.compression == "none" else 9


@dataclass(frozen=True)
class Data:
    """Rows of several question-answer pairs behind one picture, and how long they are there."""

    languages: tuple[str, ...] = ("en", "zh")
    styles: tuple[str, ...] = ("noto",)  # of the drawings; with several they are changed, too
    tokens: int = 208
    caption_tokens: int = 144  # in stage 1
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.languages:
            raise TrainError(f"data.languages is empty; known are {', '.join(LANGUAGES)}")
        for language in self.languages:
            _one_of("a language of data.languages", language, LANGUAGES)


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the language model in stages 2 and 3; rank 0 trains all of it."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage learns; rates are peaks, `rise` and `fall` shares of it.

    `home_share` of the things in drawn training scenes are where they are at home, the others
    anywhere. `json` (LLaVA's format) and `images` (its folder) replace the drawn scenes.
    """

    steps: int = 1000
    batch: int = 32  # pictures of one process in one forward pass
    accumulate: int = 1  # forward passes for one step
    rate: float = 1.5e-3
    rise: float = 0.01
    fall: float = 0.45
    weight_decay: float = 0.05
    muon: bool = True  # for the inner matrices; AdamW for all if not
    average: float = 0.998  # decay of the moving average that is exported
    log_every: int = 20
    report_every: int = 500  # validation
    save_every: int = 500
    validation: int = 100  # pictures
    home_share: float = HOME_SHARE
    json: str = ""
    images: str = ""

    def __post_init__(self) -> None:
        _share("home_share", self.home_share)


@dataclass(frozen=True)
class Tower(Stage):
    """SigLIP's pretraining: the text encoder of the captions, and the weights of the losses."""

    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_tokens: int = 64
    contrast: float = 0.1
    nothing: float = 0.3  # weight of patches without a thing; others 1


@dataclass(frozen=True)
class Sft(Stage):
    """`relation_share` of the drawn pictures have single things that stand to each other or differ
    in size, and are asked for that after their caption."""

    relation_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _share("relation_share", self.relation_share)


@dataclass(frozen=True)
class Dpo(Stage):
    """`pictures` are described for the pairs, each by some `answers`; the grid's runs take
    `grid_steps` each; `anchor` is the weight of the chosen answer's own loss.

    `json` holds rows of image, question, chosen and rejected, if pairs are there already.
    """

    pictures: int = 4000
    answers: int = 4
    temperature: float = 1.0
    limit: int = 160  # tokens of an answer
    beta: tuple[float, ...] = (0.1, 0.3)
    rates: tuple[float, ...] = (2e-5, 1e-4)
    grid_steps: int = 100
    anchor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta or not self.rates:
            raise TrainError("dpo.beta and dpo.rates must each have a number to try")


@dataclass(frozen=True)
class Ablation:
    """Steps of stage 1, and of stage 2, for each way to make image tokens."""

    steps: int = 500
    report_every: int = 250


@dataclass(frozen=True)
class Config:
    """All of it."""

    seed: int = 0
    precision: str = "bf16"  # accelerate's mixed_precision: bf16 (where it is no emulation) or no
    compile: bool = True  # the decoder, which takes minutes first
    attention: str = "eager"  # transformers' attn_implementation
    outtype: str = "f16"  # of the converted files
    quantize: str = ""  # a recipe of omnivlm-edge quantize for a second pair of files
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    projector: Projector = field(default_factory=Projector)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    tower: Tower = field(default_factory=Tower)
    language: Stage = field(default_factory=Stage)
    pretrain: Stage = field(default_factory=Stage)
    sft: Sft = field(default_factory=Sft)
    dpo: Dpo = field(default_factory=Dpo)
    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)


def load_config(path: Path) -> Config:
    """Read a TOML file; what it leaves out keeps its default, what is unknown is an error."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TrainError(f"{path} is not valid TOML: {error}") from error
    return _build(Config, values, str(path))


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass from a table, its nested tables too."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            known = ", ".join(hints)
            raise TrainError(f"{where}: there is no setting {key!r} here; known are {known}")
        values = values | {key: _value(hints[key], value, f"{where}: {key}")}
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    if getattr(hint, "__origin__", None) is tuple and isinstance(value, list):
        return tuple(_value(hint.__args__[0], item, where) for item in value)
    name = getattr(hint, "__name__", "table") if isinstance(hint, type) else "list"
    raise TrainError(f"{where} is {value!r}; it must be of type {name}")
