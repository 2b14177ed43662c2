"""Losses between builds: against other calculations, between known files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from PIL import Image

from command import run
from omnivlm_edge import (
    ExamQuestion,
    GenerateOptions,
    ImageError,
    ModelFileError,
    ModelFiles,
    OmniVLM,
    OmniVLMError,
    OptionError,
    compare_models,
    quantize_file,
)
from omnivlm_edge.compare import read_questions
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.device import select_device
from omnivlm_edge.gguf_header import read_header
from omnivlm_edge.made_pictures import made_pictures
from omnivlm_edge.models import find_model
from omnivlm_edge.sources import find_pictures

DEMO = find_model("demo")
EXAMPLES = Path(__file__).parents[1] / "examples"
HORSES = EXAMPLES / "horses.png"
CPU: Any = {"device": "cpu", "n_threads": 1}  # two wait for each other on a busy machine


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories F16, Q8_0 and Q4_0, each with the demo's two files in that type."""
    directory = tmp_path_factory.mktemp("builds")
    for name in ("F16", "Q8_0", "Q4_0"):
        (directory / name).mkdir()
        for source in (DEMO.text, DEMO.mmproj):
            output = directory / name / source.name.replace("F16", name)
            if name == "F16":
                shutil.copy(source, output)
            else:
                quantize_file(source, output, name, n_threads=2)
    return directory


def text_of(directory: Path) -> Path:
    return find_model(directory).text


def vision_of(directory: Path) -> Path:
    return find_model(directory).mmproj


# --- what is measured -----------------------------------------------------------------------------


def test_logits_along_are_llama_cpps_own() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 200, 80).tolist()  # more than are computed at once
    plain = llama_cpp.Llama(str(DEMO.text), n_ctx=128, logits_all=True, n_threads=1, verbose=False)
    plain.eval(tokens)
    want = plain.scores[4:80]
    decoder = TextDecoder(DEMO.text, select_device("cpu"), n_ctx=128, n_threads=1)
    sequence = decoder.open(GenerateOptions())
    found = list(decoder.logits_along(sequence, [tokens[:5]], tokens[5:]))
    np.testing.assert_allclose(found, want, atol=0.05)  # the cache is F16
    assert (np.argmax(found, axis=1) == np.argmax(want, axis=1)).mean() > 0.95
    plain.close()
    decoder.close()


def test_losses_are_those_of_another_calculation(builds: Path) -> None:
    prompts = ["Describe the image", "Is there an egg?"]
    pictures = [HORSES, EXAMPLES / "shopping.png"]
    _, loss = compare_models(
        "demo", [builds / "Q4_0"], pictures, prompts=prompts, max_tokens=9, **CPU
    )
    kls: dict[str, list[float]] = {"text": [], "whole": []}
    same: dict[str, list[bool]] = {"text": [], "whole": []}
    cosines, errors, ends = [], [], 0
    ggml = {**CPU, "vision_precision": "ggml"}
    with OmniVLM("demo", **ggml) as a, OmniVLM(builds / "Q4_0", **ggml) as b:
        for path in pictures:
            image, own = a.encode(path), b.encode(path)
            x, y = (e.data.astype(np.float64) for e in (image, own))
            cosines.append((x * y).sum() / (x**2).sum() ** 0.5 / (y**2).sum() ** 0.5)
            errors.append((((x - y) ** 2).sum() / (x**2).sum()) ** 0.5)
            for prompt in prompts:
                answer = a.answer(image, prompt, GenerateOptions(max_tokens=9))
                ended = answer.finish_reason == "stop"
                ends += ended
                for kind, seen in (("text", image), ("whole", own)):
                    for i in range(len(answer.tokens) + ended):  # each on its own
                        *_, p = map(probabilities, a.logits_along(image, prompt, answer.tokens[:i]))
                        *_, q = map(probabilities, b.logits_along(seen, prompt, answer.tokens[:i]))
                        kls[kind].append((p * np.log(p / q)).sum())
                        same[kind].append(p.argmax() == q.argmax())
    assert 0 < ends < 4  # answers that end, and answers that are cut off
    assert loss.vision is not None
    assert loss.vision.cosine == pytest.approx(np.mean(cosines), abs=1e-9)
    assert loss.vision.worst_cosine == pytest.approx(min(cosines), abs=1e-9)
    assert loss.vision.error == pytest.approx(np.mean(errors), rel=1e-6)
    assert loss.vision.worst_error == pytest.approx(max(errors), rel=1e-6)
    for kind, found in (("text", loss.text), ("whole", loss.whole)):
        assert found is not None
        assert found.positions == len(kls[kind])
        # The cache's F16 and the batches differ a little.
        assert found.kl == pytest.approx(np.mean(kls[kind]), rel=0.1, abs=1e-4)
        assert found.kl_p99 == pytest.approx(np.percentile(kls[kind], 99), rel=0.1, abs=1e-4)
        assert found.top1 == np.mean(same[kind])


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())


