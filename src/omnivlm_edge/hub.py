"""A published model's name -> its two files on this machine. The only network code for models.

Files come from the Hugging Face hub into its own cache (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean elsewhere). What is made here from them, because
nobody published it, lies in `paths.models_dir()`:

    USER--REPO/<first 12 digits of the source's sha256>/<stem of the source>-Q4_K_M.gguf

so that a source that changed on the hub is noticed, and never silently served by an old file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from .errors import ModelFileError
from .files import digest_file
from .gguf_header import Header, parse_header, read_header
from .model_file import (
    TEXT_ORDER,
    VISION_ORDER,
    ModelFile,
    best,
    check_quantization,
    describe,
    fitting_texts,
    fitting_vision,
    inspect_all,
    inspect_file,
    pair,
)
from .paths import models_dir
from .values import ModelFiles

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

Consent = Callable[[str], bool]
Notify = Callable[[str], None]
Quantizer = Callable[..., Path]  # quantize.file.quantize_file


class Published(NamedTuple):
    """Where a model that has a name of its own is published."""

    repo: str
    variant: str | None = None  # its files name none


_OMNIVLM = Published("NexaAI/OmniVLM-968M")
KNOWN = {
    "omnivision": _OMNIVLM,
    "omnivlm": _OMNIVLM,
    "omnivision-ocr": Published("NexaAIDev/vlm-81-ocr-gguf", "vlm-81-ocr"),
    "omnivision-preview": Published("NexaAIDev/nano-vlm-instruct-gguf", "nano-vlm-instruct"),
}

# A repository that holds several generations of a model: the files of the newest, as they stood in
# its listing (huggingface.co/NexaAI/OmniVLM-968M/tree/main, commit 79b60d0). The older generation
# (Nano-Vlm-Processor-*, mmproj-omni-vlm-*) has the same shapes and would pair with them.
_NEWEST = {
    _OMNIVLM.repo: {
        "omnivision-text-optimized-llm-f16.gguf",
        "omnivision-text-optimized-llm-Q8_0.gguf",
        "omnivision-text-optimized-mmproj-f16.gguf",
        "omnivision-text-optimized-mmproj-f32.gguf",
    }
}

# Only these can be quantized without quantizing twice; the first that is published is taken.
_SOURCES = ("F16", "BF16", "F32")

_HEAD = 256 * 1024  # bytes: all keys of a vision file, and those of a text model that come first
_LONG_HEAD = 8 * 1024 * 1024  # ... those behind Qwen's vocabulary of 6 MB, too
_HEADER_THREADS = 4

_LIBRARY = "omnivlm-edge"  # what the hub is told of us


@dataclass(frozen=True)
class Reference:
    """A model on the hub: `name` as one types it, without the quantization."""

    name: str
    repo: str
    quantization: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        tag = f":{self.quantization.lower()}" if self.quantization else ""
        return self.name + tag


def parse_reference(text: str) -> Reference | None:
    """`omnivision`, `omnivlm`, `omnivision-ocr`, `omnivision-preview` or `hf:USER/REPO`.

    Each with an optional `:quantization`, in capitals or not. None for anything else: a path.
    Raises ModelFileError for a repository or a quantization that cannot be.
    """
    on_hub = text.startswith("hf:")
    name, colon, tag = text.removeprefix("hf:").partition(":")
    if on_hub:
        # The hub's own rules; `--` stands for the slash in the names of directories.
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or re.search(r"--|\.\.|.{97}", name):
            raise ModelFileError(f"'{text}': is no repository; write hf:USER/REPO[:QUANTIZATION]")
        published = Published(name)
        name = f"hf:{name}"
    elif name.lower() in KNOWN:
        name = name.lower()
        published = KNOWN[name]
    else:
        return None
    quantization = check_quantization(tag) if colon else None
    return Reference(name, published.repo, quantization, published.variant)


def resolve(
    reference: str,
    *,
    offline: bool = False,
    consent: Consent | None = None,
    make_vision: bool = False,
    notify: Notify | None = None,
) -> ModelFiles:
    """The files of a named model, downloaded when they are not here yet.

    A pair that is here is used without a word to the network. The other arguments are those of
    `pull`. Raises ModelFileError.
    """
    wanted = parse_reference(reference)
    if wanted is None:
        raise ModelFileError(f"'{reference}': is not the name of a published model")
    found = find_cached(wanted)
    if found is not None:
        return _model_files(*found, wanted)
    if offline:
        raise ModelFileError(
            f"{wanted}: is not on this machine; where there is a network, "
            f"`omnivlm-edge pull {wanted}` downloads it"
        )
    return pull(wanted, consent=consent, make_vision=make_vision, notify=notify)


def find_cached(wanted: Reference) -> tuple[ModelFile, ModelFile] | None:
    """The best pair (text, vision) that is on this machine, or None."""
    made = made_files(wanted.repo)
    for files in cached_snapshots(wanted.repo) or [[]]:
        found = pair([*files, *fresh(made, files)], wanted.quantization)
        if found is not None:
            return found
    return None


def pull(
    wanted: Reference,
    *,
    consent: Consent | None = None,
    make_vision: bool = False,
    notify: Notify | None = None,
    quantize: Quantizer | None = None,
) -> ModelFiles:
    """Brings a model's newest files onto this machine; what is here already is not loaded again.

    A text model that is not published in the wanted quantization is made here if `consent`, asked
    with a sentence, says so. A vision file that is not published in it is made if `make_vision`;
    otherwise the F16 file is used, and `notify` told. `quantize` is `quantize.file.quantize_file`.

    Raises ModelFileError: not found, not allowed, not published, no network, no space, damaged.
    """
    with _hub_errors(wanted):
        commit, files = _list_files(wanted)
    texts = fitting_texts(files)
    if not texts:
        raise ModelFileError(
            f"{wanted.repo}: publishes no text model and vision file of OmniVLM that fit together"
        )
    made = fresh(made_files(wanted.repo), files)
    quantization = wanted.quantization
    text = _matching(texts + [file for file in made if file.kind == "text"], quantization)
    make_text = text is None
    if text is None:
        missing = f"{wanted}: is not published ({_published(texts)})"
        text = _source(texts, missing)
        origin = f"from the {text.quantization} file of {megabytes(text.size)}"
        if consent is None or not consent(f"{missing}; make it here, once, {origin}?"):
            raise ModelFileError(
                f"{missing}; `omnivlm-edge pull {wanted} --yes` makes it here, once, {origin}"
            )
    partners = fitting_vision([*files, *made], text)
    vision = best(partners, quantization or text.quantization, *VISION_ORDER)
    smaller = quantization not in (None, vision.quantization, *_SOURCES)
    if smaller and make_vision:
        vision = _source(fitting_vision(files, text), f"{wanted}: its vision file is not published")
    elif smaller and notify is not None:
        notify(
            f"The vision file is not published as {quantization}: using {vision.quantization} "
            f"({megabytes(vision.size)}). `omnivlm-edge pull {wanted} --yes` or "
            "`omnivlm-edge quantize` makes a smaller one."
        )
    with _hub_errors(wanted):
        _check_space(wanted.repo, [file for file in (text, vision) if file not in made])
        if text not in made:
            text = _download(wanted.repo, commit, text)
        if vision not in made:
            vision = _download(wanted.repo, commit, vision)
    if quantization is not None and make_text:
        text = _make(wanted.repo, text, quantization, quantize)
    if quantization is not None and smaller and make_vision:
        vision = _make(wanted.repo, vision, quantization, quantize)
    return _model_files(text, vision, wanted)


def megabytes(size: int) -> str:
    """Bytes as people write them: 994 MB (10⁶)."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e6:.1f} MB"


