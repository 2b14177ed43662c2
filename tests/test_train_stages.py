"""The stages of the training, on a model of no use that takes seconds."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnivlm_edge import GenerateOptions, OmniVLM
from omnivlm_edge.convert import convert_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("default"),  # torch and its companions deprecate things of their own
]
MICRO = ROOT / "train" / "configs" / "micro.toml"
STAGES = ("tower", "language", "pretrain", "sft", "dpo")


@pytest.fixture(scope="module")
def stages() -> Iterator[SimpleNamespace]:
    """The modules of train/, imported late: without torch all tests must still be collected."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more is slower at this size, and waits when others compute
    names = (
        *("ablation", "answers", "config", "correction", "data", "demo", "dpo", "drawings"),
        *("language", "loop", "model", "muon", "pretrain", "questions", "scenes", "sft"),
        *("tokenizer", "tower"),
    )
    yield SimpleNamespace(torch=torch, **{name: __import__(name) for name in names})
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def micro(stages: SimpleNamespace) -> Any:
    return stages.config.load_config(MICRO)


@pytest.fixture(scope="module")
def done(stages: SimpleNamespace, micro: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all stages, from nothing to GGUF files.

    What so small a model samples no teacher can read: it borrows its answers from other scenes.
    """
    out = tmp_path_factory.mktemp("micro")
    answer, borrowed = (
        stages.model.OmniVLM.answer,
        stages.data.Scenes(micro, 126, "train", stream=8),
    )

    def sampled(model: Any, pixels: Any, asked: list[str], *args: Any, **kwargs: Any) -> list[str]:
        if not kwargs.get("temperature"):
            return answer(model, pixels, asked, *args, **kwargs)
        scene, rng = borrowed.scene(len(asked))
        language = "en" if asked[0].isascii() else "zh"
        return [stages.questions.description(scene, rng, language) for _ in asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.model.OmniVLM, "answer", sampled)
        stages.demo.run(micro, out)
    return out


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def same(stages: SimpleNamespace, a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(stages.torch.equal(a[name], b[name]) for name in a)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def equal(stages: SimpleNamespace, a: Any, b: Any) -> bool:
    """Of nested tensors, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(stages, a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(stages, x, y) for x, y in zip(a, b, strict=True))
    return stages.torch.equal(a, b) if isinstance(a, stages.torch.Tensor) else a == b


# --- all stages -----------------------------------------------------------------------------------


def test_the_result_runs(done: Path) -> None:
    for folder, type_ in (("gguf", "F16"), ("gguf-q8_0", "Q8_0")):
        names = {file.name for file in (done / folder).iterdir()}
        assert names == {f"demo-{type_}.gguf", f"mmproj-demo-{type_}.gguf"}
        with OmniVLM(done / folder) as model:
            model.answer(Image.new("RGB", (64, 64)), "What is it?", GenerateOptions(max_tokens=4))


def test_a_second_run_finds_everything_there(
    stages: SimpleNamespace, micro: Any, done: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file()}
    stages.demo.run(micro, done)
    after = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file()}
    assert before == after