def test_a_model_against_itself_loses_nothing_at_all(builds: Path) -> None:
    prompts = ["Is there a duck?", "Is there a duck in the picture?", "Describe the image"]
    reference, loss = compare_models(
        "demo", [builds / "F16"], [HORSES], prompts=prompts, max_tokens=40, **CPU
    )
    assert (reference.vision, reference.text, reference.whole, reference.exact) == (None,) * 4
    assert loss.vision is not None
    assert (loss.vision.cosine, loss.vision.worst_cosine) == (1, 1)
    assert (loss.vision.error, loss.vision.worst_error) == (0, 0)
    assert loss.text == loss.whole
    assert loss.text is not None
    assert (loss.text.kl, loss.text.kl_p99, loss.text.top1) == (0, 0, 1)


def test_fewer_bits_lose_more_over_the_made_pictures(builds: Path) -> None:
    a, q8, q4 = compare_models("demo", [builds / "Q8_0", builds / "Q4_0"], max_tokens=8, **CPU)
    assert [a.name, q8.name, q4.name] == ["demo", "Q8_0", "Q4_0"]
    for loss, name in ((a, "F16"), (q8, "Q8_0"), (q4, "Q4_0")):
        assert loss.text_bytes == text_of(builds / name).stat().st_size
        assert loss.vision_bytes == vision_of(builds / name).stat().st_size
    assert q8.vision and q8.text and q8.whole and q4.vision and q4.text and q4.whole
    assert 1 > q8.vision.cosine > q4.vision.cosine > 0.9
    assert q8.vision.worst_cosine > q4.vision.worst_cosine
    assert 0 < q8.vision.error < q4.vision.error < q4.vision.worst_error
    assert 0 < q8.text.kl < q4.text.kl < q4.text.kl_p99
    assert 0 < q8.whole.kl < q4.whole.kl
    assert q8.text.top1 > 0.95


def test_an_ocr_model_reads_each_picture_once(tiny_ocr_model: Path) -> None:
    pictures = [HORSES, HORSES]
    _, loss = compare_models(
        tiny_ocr_model, [tiny_ocr_model], pictures, prompts=["a", "b"], max_tokens=3, **CPU
    )
    assert loss.text is not None
    assert loss.text.positions <= 3 * len(pictures)


# --- which files ----------------------------------------------------------------------------------


def test_the_other_half_of_one_file_is_the_references(builds: Path) -> None:
    text, vision = text_of(builds / "Q4_0"), vision_of(builds / "Q4_0")
    a, of_text, of_vision = compare_models("demo", [text, vision], [HORSES], max_tokens=6, **CPU)
    assert of_text.name == text.stem
    assert (of_text.text_bytes, of_text.vision_bytes) == (text.stat().st_size, a.vision_bytes)
    assert of_text.vision is not None and of_text.vision.error == 0
    assert of_text.text == of_text.whole
    assert of_text.text is not None and of_text.text.kl > 0
    assert (of_vision.text_bytes, of_vision.vision_bytes) == (a.text_bytes, vision.stat().st_size)
    assert of_vision.vision is not None and of_vision.vision.error > 0
    assert of_vision.text is not None and of_vision.text.kl == 0
    assert of_vision.whole is not None and of_vision.whole.kl > 0