# --- what is on this machine ----------------------------------------------------------------------


def downloads_dir() -> Path:
    """The Hugging Face cache, which other programs use too."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_cache(repo: str) -> Path:
    """A repository's directory in the Hugging Face cache: refs/, blobs/ and snapshots/."""
    return downloads_dir() / f"models--{repo.replace('/', '--')}"


def cached_snapshots(repo: str) -> list[list[ModelFile]]:
    """The usable files of each revision in the cache, the newest revision first."""
    root = repo_cache(repo)
    if not (root / "snapshots").is_dir():
        return []
    main = ""
    with suppress(OSError, ValueError):
        main = (root / "refs" / "main").read_text()
    snapshots = sorted(
        filter(Path.is_dir, (root / "snapshots").iterdir()),
        key=lambda path: (path.name == main, path.stat().st_mtime),
    )
    result = []
    for snapshot in reversed(snapshots):
        # A link whose blob was deleted is no file.
        paths = [path for path in sorted(snapshot.rglob("*.gguf")) if path.is_file()]
        files = _newest(repo, snapshot, inspect_all(paths)[0])
        result.append([replace(file, etag=_etag(file.path)) for file in files])
    return result


def made_files(repo: str) -> list[ModelFile]:
    """The files that were made here from those of a repository."""
    directory = models_dir() / repo.replace("/", "--")
    return inspect_all(sorted(directory.glob("*/*.gguf")))[0]


