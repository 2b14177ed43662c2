"""What smaller files cost: builds of one model, measured against a reference build.

vision: pictures -> both towers -> the distance of their image embeddings
text:   the reference's greedy answers; the other is led along them, with the reference's embeddings
whole:  the same, with the embeddings of its own vision file
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .decoder import log_softmax
from .device import check_threads, select_device
from .encoder import PictureEncoder
from .engine import OmniVLM
from .errors import ModelFileError, OptionError
from .hub import Notify
from .image import ImageSource
from .made_pictures import made_pictures
from .model_file import (
    TEXT_ORDER,
    VISION_ORDER,
    ModelFile,
    best,
    fitting_vision,
    inspect_all,
    inspect_file,
)
from .models import find_model
from .prompt import default_variant
from .values import Answer, GenerateOptions, ImageEmbedding, ModelFiles

DEFAULT_PROMPTS = ("Describe the image",)
DEFAULT_MAX_TOKENS = 32

Model: TypeAlias = "str | os.PathLike[str] | ModelFiles"
_T = TypeVar("_T")


@dataclass(frozen=True)
class VisionLoss:
    """How far the image embeddings [n_tokens, n_embd] are from the reference's, over all pictures.

    `cosine` and `error`, which is ||b - a|| / ||a||, are means; the others are of the worst
    picture.
    """

    cosine: float
    worst_cosine: float
    error: float
    worst_error: float


@dataclass(frozen=True)
class TextLoss:
    """How far the next-token distributions are from the reference's, over `positions` of them.

    `kl` is the mean of KL(reference || other) in nats, `kl_p99` its 99th percentile; `top1` is the
    share of positions at which both find the same token the likeliest.
    """

    kl: float
    kl_p99: float
    top1: float
    positions: int


@dataclass(frozen=True)
class Loss:
    """One build of a model: its bytes, and what it loses against the reference.

    `text` and `whole` are None where only vision files are compared, and with `vision` for the
    reference itself; `text_bytes` is 0 there. `exact` is the share of questions that were answered
    word by word, None where none were asked.
    """

    name: str
    text_bytes: int
    vision_bytes: int
    vision: VisionLoss | None = None
    text: TextLoss | None = None
    whole: TextLoss | None = None
    exact: float | None = None


@dataclass(frozen=True)
class ExamQuestion:
    """A question about the picture in a file, and its one right answer."""

    image: Path
    prompt: str
    answer: str


def compare_models(
    reference: Model,
    others: Sequence[Model],
    pictures: Sequence[ImageSource] | None = None,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    questions: Sequence[ExamQuestion] = (),
    device: str = "auto",
    n_threads: int | None = None,
    vision_precision: str = "ggml",
    notify: Notify | None = None,
) -> list[Loss]:
    """Measures `others`, builds of the model `reference`, over pictures; the first is `reference`.

    A model is what `find_model` takes (with `notify`), its two files, or one of them. The other
    half of a file alone is the reference's; the other half of the reference is looked for beside
    it. A vision file without a text model is measured without one. `pictures` None are
    `made_pictures`. The reference answers each of the prompts about each picture with at most
    `max_tokens`. At any time two models are loaded. `vision_precision` is that of the others: the
    reference's pictures are encoded by ggml, and so are theirs unless the loss of a precision is
    wanted too.

    Raises ModelFileError for a model that is not found, cannot be used or is another one,
    OptionError, ImageError, DeviceError.
    """
    first, builds = _find_builds(reference, others, notify)
    pictures = made_pictures() if pictures is None else pictures
    if not pictures or not prompts:
        raise OptionError("there is nothing to compare: give at least one picture and one prompt")
    if questions and first.text is None:
        raise OptionError(
            f"{first.vision.path}: is a vision file alone, which cannot answer questions"
        )
    options = GenerateOptions(max_tokens=max_tokens)
    with _opened(first, device, n_threads, "ggml") as (encode, model):
        images = [encode(picture) for picture in _shown(pictures, first, "pictures")]
        answers = []
        if model is not None:
            asked = prompts if model.takes_questions else prompts[:1]  # OCR: the picture alone
            pairs = [(image, prompt) for image in images for prompt in asked]
            answers = [
                (image, prompt, model.answer(image, prompt, options))
                for image, prompt in _shown(pairs, first, "answers")
            ]
        exact = _share_exact(first, model, questions)
        losses = [Loss(first.name, *first.sizes, exact=exact)]
        for build in builds:
            with _opened(build, device, n_threads, vision_precision) as (own_encode, own_model):
                own = [own_encode(picture) for picture in _shown(pictures, build, "pictures")]
                text = whole = None
                if model is not None and own_model is not None:
                    seen = [image for image in own for _ in asked]
                    led = list(zip(answers, seen, strict=True))
                    shown = _shown(led, build, "answers")
                    text, whole = _text_losses(build, model, own_model, shown)
                exact = _share_exact(build, own_model, questions)
                vision = _vision_loss(images, own)
                losses.append(Loss(build.name, *build.sizes, vision, text, whole, exact))
    return losses


def read_questions(path: Path) -> list[ExamQuestion]:
    """Questions from lines of JSON: {"image": …, "prompt": …, "answer": …}.

    `prompt` may be called `question`, as in a generated test set. The pictures' paths are relative
    to the file. Raises OptionError, which names the line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # a text may hold other line ends
    except (OSError, ValueError) as exc:
        raise OptionError(f"{path}: cannot be read ({getattr(exc, 'strerror', exc)})") from exc
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt = fields["prompt"] if "prompt" in fields else fields["question"]
            values = [fields["image"], prompt, fields["answer"]]
        except (ValueError, TypeError, LookupError, RecursionError):
            values = []
        if not values or not all(isinstance(value, str) for value in values):
            raise OptionError(
                f"{path}: line {number} is no JSON object with the texts image, prompt and answer"
            )
        image, prompt, answer = values
        if "\0" in image or not (path.parent / image).is_file():
            raise OptionError(f"{path}: line {number} names a picture that is not there: {image!r}")
        questions.append(ExamQuestion(path.parent / image, prompt, answer.strip()))
    if not questions:
        raise OptionError(f"{path}: holds no questions")
    return questions


