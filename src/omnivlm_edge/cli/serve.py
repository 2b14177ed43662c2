"""`omnivlm-edge serve`: OpenAI's interface, and a page, for one model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import OmniVLMError
from ..values import DEFAULT_N_CTX
from .options import (
    EngineSettings,
    consent,
    engine_options,
    mmproj_option,
    model_argument,
    note,
    offline_option,
    parallel_option,
    setting,
    yes_option,
)

if TYPE_CHECKING:
    from ..engine import OmniVLM

# A question about a picture and an answer of 512 tokens; the default for each of --parallel.
_ANSWER_POSITIONS = 640


def _check_key(_: click.Context, parameter: click.Parameter, key: str | None) -> str | None:
    if key is not None and (not key or key != "".join(key.split())):
        raise click.BadParameter("it must not be empty nor have spaces in it", param=parameter)
    return key


def _read_origins(
    _: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Origins as browsers write them."""
    origins = []
    for text in given:
        found = re.fullmatch(
            r"([\w+.-]+)://([\w.-]+|\[[\da-f:.]+\])(:\d+)?/?", text.lower(), re.ASCII
        )
        if found:
            scheme, host, port = found[1], found[2], found[3] or ""
            default = {"http": ":80", "https": ":443"}.get(scheme)
            origins.append(f"{scheme}://{host}{'' if port == default else port}")
        elif text == "*":
            origins.append(text)
        else:
            raise click.BadParameter(
                f"'{text}' is no origin such as http://a.example:3000", param=parameter
            )
    return tuple(origins)


def _read_hosts(
    _: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Names as the Host header has them, without the port."""
    for text in given:
        if not re.fullmatch(r"\w[\w.-]*|\[[\da-f:.]+\]", text, re.ASCII | re.IGNORECASE):
            raise click.BadParameter(
                f"'{text}' is no name such as a.example, without a port", param=parameter
            )
    return tuple(text.lower().removesuffix(".") for text in given)


@click.command()
@model_argument()
@mmproj_option
@setting("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: the network, too.")
@setting("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any.")
@setting("--api-key", callback=_check_key, help="Whoever asks must have it.")
@parallel_option
@setting(
    "--queue",
    type=click.IntRange(0, 4096),
    default=32,
    show_default=True,
    help="Answers that may wait; more are refused (503).",
)
@setting(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    help="Seconds that an answer may take.",
)
@engine_options(
    None,
    "Positions that all running answers share.  "
    f"[default: {DEFAULT_N_CTX}, or {_ANSWER_POSITIONS} for each of --parallel if that is more]",
)
@setting("--preload", is_flag=True, help="Open the port when the model is there, not before.")
@setting(
    "--sleep-idle-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Free the model after so long without a request; the next one loads it again.",
)
@setting("--allow-urls", is_flag=True, help="Fetch pictures from public http(s) addresses.")
@setting(
    "--media-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read pictures with file:// addresses below this directory.",
)
@setting(
    "--cors-origin",
    "origins",
    multiple=True,
    callback=_read_origins,
    help="Let pages of this origin ask. May be repeated.",
)
@setting(
    "--allowed-host",
    "hosts",
    multiple=True,
    callback=_read_hosts,
    help="A name that leads here, such as a proxy's; requests for others than these and this "
    "machine's own are refused then. May be repeated.",
)
@setting("--log-content", is_flag=True, help="Write questions and answers into the log, too.")
@offline_option
@yes_option
def serve(
    model: str,
    mmproj: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    parallel: int,
    queue: int,
    request_timeout: float,
    ctx_size: int | None,
    settings: EngineSettings,
    preload: bool,
    sleep_idle_seconds: float | None,
    allow_urls: bool,
    media_path: Path | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    log_content: bool,
    offline: bool,
    yes: bool,
) -> None:
    """Answer over HTTP, as OpenAI's API does, and on a page for people.

    Several at once share the model. The log is JSON, a line for each request, on stderr.
    """
    try:
        from ..server.app import Settings
        from ..server.gate import GateRules, is_local
        from ..server.pictures import PictureRules
        from ..server.process import serve as serve_model
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("omnivlm_edge"):
            raise
        raise OmniVLMError(
            f'serving needs the package {exc.name}: pip install "omnivlm-edge[server]"'
        ) from exc
    from ..engine import OmniVLM
    from ..models import find_model

    files = find_model(model, mmproj, offline=offline, consent=consent(yes), notify=note)

    def load() -> OmniVLM:
        return OmniVLM(
            files.text,
            files.mmproj,
            variant=files.variant,
            n_ctx=ctx_size or max(DEFAULT_N_CTX, _ANSWER_POSITIONS * parallel),
            n_sequences=parallel,
            disk_cache=False,
            **settings,
        )

    local = is_local(host)
    if not local and api_key is None:
        note("Warning: whoever can reach this machine may ask; --api-key lets only some")
    rules = Settings(
        name=Path(model).name,
        n_parallel=parallel,
        seconds=request_timeout,
        gate=GateRules(
            api_key=api_key,
            hosts=(*hosts, f"[{host}]" if ":" in host else host.lower())
            if hosts or local
            else None,
            max_requests=parallel + queue,
        ),
        pictures=PictureRules(allow_urls=allow_urls, media_path=media_path),
        origins=origins,
        log_content=log_content,
    )
    serve_model(
        load,
        rules,
        host=host,
        port=port,
        n_queue=queue,
        sleep_after=sleep_idle_seconds,
        preload=preload,
        announce=lambda address: note(f"Listening on {address} (Ctrl-C ends)"),
    )
