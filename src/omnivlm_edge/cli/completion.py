"""`omnivlm-edge completion`: scripts that let a shell complete our commands, options and models."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Put it where the shell looks for it (the directory must exist), and start a new shell:

    \b
    bash  ~/.local/share/bash-completion/completions/omnivlm-edge
    zsh   ~/.zfunc/_omnivlm-edge
    fish  ~/.config/fish/completions/omnivlm-edge.fish

    bash must be 4.4 or newer, with the package bash-completion; without that package, load the
    file in ~/.bashrc. For zsh add `fpath+=~/.zfunc` before `compinit` in ~/.zshrc.
    """
    root = context.find_root().command
    click.echo(SHELLS[shell](root, {}, "omnivlm-edge", "_OMNIVLM_EDGE_COMPLETE").source())