def test_files_side_by_side(builds: Path, tmp_path: Path) -> None:
    """As `quantize` leaves them: every type of both files in one directory."""
    for path in builds.glob("*/*.gguf"):
        shutil.copy(path, tmp_path)
    told: list[str] = []
    a, b = compare_models(
        tmp_path / "demo-F16.gguf",
        [tmp_path / "demo-Q4_0.gguf"],
        [HORSES],
        max_tokens=3,
        notify=told.append,
        **CPU,
    )
    assert [a.name, b.name] == ["demo-F16", "demo-Q4_0"]
    assert a.vision_bytes == b.vision_bytes == DEMO.mmproj.stat().st_size
    assert "mmproj-demo-F16.gguf" in told[0]
    a, b = compare_models(
        tmp_path / "mmproj-demo-Q8_0.gguf",
        [ModelFiles(tmp_path / "demo-Q4_0.gguf", tmp_path / "mmproj-demo-Q4_0.gguf")],
        [HORSES],
        max_tokens=3,
        notify=told.append,
        **CPU,
    )
    assert "demo-Q8_0.gguf" in told[1]
    assert a.text_bytes == (tmp_path / "demo-Q8_0.gguf").stat().st_size
    assert b.name == "demo-Q4_0"
    assert b.text is not None


def test_vision_files_alone(builds: Path, tmp_path: Path) -> None:
    vision = shutil.copy(DEMO.mmproj, tmp_path)
    others = [vision_of(builds / "Q4_0"), builds / "Q8_0"]
    a, *losses = compare_models(vision, others, [HORSES], **CPU)
    assert a.text_bytes == 0
    for loss in losses:
        assert (loss.text_bytes, loss.text, loss.whole) == (0, None, None)
        assert loss.vision is not None and loss.vision.error > 0
    with pytest.raises(ModelFileError, match="no text model to compare it with"):
        compare_models(vision, [text_of(builds / "Q4_0")], [HORSES], **CPU)
    question = ExamQuestion(HORSES, "Is there a duck?", "Yes")
    with pytest.raises(OptionError, match="cannot answer questions"):
        compare_models(vision, others, [HORSES], questions=[question], **CPU)


def test_other_models_are_refused(tiny_model: Path, tiny_ocr_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="image tokens are not as many and as wide"):
        compare_models("demo", [tiny_model], [HORSES], **CPU)
    with pytest.raises(ModelFileError, match="width or vocabulary"):
        compare_models("demo", [text_of(tiny_model)], [HORSES], **CPU)
    with pytest.raises(ModelFileError, match="prompt variant vlm-81-ocr, unlike"):
        compare_models(tiny_model, [tiny_ocr_model], [HORSES], **CPU)
    other = Path(shutil.copy(DEMO.text, tmp_path / "other.gguf"))
    start, end = read_header(other).arrays["tokenizer.ggml.tokens"]
    content = bytearray(other.read_bytes())
    assert content[end - 1] != ord("x")
    content[end - 1] = ord("x")
    other.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"other\.gguf: .* vocabulary .* one model"):
        compare_models("demo", [other], [HORSES], **CPU)