def fresh(made: Sequence[ModelFile], published: Sequence[ModelFile]) -> list[ModelFile]:
    """Those of the made files whose source is still what is published.

    When no possible source is among the published files, because it was removed to save space,
    there is nothing that could have changed.
    """
    result = []
    for file in made:
        sources = [
            source
            for source in published
            if source.kind == file.kind and source.quantization in _SOURCES
        ]
        tags = {_content_id(source)[:12] for source in sources}
        if not sources or file.path.parent.name in tags:
            result.append(file)
    return result


def _etag(path: Path) -> str:
    """The hub's hash of a file in the cache, which is the name of the blob that it links to."""
    return os.path.basename(os.readlink(path)) if path.is_symlink() else ""


def _content_id(file: ModelFile) -> str:
    return file.etag or digest_file(file.path)


def _newest(repo: str, directory: Path, files: Sequence[ModelFile]) -> list[ModelFile]:
    """The files of a repository's newest generation; all where that is not known."""
    names = _NEWEST.get(repo, set())
    newest = [file for file in files if file.path.relative_to(directory).as_posix() in names]
    return newest or list(files)


def _model_files(text: ModelFile, vision: ModelFile, wanted: Reference) -> ModelFiles:
    return ModelFiles(text.path, vision.path, wanted.variant)


# --- what is on the hub ---------------------------------------------------------------------------


def _list_files(wanted: Reference) -> tuple[str, list[ModelFile]]:
    """The commit of a repository's main branch and its usable GGUF files."""
    from huggingface_hub import HfApi

    info = HfApi(library_name=_LIBRARY).model_info(wanted.repo, files_metadata=True)
    commit = str(info.sha)
    names = {s.rfilename for s in info.siblings or [] if s.rfilename.lower().endswith(".gguf")}
    names = names & _NEWEST.get(wanted.repo, set()) or names

    def inspect(sibling: RepoSibling) -> ModelFile | None:
        name = sibling.rfilename
        etag = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):  # it becomes a file's name
            return None
        try:
            header = _remote_header(wanted.repo, commit, name, etag)
            return describe(Path(name), header, sibling.size or 0, etag)
        except ModelFileError:  # of no use here, whatever the reason
            return None

    siblings = [s for s in info.siblings or [] if s.rfilename in names]
    with ThreadPoolExecutor(_HEADER_THREADS) as threads:
        files = list(threads.map(inspect, siblings))
    return commit, [file for file in files if file is not None]


def _remote_header(repo: str, commit: str, name: str, etag: str) -> Header:
    """The beginning of a header, or all of it, without the rest of the file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session, hf_raise_for_status

    blob = repo_cache(repo) / "blobs" / etag
    if blob.is_file():
        with suppress(ModelFileError):  # damaged: `_download` gets it again
            return read_header(blob)
    header = Header({}, [], partial=True)
    for length in (_HEAD, _LONG_HEAD):
        content = bytearray()
        headers = {**_request_headers(), "Range": f"bytes=0-{length - 1}"}
        url = hf_hub_url(repo, name, revision=commit)
        with get_session().stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()  # for the message
            hf_raise_for_status(response)
            for chunk in response.iter_raw(1 << 16):
                content += chunk
                if len(content) >= length:  # a server that knows no ranges sends all of the file
                    break
        header = parse_header(bytes(content[:length]), name)
        # llama.cpp's quantizer writes the type behind the vocabulary.
        if not header.partial or "general.file_type" in header.metadata:
            break
    return header


def _matching(texts: Sequence[ModelFile], quantization: str | None) -> ModelFile | None:
    matching = [file for file in texts if quantization in (None, file.quantization)]
    return best(matching, *TEXT_ORDER) if matching else None


def _published(texts: Sequence[ModelFile]) -> str:
    return "published: " + ", ".join(sorted({file.quantization for file in texts}))


def _source(files: Sequence[ModelFile], problem: str) -> ModelFile:
    sources = [file for file in files if file.quantization in _SOURCES]
    if not sources:
        raise ModelFileError(f"{problem}, nor an F16, BF16 or F32 file to make it from")
    return best(sources, *_SOURCES)


def _check_space(repo: str, files: Sequence[ModelFile]) -> None:
    """Raises ModelFileError when what is still to be downloaded does not fit on the disk."""
    blobs = repo_cache(repo) / "blobs"
    missing = 0
    for file in files:
        if not (blobs / file.etag).exists():
            partial = _partial(blobs / file.etag)
            missing += file.size - (partial.stat().st_size if partial.exists() else 0)
    place = next(path for path in (blobs, *blobs.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise ModelFileError(
            f"{place}: {megabytes(missing)} are to be downloaded and {megabytes(free)} are free; "
            "make room, or set HF_HOME to a larger disk"
        )


def _download(repo: str, commit: str, file: ModelFile) -> ModelFile:
    """Puts a file into the cache. Its content is checked before it gets its final name.

    huggingface_hub begins a file again after an interruption and compares only sizes; so the blob
    is loaded here, with its functions, under its lock and into the place where it looks for it.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    root, name = repo_cache(repo), file.path.as_posix()
    blob = root / "blobs" / file.etag
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / root.name / f"{file.etag}.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists() and _hash(blob, file.etag) != file.etag:
            blob.unlink()
        if not blob.exists():
            partial = _partial(blob)
            with partial.open("ab") as stream:
                if stream.tell() > file.size:
                    stream.seek(0)
                    stream.truncate()
                http_get(
                    hf_hub_url(repo, name, revision=commit),
                    stream,
                    resume_size=stream.tell(),
                    headers=_request_headers(),
                    expected_size=file.size,
                    displayed_filename=name,
                )
            if _hash(partial, file.etag) != file.etag:
                partial.unlink()
                raise ModelFileError(
                    f"{repo}: {name} arrived damaged (its hash is not the published one) and was "
                    "deleted; pull it again"
                )
            partial.replace(blob)
    path = Path(hf_hub_download(repo, name, library_name=_LIBRARY))
    if commit not in path.parts:
        raise ModelFileError(f"{repo}: changed while it was downloaded; pull it again")
    return replace(file, path=path)


