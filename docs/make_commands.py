"""Writes commands.md, the help texts of all commands: python docs/make_commands.py (make docs)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from omnivlm_edge.cli import cli

TARGET = Path(__file__).with_name("commands.md")
WIDTH = 78  # what click takes when it does not write to a terminal


def text() -> str:
    """The whole file: the group itself, then its commands in the order of its help."""
    root = click.Context(
        cli, info_name="omnivlm-edge", terminal_width=WIDTH, **cli.context_settings
    )
    return "# Commands\n\nWhat `--help` says, made by `make docs`.\n" + "".join(_sections(root))


def _sections(context: click.Context) -> Iterator[str]:
    command = context.command
    yield f"\n## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                settings = child.context_settings
                yield from _sections(
                    click.Context(child, info_name=name, parent=context, **settings)
                )


if __name__ == "__main__":
    TARGET.write_text(text())