def test_a_model_that_computes_no_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(text_of(tiny_model), tmp_path))
    tensors = gguf.GGUFReader(broken, "r+").tensors
    (norm,) = (tensor for tensor in tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    norm.data.flush()
    with pytest.raises(ModelFileError, match="computes no numbers"):
        compare_models(tiny_model, [broken], [HORSES], max_tokens=2, **CPU)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"others": ["no such model"]}, ModelFileError, "no such file or directory"),
        ({"others": [HORSES]}, ModelFileError, "not a GGUF file"),
        ({"pictures": []}, OptionError, "at least one picture"),
        ({"prompts": []}, OptionError, "at least one picture and one prompt"),
        ({"max_tokens": 0}, OptionError, "max_tokens"),
        ({"pictures": ["absent.png"]}, ImageError, "no such file"),
        ({"device": "cuda9"}, OmniVLMError, "does not exist here"),
    ],
)
def test_what_cannot_be_measured(
    change: dict[str, Any], error: type[OmniVLMError], message: str
) -> None:
    arguments = {"reference": "demo", "others": ["demo"], "pictures": [HORSES], **CPU} | change
    with pytest.raises(error, match=message):
        compare_models(**arguments)


# --- questions ------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_questions_are_answered_word_by_word_or_wrong(builds: Path, tmp_path: Path) -> None:
    shutil.copy(HORSES, tmp_path / "a.png")
    (tmp_path / "exam").mkdir()
    ask = {"image": "../a.png", "prompt": "Is there a duck?"}
    answers = [" Yes, there is one duck. ", "Yes, there is one duck", "Yes, there are two ducks."]
    file = write_lines(tmp_path / "exam" / "q.jsonl", *({**ask, "answer": a} for a in answers))
    file.write_text("\n" + file.read_text() + "  \n")
    questions = read_questions(file)
    assert questions[0].answer == answers[0].strip()
    losses = compare_models(
        "demo", [builds / "Q8_0"], [HORSES], max_tokens=1, questions=questions, **CPU
    )
    assert [loss.exact for loss in losses] == [1 / 3, 1 / 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no questions"),
        (b"\n{\n", "line 2 is no JSON object"),
        (b"[" * 100_000, "line 1 is no JSON object"),
        (b"3", "line 1 is no JSON object"),
        (b'{"image": "a.png", "prompt": "?"}', "with the texts image, prompt and answer"),
        (b'{"image": "a.png", "prompt": "?", "answer": 3}', "line 1 is no JSON object"),
        (b'{"image": "b.png", "prompt": "?", "answer": "!"}', "names a picture that is not there"),
        (b'{"image": "\\u0000", "prompt": "?", "answer": "!"}', "a picture that is not there"),
        (
            '{"image": "a\u2028b.png", "prompt": "?", "answer": "!"}'.encode(),
            "not there: 'a.u2028b",
        ),
        (b"\xff", "cannot be read"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").touch()
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_questions(file)
    with pytest.raises(OptionError, match="cannot be read"):
        read_questions(tmp_path)


# --- pictures -------------------------------------------------------------------------------------


def test_made_pictures_are_the_same_ones_with_the_spectrum_of_photographs() -> None:
    pictures, again = made_pictures(), made_pictures(3)
    arrays = [np.asarray(picture.image) for picture in pictures]
    for array, other in zip(arrays, again, strict=False):
        np.testing.assert_array_equal(array, other.image)
    assert len({array.tobytes() for array in arrays}) == len(pictures) == 8
    for array in arrays:
        grey = array.mean(axis=2)
        amplitude = abs(np.fft.fft2(grey - grey.mean()))
        frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(512)] * 2))
        inner = (frequency > 0.01) & (frequency < 0.3)
        slope, _ = np.polyfit(np.log(frequency[inner]), np.log(amplitude[inner]), 1)
        assert -1.6 < slope < -0.8