def test_the_loss_falls(done: Path) -> None:
    for stage in STAGES[:-1]:
        losses = [line["loss"] for line in log(done / stage) if "loss" in line]
        assert len(losses) == 12
        assert np.mean(losses[-3:]) < np.mean(losses[:3]), stage
    lines = [line for line in log(done / "dpo") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    preference = lines[0]["loss"] - lines[0]["chosen_loss"]  # the micro model's anchor is 1
    assert preference == pytest.approx(np.log(2), abs=1e-4)


def test_logs_tell_throughput_and_accuracy_and_have_curves(done: Path) -> None:
    told = {stage: set().union(*log(done / stage)) for stage in STAGES}
    assert all("pictures_per_second" in told[stage] for stage in STAGES)
    assert {"val_thing", "val_centre", "val_number", "val_retrieval"} <= told["tower"]
    for stage in ("language", "sft"):
        assert "val_loss" in told[stage]
        kinds = {name.rsplit("_", 1)[0] for name in told[stage] if name.endswith(("_en", "_zh"))}
        assert {"decision", "count", "caption"} <= kinds  # of few pictures, each in one language
    assert {"hallucinated", "recall", "faultless", "val_loss"} <= told["dpo"]
    assert all((done / stage / "curves.png").read_bytes()[1:4] == b"PNG" for stage in STAGES)


def test_frozen_parts_are_unchanged(stages: SimpleNamespace, done: Path) -> None:
    state = {stage: weights(done / stage / "model") for stage in STAGES}
    tower = {k: v for k, v in state["tower"].items() if not k.startswith("head.")}
    projector, language = "multi_modal_projector.", "language_model."
    for stage in ("pretrain", "sft", "dpo"):
        kept = part(state[stage], "vision_tower.vision_model.")
        assert same(stages, kept, {k.removeprefix("vision_model."): v for k, v in tower.items()})
    assert same(stages, part(state["pretrain"], language), state["language"])
    for a, b, prefix in (
        ("pretrain", "sft", projector),
        ("pretrain", "sft", language),
        ("sft", "dpo", projector),
        ("sft", "dpo", language),
    ):
        before, after = part(state[a], prefix), part(state[b], prefix)
        changed = [name for name in before if not stages.torch.equal(before[name], after[name])]
        assert changed == list(before), (a, b, prefix)


def test_pairs_differ_only_at_the_edits(stages: SimpleNamespace, micro: Any, done: Path) -> None:
    rows = [json.loads(line) for line in (done / "dpo" / "pairs.jsonl").read_text().splitlines()]
    pairs = [row for row in rows if "chunk" not in row]
    scenes = stages.data.Scenes(micro, 126, "train", stream=stages.dpo.STREAM)
    for pair in pairs:
        scene, _ = scenes.scene(pair["picture"])
        assert pair["chosen"] != pair["rejected"]
        corrected = stages.correction.correct(scene, pair["rejected"], pair["language"])
        assert pair["chosen"] == corrected
        assert stages.correction.correct(scene, corrected, pair["language"]) == corrected
        named = stages.dpo.LANGUAGES[pair["language"]].mentions
        assert named(pair["rejected"]) - set(scene.counts)
        assert not named(pair["chosen"]) - set(scene.counts)
    told = json.loads((done / "dpo" / "pairs.json").read_text())
    assert told["pairs"] == len(pairs) and told["answers"] == 2 * micro.dpo.pictures
    assert told["words_changed_mean"] > 0


def test_pairs_of_another_model_or_other_settings_are_refused(
    stages: SimpleNamespace, micro: Any, done: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft").symlink_to(done / "sft")
    (tmp_path / "dpo").mkdir()
    made_with = json.loads((done / "dpo" / "made_with.json").read_text())
    file = tmp_path / "dpo" / "made_with.json"
    file.write_text(json.dumps(made_with))
    other = dataclasses.replace(micro, dpo=dataclasses.replace(micro.dpo, pictures=5))
    with pytest.raises(stages.config.TrainError, match="dpo was made with other .*; delete it"):
        stages.dpo.run(other, tmp_path)
    file.write_text(json.dumps(made_with | {"model": "another"}))
    with pytest.raises(stages.config.TrainError, match="model was another, is .*; delete it"):
        stages.dpo.run(micro, tmp_path)


def test_the_loss_is_anchored_on_the_chosen_answer(
    stages: SimpleNamespace, micro: Any, done: Path
) -> None:
    rows = [json.loads(line) for line in (done / "dpo" / "pairs.jsonl").read_text().splitlines()]
    pairs = [stages.dpo.Preference(**row) for row in rows if "chunk" not in row][:4]
    model = stages.model.load_checkpoint(done / "sft" / "model").eval()
    task = stages.dpo.DpoTask(model, micro, 0.0, None)  # without a preference
    batch = task.moved(list(map(stages.dpo.PairRows(pairs, micro, model).at, range(len(pairs)))))
    with stages.torch.no_grad():
        loss, numbers = task(batch)
        known, tokens = task.log_probabilities(batch)
    for pair, count in zip(pairs, tokens.tolist(), strict=True):
        ids = [len(model.tokenizer.encode(text).ids) for text in (pair.chosen, pair.rejected)]
        assert count == [n + 1 for n in ids]  # and the end
    surprise = float((-known[:, 0] / tokens[:, 0]).mean())
    assert float(numbers["chosen_loss"]) == pytest.approx(surprise)
    assert float(loss) == pytest.approx(np.log(2) + micro.dpo.anchor * surprise, rel=1e-4)


def test_the_distance_of_a_pair_is_counted_in_words(stages: SimpleNamespace) -> None:
    assert stages.dpo.edits("two red cars here.", "two blue cars here.", "en") == 1
    assert stages.dpo.edits("图中有两匹马。", "图中有三匹马。", "zh") == 1
    assert stages.dpo.edits("a horse and a cow", "a horse", "en") == 3


def test_the_grid_is_chosen_by_hallucinations_that_cost_no_recall(stages: SimpleNamespace) -> None:
    choose = stages.dpo.choose
    results = {
        "careful": {"hallucinated": 0.1, "recall": 0.80, "val_loss": 0.1},
        "good": {"hallucinated": 0.2, "recall": 0.895, "val_loss": 0.5},
        "idle": {"hallucinated": 0.4, "recall": 0.90, "val_loss": 0.7},
    }
    assert choose(results, 0.9) == "good"
    assert choose(results, 0.99) == "idle"
    assert choose(results, None) == "careful"


def test_styles_of_the_configuration(stages: SimpleNamespace, micro: Any) -> None:
    def styled(*styles: str) -> Any:
        data = dataclasses.replace(micro.data, styles=styles)
        return dataclasses.replace(micro, data=data)

    for styles, problem in ((("noto", "twemoji"), "for tests alone"), (("oil",), "no style 'oil'")):
        with pytest.raises(stages.config.TrainError, match=problem):
            stages.data.Scenes(styled(*styles), 126, "train")


def test_a_share_of_the_training_pictures_is_drilled(stages: SimpleNamespace, micro: Any) -> None:
    def kinds(drawn: Any, picture: int) -> set[str]:
        return {question.kind for question in drawn(picture)[1]}

    drawn = stages.data.Scenes(micro, 28, "train", relation_share=0.25)
    drilled = [i for i in range(40) if kinds(drawn, i) == {"caption", "relation"}]
    assert drilled == list(range(3, 40, 4))
    plain, check = (
        stages.data.Scenes(micro, 28, split, relation_share=share)
        for split, share in (("train", 0.0), ("validation", 1.0))
    )
    assert len(kinds(check, 0)) > 2
    for picture in range(3):  # the others are as without a drill
        (seen, asked), (expected, questions) = drawn(picture), plain(picture)
        assert np.array_equal(seen, expected) and asked == questions
    learnt, held_out = stages.data.open_sources(micro, micro.sft, 28, (), 3, 1.0)
    assert kinds(learnt, 0) == {"caption", "relation"} != kinds(held_out, 0)


def test_icons_are_drawn(tmp_path: Path, stages: SimpleNamespace) -> None:
    square = {"body": '<path fill="#f00" d="M4 4h8v8H4z"/>'}
    names = {thing.one.replace(" ", "-") for thing in stages.scenes.THINGS}
    icons = {name: square for name in names | set(stages.drawings._ICONS.values())}
    known = {"icons": icons, "aliases": {"lion": {"parent": "lion-face"}}, "width": 16}
    icons["lion-face"] = icons.pop("lion") | {"width": 32, "height": 32}
    text = json.dumps(known).encode()
    with tarfile.open(tmp_path / "icons.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    stages.drawings.unpack(stages.drawings.PACKAGES["fluent"], tmp_path / "icons.tgz", tmp_path)
    for name, box in (("1f40e", (32, 32, 96, 96)), ("1f981", (16, 16, 48, 48))):  # horse, lion
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.getbbox() == box
            assert image.getpixel(box[:2]) == (255, 0, 0, 255)


# --- going on -------------------------------------------------------------------------------------


def interrupt_after(
    stages: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, number: int, run: Callable[[], None]
) -> None:
    """The run gets a signal in its step `number` (from 1), and ends with a checkpoint."""
    plain = stages.loop.Average.update

    def update(average: Any, step: int) -> None:
        plain(average, step)
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stages.loop.Average, "update", update)
        with pytest.raises(stages.loop.Stopped) as stopped:
            run()
    assert stopped.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    stages: SimpleNamespace,
    micro: Any,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    for other in ("tokenizer", *STAGES[: STAGES.index(stage)]):
        (tmp_path / other).symlink_to(done / other)
    if stage == "dpo":  # what comes before the long run is there
        (tmp_path / "dpo").mkdir()
        for name in ("pairs.jsonl", "reference.pt", "grid"):
            (tmp_path / "dpo" / name).symlink_to(done / "dpo" / name)
    run = getattr(stages, stage).run
    step = 3 if stage == "dpo" else 7
    interrupt_after(stages, monkeypatch, step, lambda: run(micro, tmp_path))
    assert not (tmp_path / stage / "model").exists()
    run(micro, tmp_path)
    torch = stages.torch
    states = [torch.load(out / stage / "state.pt", weights_only=True) for out in (done, tmp_path)]
    assert equal(stages, *states)
    assert same(stages, *(weights(out / stage / "model") for out in (done, tmp_path)))
    quick = {"pictures_per_second", "time"}
    logs = [
        [{k: v for k, v in line.items() if k not in quick} for line in log(out / stage)]
        for out in (done, tmp_path)
    ]
    assert logs[0] == logs[1]


def test_a_trial_that_was_killed_before_its_result_is_measured_again(
    stages: SimpleNamespace, micro: Any, done: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft").symlink_to(done / "sft")
    shutil.copytree(done / "dpo", tmp_path / "dpo")
    results = sorted((done / "dpo" / "grid").glob("*/model"))
    assert results
    for result in results:
        (tmp_path / result.relative_to(done)).unlink()
    shutil.rmtree(tmp_path / "dpo" / "model")
    stages.dpo.run(micro, tmp_path)
    for result in results:
        again = json.loads((tmp_path / result.relative_to(done)).read_text())
        assert again == pytest.approx(json.loads(result.read_text()))


def test_accumulated_and_lora_runs_resume_too(
    stages: SimpleNamespace,
    micro: Any,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dataclasses.replace(micro.sft, accumulate=2, batch=2, steps=4)
    config = dataclasses.replace(
        micro,
        sft=settings,
        lora=stages.config.Lora(rank=4, dropout=0.1),
        data=dataclasses.replace(micro.data, workers=1),
    )
    for out in ("once", "twice"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "pretrain").symlink_to(done / "pretrain")
    stages.sft.run(config, tmp_path / "once")
    twice = tmp_path / "twice"
    interrupt_after(stages, monkeypatch, 2, lambda: stages.sft.run(config, twice))
    stages.sft.run(config, twice)
    results = [weights(tmp_path / out / "sft" / "model") for out in ("once", "twice")]
    assert same(stages, *results)
    # LoRA's updates are part of the matrices: names as ever, embeddings as before
    before = weights(done / "pretrain" / "model")
    assert results[0].keys() == before.keys()
    changed = {name for name in before if not stages.torch.equal(before[name], results[0][name])}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed
    assert "language_model.model.embed_tokens.weight" not in changed


def test_asking_goes_on_after_the_last_whole_chunk(
    stages: SimpleNamespace,
    micro: Any,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stages.dpo, "CHUNK", 4)
    model = stages.model.load_checkpoint(done / "sft" / "model")
    for out in ("whole", "parts"):
        (tmp_path / out).mkdir()
    whole = stages.dpo.collect(model, micro, tmp_path / "whole")
    ask, asked = stages.dpo.ask, []

    def fail(model: Any, scenes: Any, pictures: Any, settings: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(pictures)
        return ask(model, scenes, pictures, settings)

    monkeypatch.setattr(stages.dpo, "ask", fail)
    with pytest.raises(KeyboardInterrupt):
        stages.dpo.collect(model, micro, tmp_path / "parts")
    monkeypatch.setattr(stages.dpo, "ask", ask)
    stages.torch.rand(7)
    assert stages.dpo.collect(model, micro, tmp_path / "parts") == whole


# --- rows and answers -----------------------------------------------------------------------------


def test_a_pair_in_a_row_is_computed_as_if_it_stood_alone(
    stages: SimpleNamespace, micro: Any, done: Path
) -> None:
    model = stages.model.load_checkpoint(done / "sft" / "model")
    rows = stages.data.Rows(model.tokenizer, model.image_tokens)
    pixels, pairs = stages.data.Scenes(micro, 126, "train")(0)
    pixels = stages.torch.from_numpy(pixels.copy())
    image = model.project(model.patches(pixels[None])).detach()
    model.requires_grad_(False)
    decode = stages.answers.decoder_of(model, False)

    def losses(asked: list[Any]) -> list[float]:
        row, placed = rows.row(rows.picture, asked, micro.data.tokens)
        tensor = stages.torch.from_numpy(row["row"])[None]
        loss, _ = stages.answers.token_losses(model, decode, image, tensor)
        segments = tensor[:, 1]
        return [float(loss[segments == s].sum()) for s in range(1, len(placed) + 1)]

    together = losses(pairs)
    assert len(together) > 3
    placed = rows.row(rows.picture, pairs, micro.data.tokens)[1]
    alone = [losses([pair])[0] for pair in placed]
    assert together == pytest.approx(alone, rel=1e-4)


def test_answers_do_not_depend_on_their_company(
    stages: SimpleNamespace, micro: Any, done: Path
) -> None:
    model = stages.model.load_checkpoint(done / "sft" / "model")
    scenes = stages.data.Scenes(micro, 126, "train")
    drawn = [scenes(i) for i in range(3)]
    pixels = stages.torch.from_numpy(np.stack([picture for picture, _ in drawn]))
    asked = [pairs[0].question for _, pairs in drawn] + [drawn[0][1][1].question]
    which = [0, 1, 2, 0]
    together = model.answer(pixels, asked, which, limit=12, batch=3)
    alone = [
        model.answer(pixels[i : i + 1], [question], limit=12)[0]
        for i, question in zip(which, asked, strict=True)
    ]
    assert together == alone
    sampled = []
    for _ in range(2):
        stages.torch.manual_seed(3)
        sampled.append(model.answer(pixels, asked, which, limit=12, temperature=1.0))
    assert sampled[0] == sampled[1] != together


def test_the_tokenizer_cuts_chinese_at_its_words(stages: SimpleNamespace, done: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(done / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode("有两只兔子。").ids
    pieces = [tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == "有两只兔子。"
    assert pieces[:2] == ["有", "两"]


# --- LLaVA's format and the real classes ----------------------------------------------------------


@pytest.fixture
def llava(tmp_path: Path, stages: SimpleNamespace, micro: Any) -> Path:
    """A file of captions, one of questions and one of preferences, with their pictures."""
    scenes = stages.data.Scenes(micro, 126, "train", stream=9)
    (tmp_path / "images").mkdir()
    questions, preferences = [], []
    for i in range(12):
        scene, rng = scenes.scene(i)
        name = f"{i}.{'png' if i % 2 else 'jpg'}"
        stages.scenes.render(scene, 150).resize((200, 120)).save(tmp_path / "images" / name)
        turns = []
        for n, pair in enumerate(scenes.asked(scene, rng)[:3]):
            asked = f"{'' if n else '<image>' + chr(10)}{pair.question}"
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": pair.answer}]
        questions.append({"id": str(i), "image": name, "conversations": turns})
        pair = {"chosen": pair.answer, "rejected": "A fish.", "question": pair.question}
        preferences.append({"image": name} | pair)
    questions.append({"id": "text", "conversations": turns[:2]})  # as in LLaVA's mix
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "preferences.json").write_text(json.dumps(preferences))
    return tmp_path


def real_towers(folder: Path, done: Path) -> None:
    """Tiny checkpoints of the real classes, as the real ones lie in their directories."""
    import torch
    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2Tokenizer,
        SiglipConfig,
        SiglipModel,
    )

    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    both = SiglipConfig(
        vision_config=small | {"intermediate_size": 48, "image_size": 130, "patch_size": 14},
        text_config=small | {"intermediate_size": 48, "projection_size": 32, "vocab_size": 64},
    )
    SiglipModel(both).save_pretrained(folder / "siglip")
    tokenizer = Qwen2Tokenizer.from_pretrained(done / "tokenizer")
    tokenizer.save_pretrained(folder / "qwen2")
    text = Qwen2Config(
        **small,
        intermediate_size=64,
        num_key_value_heads=1,
        vocab_size=1040,  # the real one, too, has more rows than tokens
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    Qwen2ForCausalLM(text).to(torch.bfloat16).save_pretrained(folder / "qwen2")


def test_real_towers_and_llavas_format_through_all_stages(
    stages: SimpleNamespace, done: Path, llava: Path
) -> None:
    real_towers(llava, done)
    text = (ROOT / "train" / "configs" / "omnivision.toml").read_text()
    for old, new in (
        ("siglip-so400m-patch14-384", str(llava / "siglip")),
        ("Qwen2.5-0.5B-Instruct", str(llava / "qwen2")),
        ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", str(llava / "questions.json")),
        ("LLaVA-Instruct/llava_v1_5_mix665k.json", str(llava / "questions.json")),
        ("RLAIF-V/pairs.json", str(llava / "preferences.json")),
        ("LLaVA-Pretrain/images", str(llava / "images")),
        ("LLaVA-Instruct/images", str(llava / "images")),
        ("RLAIF-V/images", str(llava / "images")),
    ):
        assert f'"{old}"' in text
        text = text.replace(f'"{old}"', f'"{new}"')
    file = llava / "real.toml"
    file.write_text(text)
    config = stages.config.load_config(file)
    short = {"steps": 3, "batch": 2, "accumulate": 2, "log_every": 1, "validation": 2}
    config = dataclasses.replace(
        config,
        precision="no",
        compile=False,
        lora=stages.config.Lora(rank=4),
        projector=dataclasses.replace(config.projector, hidden=48),
        data=dataclasses.replace(config.data, tokens=96, caption_tokens=96, workers=0),
        pretrain=dataclasses.replace(config.pretrain, **short),
        sft=dataclasses.replace(config.sft, **short),
        dpo=dataclasses.replace(config.dpo, **short, beta=(0.1,), rates=(1e-4,), grid_steps=1),
    )
    out = llava / "out"
    stages.demo.run(config, out)
    assert not (out / "tower").exists() and not (out / "language").exists()

    start, end = weights(llava / "siglip"), weights(out / "dpo" / "model")
    for name, tensor in part(start, "vision_model.").items():
        if not name.startswith("head."):
            assert stages.torch.equal(end[f"vision_tower.vision_model.{name}"], tensor)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / "dpo" / "model" / name).read_bytes() == (llava / "qwen2" / name).read_bytes()
    assert "llava" in set().union(*log(out / "sft"))

    files = convert_checkpoint(out / "dpo" / "model", llava / "again", "f32")
    question = "What is it?"
    with OmniVLM(files.text, files.mmproj) as model:
        picture = Image.open(llava / "images" / "1.png").convert("RGB")
        answer = model.answer(picture, question, GenerateOptions(max_tokens=8)).text
    own = stages.model.load_checkpoint(out / "dpo" / "model")
    pixels = stages.torch.from_numpy(stages.data.to_pixels(picture, own.image_size).copy())
    expected = own.answer(pixels[None], [question], limit=8)[0]
    assert answer.strip()[:4] == expected[:4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].pop("conversations"), "conversations of row '3'"),
        (lambda rows: rows[3]["conversations"].pop(), "conversations of row '3'"),
        (lambda rows: rows[3].update(image="absent.png"), "absent.png cannot be read as a picture"),
        (lambda rows: rows.append("row"), "holds no list of objects"),
        (lambda rows: [row.pop("image", None) for row in rows], "has no row with an image"),
    ],
)
def test_a_faulty_dataset_is_told_in_a_sentence(
    stages: SimpleNamespace,
    micro: Any,
    done: Path,
    llava: Path,
    change: Callable[[list[Any]], Any],
    message: str,
) -> None:
    rows = json.loads((llava / "questions.json").read_text())
    change(rows)
    (llava / "questions.json").write_text(json.dumps(rows))
    settings = dataclasses.replace(
        micro.sft, json=str(llava / "questions.json"), images=str(llava / "images")
    )
    config = dataclasses.replace(
        micro, sft=settings, data=dataclasses.replace(micro.data, workers=1)
    )
    (llava / "out").mkdir()
    (llava / "out" / "pretrain").symlink_to(done / "pretrain")
    with pytest.raises(stages.config.TrainError, match=message) as raised:
        stages.sft.run(config, llava / "out")
    assert "\n" not in str(raised.value)


# --- the ablation ---------------------------------------------------------------------------------


def test_the_ablation_compares_three_ways(
    stages: SimpleNamespace, micro: Any, done: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stages.ablation, "TIMED", 2)
    for other in ("tokenizer", "tower", "language"):
        (tmp_path / other).symlink_to(done / other)
    stages.ablation.run(micro, tmp_path)
    told = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert [told[way]["image_tokens"] for way in stages.ablation.WAYS] == [9, 81, 9]
    assert all(told[way]["validation_loss"] > 0 for way in stages.ablation.WAYS)
    assert all(told[way]["seconds_per_picture"] > 0 for way in stages.ablation.WAYS)
    assert (tmp_path / "ablation" / "ablation.png").exists()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 3", "there is no setting 'colour' here; known are seed, "),
        ("[tower]\nstep = 3", "tower: there is no setting 'step' here; known are steps, "),
        ('[sft]\nsteps = "many"', "sft: steps is 'many'; it must be of type int"),
        ("[dpo]\nbeta = 0.1", "dpo: beta is 0.1; it must be of type list"),
        ("sft = 3", "sft is 3; it must be of type Sft"),
        ("[tower", "is not valid TOML"),
        ('[projector]\ncompression = "conv"', "it must be one of reshape, none, convolution"),
        ('precision = "fp16"', "precision is 'fp16'; it must be one of bf16, no"),
        ("[sft]\nhome_share = 75", "home_share is 75.0; it must be a share from 0 to 1"),
        ("[sft]\nrelation_share = -1", "relation_share is -1.0; it must be a share from 0 to 1"),
        ("[dpo]\nrelation_share = 0.5", "dpo: there is no setting 'relation_share' here"),
        ("[dpo]\nrates = []", "dpo.beta and dpo.rates must each have a number to try"),
        ('[data]\nlanguages = ["en", "de"]', "'de'; it must be one of en, zh"),
    ],
)
def test_a_faulty_configuration_is_told_in_a_sentence(
    stages: SimpleNamespace, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "size.toml"
    file.write_text(text)
    with pytest.raises(stages.config.TrainError) as raised:
        stages.config.load_config(file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_every_configuration_can_be_read(stages: SimpleNamespace) -> None:
    names = set()
    for file in MICRO.parent.glob("*.toml"):
        stages.config.load_config(file)
        names.add(file.stem)
    assert names == {"micro", "demo", "omnivision"}


@pytest.mark.parametrize(
    ("capability", "accelerated", "precision"),
    [
        ("AVX512", False, "bf16"),
        ("AVX2", False, "no"),
        ("DEFAULT", False, "no"),
        ("AVX2", True, "bf16"),
    ],
)
def test_a_cpu_without_bfloat16_does_not_emulate_it(
    stages: SimpleNamespace,
    micro: Any,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    accelerated: bool,
    precision: str,
) -> None:
    torch = stages.torch
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    config = dataclasses.replace(micro, precision="bf16")
    assert stages.loop.mixed_precision(config) == precision
    assert stages.loop.mixed_precision(micro) == "no"
    task = torch.nn.ModuleDict({"projector": torch.nn.Linear(4, 4)})
    muon, _ = stages.loop.make_optimizers(task, micro.sft)
    assert (type(muon) is torch.optim.Muon) == (precision == "bf16")


def test_muon_in_float32_takes_the_steps_of_pytorchs(stages: SimpleNamespace) -> None:
    torch = stages.torch
    torch.manual_seed(0)
    settings = {"lr": 0.1, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    start = [torch.randn(shape) for shape in ((24, 16), (16, 48), (8, 8))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    steps = stages.muon.Float32Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        # PyTorch's rounds to bfloat16's 8 bits in each of its 15 products.
        assert torch.linalg.norm(mine - other) < 0.05 * torch.linalg.norm(other - first)
    saved, loaded = steps[1].state_dict(), torch.optim.Muon(theirs, **settings)
    assert saved.keys() == steps[0].state_dict().keys()
    loaded.load_state_dict(steps[0].state_dict())


def test_damaged_and_foreign_checkpoints_are_told_in_a_sentence(
    stages: SimpleNamespace, micro: Any, done: Path, tmp_path: Path
) -> None:
    error = stages.config.TrainError
    (tmp_path / "pretrain").symlink_to(done / "pretrain")
    (tmp_path / "sft").mkdir()
    state = (done / "sft" / "state.pt").read_bytes()
    for damaged in (b"", b"nothing", state[: len(state) // 2]):
        (tmp_path / "sft" / "state.pt").write_bytes(damaged)
        with pytest.raises(error, match=r"state.pt is damaged; delete it to begin this stage anew"):
            stages.sft.run(micro, tmp_path)
    (tmp_path / "sft" / "state.pt").write_bytes(state)
    other = dataclasses.replace(micro, sft=dataclasses.replace(micro.sft, rate=1e-4))
    with pytest.raises(error, match="made with other settings.*delete it") as raised:
        stages.sft.run(other, tmp_path)
    assert "\n" not in str(raised.value)

    (tmp_path / "model").mkdir()
    with pytest.raises(error, match="model is no complete checkpoint.*run its stage again"):
        stages.model.load_checkpoint(tmp_path / "model")


def test_the_command_line_tells_errors_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "train" / "pretrain.py", "--config", MICRO, "--out", tmp_path]
    (tmp_path / "tokenizer").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "tokenizer.json" in result.stderr
    assert "Traceback" not in result.stderr
