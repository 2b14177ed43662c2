"""What the type of the tied token embeddings costs a 4-bit text model, all else being equal.

    python bench/head_type.py SCRATCH_DIR --images DIR [--types iq4_nl,q5_0,q8_0,f16]

The embeddings are the output matrix as well, a quarter of OmniVision's text model. The demo is
quantized by a recipe, once for each type; the losses are those of `omnivlm-edge compare` along
F16's answers about the pictures. One JSON object a type is appended to
bench/results/head_type.jsonl.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import click

from omnivlm_edge import QuantizeOptions, compare_models, quantize_file
from omnivlm_edge.machine import commit, describe_machine
from omnivlm_edge.models import find_model
from omnivlm_edge.sources import find_pictures

RESULTS = Path(__file__).parent / "results" / "head_type.jsonl"


@click.command()
@click.argument("scratch", type=click.Path(file_okay=False, path_type=Path))
@click.option("--images", required=True, help="Pictures to describe.")
@click.option("--recipe", default="q4_k_m", show_default=True)
@click.option("--types", default="iq4_nl,q4_0,q5_0,q8_0,f16", show_default=True)
def main(scratch: Path, images: str, recipe: str, types: str) -> None:
    """Measure the demo and append to bench/results/head_type.jsonl."""
    scratch.mkdir(parents=True, exist_ok=True)
    source = find_model("demo").text
    names = types.split(",")
    builds = [
        quantize_file(
            source, scratch / f"{name}.gguf", recipe, QuantizeOptions(embedding_type=name)
        )
        for name in names
    ]
    pictures = find_pictures(images)
    losses = compare_models(source, builds, pictures, device="cpu")
    for name, loss in zip(names, losses[1:], strict=True):
        assert loss.text is not None
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": f"bench/head_type.py SCRATCH --images exam --recipe {recipe}",
            "commit": commit(),
            "machine": describe_machine(),
            "llama_cpp_python": version("llama-cpp-python"),
            "model": source.stem,
            "recipe": recipe,
            "head": name,
            "pictures": len(pictures),
            "text_bytes": loss.text_bytes,
            "text": asdict(loss.text),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