def test_pictures_of_a_directory(tmp_path: Path) -> None:
    for name in ("10.PNG", "2.jpg", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    assert find_pictures(str(tmp_path)) == [str(tmp_path / "2.jpg"), str(tmp_path / "10.PNG")]
    assert find_pictures(str(tmp_path / "*.txt")) == [str(tmp_path / "notes.txt")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no pictures"):
        find_pictures(str(tmp_path / "empty"))


# --- the command ----------------------------------------------------------------------------------


def test_the_command(builds: Path, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "q.jsonl",
        {"image": str(HORSES), "prompt": "Is there a duck?", "answer": "Yes, there is one duck."},
    )
    plot = tmp_path / "plot.png"
    arguments = ("compare", "demo", builds / "Q8_0", builds / "Q4_0", "-n", 4, "-t", 1)
    arguments += ("--device", "cpu", "--images", EXAMPLES, "--questions", file)
    shown = run(*arguments, "--plot", plot)
    assert (shown.returncode, shown.stderr) == (0, "")
    header, *rows, conditions = shown.stdout.splitlines()
    assert header.split()[:5] == ["model", "MB", "cosine", "worst", "error"]
    assert [row.split()[0] for row in rows] == ["demo", "Q8_0", "Q4_0"]
    assert [row.split()[-1] for row in rows] == ["100.0%"] * 3
    assert {len(row) for row in rows} == {len(header)}
    assert conditions == (
        'Over 2 pictures; 8 next tokens along A\'s answers to "Describe the image"; 1 question.'
    )
    with Image.open(plot) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1200, 525))

    result = json.loads(run(*arguments, "--json").stdout)
    assert result["reference"]["exact"] == 1
    assert result["pictures"] == [str(EXAMPLES / "horses.png"), str(EXAMPLES / "shopping.png")]
    assert result["prompts"] == ["Describe the image"]
    assert (result["max_tokens"], result["questions"]) == (4, 1)
    losses = result["builds"]
    assert losses[0].keys() == {
        *("name", "text_bytes", "vision_bytes", "vision", "text", "whole", "exact")
    }
    assert losses[0]["vision"].keys() == {"cosine", "worst_cosine", "error", "worst_error"}
    assert losses[0]["text"].keys() == {"kl", "kl_p99", "top1", "positions"}
    assert rows[1].split()[2] == f"{losses[0]['vision']['cosine']:.6f}"


def test_made_pictures_are_named_and_vision_alone_has_a_small_table(
    builds: Path, tmp_path: Path
) -> None:
    vision = shutil.copy(DEMO.mmproj, tmp_path)
    shown = run(
        "compare", vision, vision_of(builds / "Q4_0"), "-t", 1, "--plot", tmp_path / "p.png"
    )
    assert shown.returncode == 0
    assert "comparing vision alone" in shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["model", "MB", "cosine", "worst", "error"]
    assert lines[-1] == "Over 8 made pictures (coloured noise with shapes)."
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_plot_of_builds_of_one_size_shows_them_as_such(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from omnivlm_edge import plot

    axes = Figure().subplots()
    plot._draw(axes, [("plain", 2.835776, 0.0018), ("led", 2.835968, 0.0009)], "MB", "error")
    low, high = axes.get_xlim()
    assert low < 2.6
    assert high > 3.1


def hide_matplotlib(directory: Path) -> dict[str, str]:
    (directory / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo"], 2, "Missing argument 'B...'"),
        (["demo", "demo", "-n", 0], 2, "-n"),
        (["demo", "demo", "--plot", "p.svg"], 2, "must end in .png"),
        (["demo", "demo", "--plot", "absent/p.png"], 1, "absent/p.png: cannot be written"),
        (["demo", "demo", "--questions", "absent.jsonl"], 1, "absent.jsonl: cannot be read"),
        (["demo", "demo", "--images", "absent.png"], 1, "absent.png: there is no such file"),
    ],
)
def test_wrong_usage(arguments: list[object], code: int, message: str) -> None:
    shown = run("compare", *arguments)
    assert (shown.returncode, shown.stdout) == (code, "")
    assert message in shown.stderr


def test_a_plot_needs_matplotlib(tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    shown = run("compare", "demo", "demo", "--plot", plot, **hide_matplotlib(tmp_path))
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == (
        'Error: a plot needs matplotlib, which is not installed: pip install "omnivlm-edge[plot]"\n'
    )
    assert not plot.exists()