def _request_headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    # A compressed answer has no ranges.
    return {**build_hf_headers(library_name=_LIBRARY), "Accept-Encoding": "identity"}


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _hash(path: Path, etag: str) -> str:
    """The hash of the kind that an etag is: sha256, or that of a git blob outside of LFS."""
    if len(etag) == 64:
        return digest_file(path)
    blob = b"blob %d\0" % path.stat().st_size
    return digest_file(path, hashlib.sha1(blob, usedforsecurity=False))


def _make(repo: str, source: ModelFile, quantization: str, quantize: Quantizer | None) -> ModelFile:
    """Makes a file that nobody published, and removes older ones of its kind."""
    from .quantize.file import output_name, quantize_file  # loads llama.cpp

    quantize = quantize or quantize_file
    directory = models_dir() / repo.replace("/", "--") / source.etag[:12]
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / output_name(source.path, quantization)
    with tqdm(desc=f"Making {output.name}", disable=None, leave=False) as bar:  # on a terminal

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize(source.path, output, quantization, progress=advance)
    for old in made_files(repo):
        same = old.kind == source.kind and old.quantization == quantization
        if same and old.path.parent != directory:
            old.path.unlink(missing_ok=True)
    return inspect_file(output)


@contextmanager
def _hub_errors(wanted: Reference) -> Iterator[None]:
    """Every way in which the hub, the network or the disk can fail -> ModelFileError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # that of whichever HTTP library it is built on
        OfflineModeIsEnabled,
    )

    hub = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled as exc:
        raise ModelFileError(
            f"{wanted}: is not on this machine, and HF_HUB_OFFLINE forbids to download it"
        ) from exc
    except GatedRepoError as exc:
        raise ModelFileError(
            f"{wanted.repo}: is gated: accept its terms on {hub}/{wanted.repo}, then set HF_TOKEN"
        ) from exc
    except HfHubHTTPError as exc:
        raise ModelFileError(_http_problem(wanted, hub, exc.response)) from exc
    except (HTTPError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            problem = "the disk is full; make room, or set HF_HOME to a larger disk"
        elif isinstance(exc, PermissionError):
            problem = f"{exc.filename} cannot be written; change its permissions or set HF_HOME"
        else:
            reason = str(exc).partition("\n")[0] or type(exc).__name__
            problem = f"cannot be downloaded from {hub} ({reason}); check the network and try again"
        raise ModelFileError(f"{wanted}: {problem}") from exc


def _http_problem(wanted: Reference, hub: str, response: Any) -> str:
    status = response.status_code
    if status == 429:
        wait = response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        return f"{hub}: has had too many requests from here; try again {when}, or set HF_TOKEN"
    if status in (401, 403):
        return (
            f"{wanted.repo}: does not exist on {hub} or is private; "
            "check the name, or set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return f"{wanted.repo}: is not on {hub}, or lacks a file that it lists; check the name"
    return f"{wanted.repo}: {hub} answers with status {status}; try again later"
