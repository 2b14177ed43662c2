"""What is written in two places says the same in both."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import click
import gguf
import pytest
from nanobind.stubgen import StubGen

import omnivlm_edge
import omnivlm_edge._native
from omnivlm_edge import GenerateOptions, OmniVLM
from omnivlm_edge.cli import cli
from omnivlm_edge.models import find_model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "omnivlm_edge"

# Imports point downward only; each module names the ones that it may use.
STAGES = {"image", "encoder", "prompt", "decoder", "models", "device"}
ALLOWED = {
    "errors": set(),
    "values": {"errors"},
    "image": {"errors"},
    "sources": {"errors", "image"},
    "vision": {"_native"},
    "device": {"_native", "errors", "values"},
    "paths": set(),
    "files": set(),
    "gguf_header": {"errors"},
    "model_file": {"errors", "gguf_header"},
    "memory": {"_native", "errors", "model_file"},
    "machine": {"_native"},
    "power": set(),
    "quantize": {
        *("_native", "convert", "device", "errors", "files", "gguf_header", "imatrix"),
        *("model_file", "vision"),
    },
    "hub": {"errors", "files", "gguf_header", "model_file", "paths", "quantize", "values"},
    "models": {"errors", "hub", "model_file", "values"},
    "store": {"errors", "hub", "memory", "model_file", "models", "paths", "prompt", "values"},
    "prompt": {"errors", "values"},
    "decoder": {"_native", "errors", "prompt", "values"},
    "cache": {"files"},
    "grammar": {"errors"},
    "chat": {"image", "values"},
    "made_pictures": {"image"},
    "photographs": {"engine", "image", "values"},
    "encoder": {
        *("_native", "cache", "errors", "files", "image", "paths", "prompt", "values", "vision"),
    },
    "engine": STAGES
    | {
        *("_native", "cache", "chat", "errors", "files", "generation", "memory", "model_file"),
        *("paths", "values"),
    },
    "report": {"values"},
    "batch": {
        *("engine", "errors", "generation", "image", "report", "scheduler", "sources", "values"),
    },
    "evaluation": {
        *("batch", "device", "engine", "errors", "files", "image", "machine"),
    },
    "ray": {"batch", "engine", "errors", "files", "models", "paths", "sources", "values"},
    "imatrix": {"convert", "errors"},
    "calibration": {"_native", "engine", "errors", "image", "imatrix", "values"},
    "compare": STAGES | {"engine", "errors", "hub", "made_pictures", "model_file", "values"},
    "bench": {
        *("_native", "device", "errors", "files", "image", "machine", "made_pictures", "memory"),
        *("model_file", "power", "values"),
    },
    "bench_child": {"bench", "device", "engine", "errors", "memory", "values"},
    "plot": {"bench", "compare", "errors", "files"},
    "doctor": STAGES - {"vision", "prompt"}
    | {"_native", "engine", "errors", "hub", "memory", "model_file", "values"},
    "cli": {
        *(
            "batch",
            "bench",
            "calibration",
            "compare",
            "convert",
            "device",
            "doctor",
            "engine",
            "errors",
            "evaluation",
            "files",
            "grammar",
        ),
        *("hub", "image", "memory", "model_file", "models", "paths", "photographs", "plot"),
        *("quantize", "ray", "report"),
        *("server", "sources", "store", "values"),
    },
    "chat_handler": STAGES - {"image", "models"}
    | {"errors", "openai_messages", "sources", "values"},
    "generation": {"decoder", "image", "values"},
    "openai_messages": {"errors", "grammar", "values"},
    "scheduler": {"engine", "errors", "generation", "values"},
    "server": {
        *("engine", "errors", "generation", "image", "openai_messages", "scheduler", "sources"),
        "values",
    },
    "__init__": {
        "engine",
        "chat",
        "chat_handler",
        "compare",
        "device",
        "grammar",
        "errors",
        "quantize",
        "values",
    },
    "__main__": {"cli"},
}


def test_version_is_in_the_changelog() -> None:
    assert f"## [{version('omnivlm-edge')}]" in (ROOT / "CHANGELOG.md").read_text()
    assert omnivlm_edge.__version__ == version("omnivlm-edge")


def test_every_public_name_is_documented() -> None:
    for name in omnivlm_edge.__all__:
        assert getattr(omnivlm_edge, name).__doc__, name


def test_every_error_is_exported_and_in_the_tree() -> None:
    from omnivlm_edge import errors

    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert set(classes) <= set(omnivlm_edge.__all__)
    tree = re.findall(r"^[^\w]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert sorted(tree) == sorted(classes)


def signatures(stub: str) -> set[str]:
    """Every function with its arguments and every class, whatever the layout of the text."""
    names = set()
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.FunctionDef):
            names.add(f"{node.name}({ast.unparse(node.args)})")
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
    return names


def test_package_is_typed_and_the_stub_is_generated() -> None:
    package = files("omnivlm_edge")
    assert (package / "py.typed").is_file()
    generated = StubGen(omnivlm_edge._native)
    generated.put(omnivlm_edge._native)
    shipped = (package / "_native.pyi").read_text()
    assert signatures(shipped) == signatures(generated.get()), "run: make stub"


MODULES = [
    path
    for folder in (".", "batch", "cli", "evaluation", "quantize", "server")
    for path in sorted((PACKAGE / folder).glob("*.py"))
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    depth = len(path.relative_to(PACKAGE).parts)  # 2 in cli/run.py: `from ..engine`
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            used |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level > depth)
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert used <= ALLOWED[module], f"{module} may not import {used - ALLOWED[module]}"


def test_few_places_import_llama_cpp() -> None:
    pattern = re.compile(r"^\s*(import|from) llama_cpp", re.M)
    users = {path.stem for path in MODULES if pattern.search(path.read_text())}
    assert users == {"chat_handler", "decoder", "grammar", "llama"}


def test_the_command_line_alone_loads_neither_ggml_nor_llama_cpp() -> None:
    program = "import sys, omnivlm_edge.cli; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "omnivlm_edge.cli" in loaded
    assert not {"llama_cpp", "omnivlm_edge._native"} & loaded


def test_model_md_lists_every_key_and_tensor(tiny_model: Path) -> None:
    text = (ROOT / "MODEL.md").read_text()
    (mmproj,) = tiny_model.glob("mmproj*.gguf")
    reader = gguf.GGUFReader(mmproj)
    for key in reader.fields:
        if not key.startswith("GGUF."):
            assert f"`{key}`" in text, key
    for tensor in reader.tensors:
        name = re.sub(r"blk\.\d+", "blk.N", tensor.name)
        name = re.sub(r"attn_[qkv]\b", "attn_{q,k,v}", name)
        stem = name.rsplit(".", 1)[0]
        assert f"`{stem}`" in text or f"`{name}`" in text, tensor.name


def test_llama_cpp_python_is_pinned_once_for_build_and_run() -> None:
    pins = re.findall(r'"(llama-cpp-python[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) == 2
    assert len(set(pins)) == 1
    assert pins[0] in (ROOT / "Makefile").read_text()


def readme_blocks() -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_shows_the_help_text() -> None:
    command = [sys.executable, "-m", "omnivlm_edge", "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout in readme_blocks()


def test_commands_md_is_what_help_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import make_commands

    text = (ROOT / "docs" / "commands.md").read_text()
    assert text == make_commands.text(), "run: make docs"
    for arguments in ([], ["doctor"]):
        command = [sys.executable, "-m", "omnivlm_edge", *arguments, "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"```\n{result.stdout}```\n" in text


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from commands(command)


@pytest.mark.parametrize(("name", "command"), list(commands(cli)))
def test_every_command_explains_itself(name: str, command: click.Command) -> None:
    context = click.Context(command, info_name=name)
    assert command.get_short_help_str()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
        if parameter.name == "model":
            offered = {item.value for item in parameter.shell_complete(context, "de")}
            assert "demo" in offered, "use model_argument() of cli/options.py"


def test_readme_transcripts_are_real() -> None:
    """Commands after `$` and lines after `>>>` are run again; what they print must be the same."""
    transcripts = [block for block in readme_blocks() if block.startswith("$ omnivlm-edge run")]
    assert len(transcripts) == 4
    for transcript in transcripts:
        command, _, shown = transcript.partition("\n")
        typed = re.findall(r"^>>> (.*)\n", shown, re.M)
        result = subprocess.run(
            [sys.executable, "-m", "omnivlm_edge", *shlex.split(command)[2:], "--device", "cpu"],
            input="\n".join(typed),
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        answers = "".join(line for line in shown.splitlines(True) if not line.startswith(">>>"))
        assert result.stdout == answers


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name, _ in commands(cli):
        assert f"omnivlm-edge {name}" in text, name


def test_readme_tables_come_from_the_committed_results() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import report

    text = (ROOT / "README.md").read_text()
    assert report.side_by_side_tables(report.side_by_side_run()) in text
    assert report.second_question_table() in text
    assert report.serve_table() in text
    assert report.accuracy_table() in text
    assert report.loss_table() in text
    assert report.size_table() in text
    card = (ROOT / "MODEL_CARD.md").read_text()
    assert report.score_table() in card
    assert report.stage_table() in card


def test_tables_of_scaling_come_from_the_results_and_its_formula() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import report

    text = (ROOT / "docs" / "scaling.md").read_text()
    assert report.batch_table() in text
    assert report.worker_table() in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = subprocess.run(
        [sys.executable, "-c", code[0]], capture_output=True, text=True, check=True
    )
    assert printed.stdout in text


def test_demo_fits_the_wheel_and_knows_the_examples() -> None:
    files_ = find_model("demo")
    assert sum(path.stat().st_size for path in (files_.text, files_.mmproj)) <= 20e6
    options = GenerateOptions(max_tokens=40)
    with OmniVLM("demo", device="cpu") as model:
        horses = model.encode(ROOT / "examples" / "horses.png")
        assert "three horses" in model.answer(horses, "Describe the image", options).text
        assert "water" in model.answer(horses, "Describe the image", options).text
        assert model.answer(horses, "Is there an egg?", options).text.startswith("No")
        shopping = model.encode(ROOT / "examples" / "shopping.png")
        assert "three eggs" in model.answer(shopping, "Describe the image", options).text
        assert "shopping cart" in model.answer(shopping, "Describe the image", options).text
        assert model.answer(shopping, "Do I have eggs?", options).text.startswith("Yes")