# ---- which files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Build:
    name: str
    text: ModelFile | None
    vision: ModelFile
    variant: str | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the text model and of the vision file."""
        return self.text.size if self.text else 0, self.vision.size


def _find_builds(
    reference: Model, others: Sequence[Model], notify: Notify | None
) -> tuple[_Build, list[_Build]]:
    models = [reference, *others]
    paths = [str(model.text if isinstance(model, ModelFiles) else model) for model in models]
    short = [Path(path).name.removesuffix(".gguf") or path for path in paths]
    first, *names = [
        name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)
    ]
    file = _as_file(reference)
    found = _with_partner(first, file, notify) if file else _from_model(first, reference, notify)
    variant = _named_variant(found) or default_variant(found.vision.merge_factor)
    found = replace(found, variant=variant)
    builds = []
    for name, other in zip(names, others, strict=True):
        file = _as_file(other)
        if file is None:
            build = _from_model(name, other, notify)
        elif file.kind == "vision":
            build = replace(found, name=name, vision=file, variant=None)
        else:
            build = replace(found, name=name, text=file)
        builds.append(_checked(build, found))
    return found, builds


def _as_file(model: Model) -> ModelFile | None:
    """The file, if the model is one file alone."""
    if isinstance(model, ModelFiles) or not Path(model).is_file():
        return None
    return inspect_file(Path(model))


def _from_model(name: str, model: Model, notify: Notify | None) -> _Build:
    files = model if isinstance(model, ModelFiles) else find_model(model, notify=notify)
    return _Build(name, inspect_file(files.text), inspect_file(files.mmproj), files.variant)


def _with_partner(name: str, file: ModelFile, notify: Notify | None) -> _Build:
    """The file and, of those beside it that fit, the one of its own quantization or the best."""
    tell = notify or (lambda message: None)
    beside = inspect_all(sorted(file.path.parent.glob("*.gguf")))[0]
    if file.kind == "vision":
        texts = [other for other in beside if other.kind == "text" and other.width == file.width]
        if not texts:
            tell(f"{file.path}: there is no text model beside it that fits; comparing vision alone")
            return _Build(name, None, file, None)
        text = best(texts, file.quantization, *TEXT_ORDER)
        tell(f"{file.path}: comparing it with the text model {text.path.name} beside it")
        return _Build(name, text, file, None)
    partners = fitting_vision(beside, file)
    if not partners:
        raise ModelFileError(
            f"{file.path}: there is no vision file beside it that fits; name a directory with both"
        )
    vision = best(partners, file.quantization, *VISION_ORDER)
    tell(f"{file.path}: comparing it with the vision file {vision.path.name} beside it")
    return _Build(name, file, vision, None)


def _checked(build: _Build, reference: _Build) -> _Build:
    """The build as it is to be loaded. Raises ModelFileError where it is of another model."""
    if reference.text is None:
        if build.text is not None and build.vision is reference.vision:
            raise ModelFileError(
                f"{build.text.path}: there is no text model to compare it with beside "
                f"{reference.vision.path}"
            )
        build = replace(build, text=None)
    a, b = reference.vision, build.vision
    problem = ""
    if _embedding_shape(a) != _embedding_shape(b):
        problem = "its image tokens are not as many and as wide as those of"
    elif _named_variant(build) not in (None, reference.variant):
        problem = f"has the prompt variant {_named_variant(build)}, unlike"
    elif reference.text and build.text:
        a, b = reference.text, build.text
        if a.width != b.width or _vocabulary(a) != _vocabulary(b):
            problem = "its width or vocabulary is not that of"
    if problem:
        raise ModelFileError(f"{b.path}: {problem} {a.path}; name builds of one model")
    return replace(build, variant=reference.variant)


def _named_variant(build: _Build) -> str | None:
    named = build.variant or build.vision.header.metadata.get("clip.omnivlm.prompt_variant")
    return None if named is None else str(named)


def _embedding_shape(vision: ModelFile) -> tuple[int, int]:
    patches = (vision.number("image_size") // vision.number("patch_size")) ** 2
    return patches // vision.merge_factor, vision.width


def _vocabulary(text: ModelFile) -> bytes:
    start, end = text.header.arrays.get("tokenizer.ggml.tokens", (0, 0))
    with text.path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


# ---- what they compute ---------------------------------------------------------------------------


_Encode: TypeAlias = "Callable[[ImageSource], ImageEmbedding]"
_Lead: TypeAlias = "tuple[tuple[ImageEmbedding, str, Answer], ImageEmbedding]"


@contextmanager
def _opened(
    build: _Build, device: str, n_threads: int | None, precision: str
) -> Iterator[tuple[_Encode, OmniVLM | None]]:
    """How the build encodes a picture, and the whole model where there is one. Nothing on disk."""
    if build.text is None:
        threads = check_threads(n_threads)
        path = build.vision.path
        encoder = PictureEncoder(
            path, select_device(device), threads, disk_cache=False, precision=precision
        )
        yield encoder.encode, None
        return
    with OmniVLM(
        build.text.path,
        build.vision.path,
        variant=build.variant,
        device=device,
        n_threads=n_threads,
        vision_precision=precision,
        disk_cache=False,
    ) as model:
        yield model.encode, model


def _vision_loss(
    reference: Sequence[ImageEmbedding], others: Sequence[ImageEmbedding]
) -> VisionLoss:
    cosines, errors = [], []
    for a, b in zip(_flat(reference), _flat(others), strict=True):
        cosines.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))  # 1 exactly where they are equal
        errors.append(float(np.linalg.norm(b - a) / np.linalg.norm(a)))
    return VisionLoss(
        cosine=float(np.mean(cosines)),
        worst_cosine=min(cosines),
        error=float(np.mean(errors)),
        worst_error=max(errors),
    )


def _flat(images: Sequence[ImageEmbedding]) -> Iterator[npt.NDArray[np.float64]]:
    return (image.data.astype(np.float64).ravel() for image in images)


def _text_losses(
    build: _Build, reference: OmniVLM, other: OmniVLM, led: Iterable[_Lead]
) -> tuple[TextLoss, TextLoss]:
    """The losses with the reference's embeddings, and with the other's own."""
    text: list[_Step] = []
    whole: list[_Step] = []
    for (image, prompt, answer), own in led:
        # The last of the tokens is predicted; so is the end, where the answer came to one.
        tokens = answer.tokens if answer.finish_reason == "stop" else answer.tokens[:-1]
        wanted = list(reference.logits_along(image, prompt, tokens))  # one answer's: 0.6 MB a token
        steps = _steps(wanted, other.logits_along(image, prompt, tokens))
        text += steps
        if not np.array_equal(image.data, own.data):
            steps = _steps(wanted, other.logits_along(own, prompt, tokens))
        whole += steps
    if not np.isfinite([kl for kl, _ in [*text, *whole]]).all():
        path = build.text.path if build.text else build.vision.path
        raise ModelFileError(f"{path}: computes no numbers; download or make it again")
    return _summary(text), _summary(whole)


_Step: TypeAlias = "tuple[float, bool]"  # KL divergence; whether the likeliest token is the same
_Logits: TypeAlias = "Iterable[npt.NDArray[np.float32]]"  # [n_vocab] for each position


def _steps(reference: _Logits, other: _Logits) -> list[_Step]:
    steps = []
    for a, b in zip(reference, other, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        kl = float(np.exp(p) @ (p - q))
        steps.append((max(kl, 0.0), bool(a.argmax() == b.argmax())))  # below 0 by rounding alone
    return steps


def _summary(steps: Sequence[_Step]) -> TextLoss:
    kls, same = zip(*steps, strict=True)
    return TextLoss(
        kl=float(np.mean(kls)),
        kl_p99=float(np.percentile(kls, 99)),
        top1=float(np.mean(same)),
        positions=len(steps),
    )


def _share_exact(
    build: _Build, model: OmniVLM | None, questions: Sequence[ExamQuestion]
) -> float | None:
    if model is None or not questions:
        return None
    right = [_answers(model, question) for question in _shown(questions, build, "questions")]
    return sum(right) / len(right)


def _answers(model: OmniVLM, question: ExamQuestion) -> bool:
    """Whether the model answers a question word by word; it is stopped where it begins to err."""
    text = ""
    with closing(model.generate(question.image, question.prompt)) as pieces:
        for piece in pieces:
            text += piece
            if not question.answer.startswith(text.strip()):
                return False
    return text.strip() == question.answer


def _shown(items: Sequence[_T], build: _Build, what: str) -> Iterable[_T]:
    return tqdm(items, desc=f"{build.name}: {what}", leave=False, disable=None)
