"""`omnivlm-edge serve` as its clients meet it: OpenAI's, and those that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import openai
import pytest
import schemathesis
import uvicorn
from gguf import GGUFReader
from openai import OpenAI
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from uvicorn.server import ServerState

from command import COMMAND
from fake_hub import DEMO
from omnivlm_edge import GenerateOptions, ImageError, ModelFileError, OmniVLM, Turn
from omnivlm_edge.models import find_model
from omnivlm_edge.scheduler import Scheduler
from omnivlm_edge.server import gate, process, stream
from omnivlm_edge.server.app import Settings, create_app, describe_model
from omnivlm_edge.server.gate import MAX_BODY, GateRules, is_local
from omnivlm_edge.server.protocol import LOADING, describe_error
from serving import (
    CHAT,
    EXAMPLES,
    HORSES,
    ORIGINAL,
    SHOPPING,
    Reply,
    Server,
    data_uri,
    question,
    raw_post,
    user,
)

_FIELD = GGUFReader(DEMO / "demo-F16.gguf").fields["tokenizer.ggml.tokens"]
TOKENS = {str(text): str(number) for number, text in enumerate(_FIELD.contents())}
ENDS = (TOKENS["<|im_end|>"], TOKENS["<|endoftext|>"])  # end an answer
LONG = 450  # tokens: an answer that is still running when the test does something


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    media = tmp_path_factory.mktemp("media")
    shutil.copy(EXAMPLES / "horses.png", media)
    options = ["--parallel", 4, "--queue", 4, "--media-path", media, "--preload"]
    with Server(*options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def engine_demo() -> Iterator[OmniVLM]:
    with OmniVLM("demo", device="cpu", n_threads=1, disk_cache=False) as model:
        yield model


def ask(client: OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    """A whole answer."""
    return client.chat.completions.create(
        **{"model": "demo", "messages": messages, "max_tokens": 24, **options}
    )


def text_of(response: Any) -> str:
    (choice,) = response.choices
    return str(choice.message.content)


def wait_for(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def idle(server: Server) -> bool:
    return server.metric("requests_processing") == server.metric("requests_deferred") == 0


@contextlib.contextmanager
def busy(server: Server, n: int = 1) -> Iterator[list[socket.socket]]:
    """So many answers are being streamed; their clients hang up at the end."""
    wait_for(lambda: idle(server))
    sockets = []
    body = json.dumps(question("Tell me a story.", max_tokens=LONG, stream=True, **ENDLESS))
    for _ in range(n):
        sockets.append(server.connect())
        sockets[-1].sendall(raw_post(body.encode()))
    for connection in sockets:
        connection.recv(1)
    try:
        yield sockets
    finally:
        for connection in sockets:
            connection.close()


# A form that the demo cannot come to the end of.
ENDLESS = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 4500}},
    }
}


# --- OpenAI's client ------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(client: OpenAI, engine_demo: OmniVLM) -> None:
    for name, url in (("horses.png", HORSES), ("shopping.png", SHOPPING)):
        for text in ("Describe the image", "Is there an egg?"):
            want = engine_demo.answer(EXAMPLES / name, text, GenerateOptions(max_tokens=24))
            response = ask(client, user(text, url))
            assert text_of(response) == want.text
            assert response.choices[0].finish_reason == want.finish_reason == "stop"
            assert response.object == "chat.completion"
            assert response.model == "demo"
            assert response.usage.prompt_tokens == want.prompt_tokens
            assert response.usage.completion_tokens == want.completion_tokens
            assert response.usage.prompt_tokens_details.to_dict()["image_tokens"] == 9
    again = ask(client, user("Is there a duck?", HORSES))
    assert again.usage.prompt_tokens_details.cached_tokens > 9
    assert again.model_extra["timings"]["prompt_n"] < 20


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    message = user("Describe the image", HORSES)
    first, *chunks, last, numbers = ask(
        client, message, stream=True, stream_options={"include_usage": True}
    )
    assert first.choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    whole = ask(client, message)
    assert len(pieces) > 5
    assert "".join(pieces) == text_of(whole)
    assert last.choices[0].finish_reason == "stop"
    assert numbers.choices == []
    assert numbers.usage.completion_tokens == whole.usage.completion_tokens
    assert numbers.model_extra["timings"]["predicted_n"] == whole.usage.completion_tokens
    assert first.usage is last.usage is None
    without = list(ask(client, message, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_conversations_pictures_and_roles(client: OpenAI, engine_demo: OmniVLM) -> None:
    """The demo was trained on single questions: the last one, with the latest pictures, counts."""
    for role in ("system", "developer"):
        messages = [
            {"role": role, "content": "You are brief."},
            user("Is there an egg?", SHOPPING),
            {"role": "assistant", "content": "Yes."},
            user("Is there a duck?", SHOPPING, HORSES),
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            {"role": "user", "content": "How many\nhorses?", "name": "me"},
        ]
        pictures = (EXAMPLES / "shopping.png", EXAMPLES / "horses.png")
        want = engine_demo.answer(
            list(pictures),
            "How many\nhorses?",
            GenerateOptions(max_tokens=24),
            system="You are brief.",
        )
        response = ask(client, *messages)
        assert text_of(response) == want.text
        assert response.usage.prompt_tokens == want.prompt_tokens


def test_conversations_of_models_that_know_them(tmp_path: Path, tiny_model: Path) -> None:
    """Their turns are all there: the prompt is the engine's."""
    with OmniVLM(tiny_model, device="cpu", n_threads=2, disk_cache=False, n_ctx=1024) as model:
        assert not model.single_turn
        turns = [
            Turn("One?", (EXAMPLES / "horses.png",), "Yes."),
            Turn("Two?", (EXAMPLES / "shopping.png", EXAMPLES / "horses.png"), "No."),
            Turn("Three?"),
        ]
        generation = model.prepare(turns, GenerateOptions(max_tokens=2))
    app = App(tiny_model)
    body = {
        "messages": [
            user("One?", HORSES),
            {"role": "assistant", "content": "Yes."},
            user("Two?", SHOPPING, HORSES),
            {"role": "assistant", "content": "No."},
            user("Three?"),
        ],
        "max_tokens": 2,
    }
    with app:
        reply = app.post(body)
        assert reply.json["usage"]["prompt_tokens"] == generation.n_prompt
        assert reply.json["usage"]["prompt_tokens_details"]["image_tokens"] % 3 == 0


def test_several_choices(client: OpenAI) -> None:
    message = user("Who are you?")
    greedy = ask(client, message, n=3)
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in greedy.choices}) == 1
    warm = {"temperature": 2, "seed": 7, "top_p": 1, "extra_body": {"top_k": 0, "min_p": 0}}
    choices = ask(client, message, n=3, **warm).choices
    texts = [choice.message.content for choice in choices]
    assert len(set(texts)) > 1
    again = ask(client, message, n=3, **warm).choices
    assert [choice.message.content for choice in again] == texts
    pieces = ["", "", ""]
    for chunk in ask(client, message, n=3, stream=True, **warm):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == texts
    with pytest.raises(openai.BadRequestError, match="n is 5: it must be at most 4"):
        ask(client, message, n=5)


def test_logprobs(client: OpenAI, engine_demo: OmniVLM) -> None:
    want = engine_demo.answer(
        EXAMPLES / "horses.png",
        "Is there a duck?",
        GenerateOptions(max_tokens=24, top_logprobs=3),
    )
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    message = user("Is there a duck?", HORSES)
    found = ask(client, message, **options).choices[0].logprobs.content
    assert "".join(token.token for token in found) == want.text
    for token, logprob in zip(found, want.logprobs, strict=True):
        assert bytes(token.bytes) == logprob.token
        assert token.logprob == pytest.approx(logprob.logprob, abs=1e-3)
        assert token.logprob == token.top_logprobs[0].logprob
        assert len(token.top_logprobs) == 3
    streamed = [
        token.token
        for chunk in ask(client, message, stream=True, **options)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == [token.token for token in found]
    assert ask(client, message).choices[0].logprobs is None


def test_stop_strings(client: OpenAI) -> None:
    message = user("Describe the image", HORSES)
    whole = text_of(ask(client, message))
    for stop in ("one duck near", ["zebra", "ree hor"], "a string of more than 16 characters"):
        response = ask(client, message, stop=stop)
        stops = [stop] if isinstance(stop, str) else stop
        ends = [whole.find(text) for text in stops if text in whole]
        want = whole[: min(ends, default=len(whole))]
        assert text_of(response) == want
        assert response.choices[0].finish_reason == "stop"
        pieces = [
            choice.delta.content or ""
            for chunk in ask(client, message, stop=stop, stream=True)
            for choice in chunk.choices
        ]
        assert "".join(pieces) == want


def test_json_answers(client: OpenAI) -> None:
    message = user("How many carrots are there?", SHOPPING)
    schema = {
        "type": "object",
        "properties": {
            "carrots": {"type": "integer", "minimum": 0, "maximum": 9},
            "day": {"type": "string", "pattern": "^20[0-9]{2}-[0-9]{2}-[0-9]{2}$"},
        },
        "required": ["carrots", "day"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    found = json.loads(text_of(ask(client, message, response_format=form, max_tokens=60)))
    assert list(found) == ["carrots", "day"]
    assert found["carrots"] in range(10)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["day"])
    response = ask(client, message, response_format={"type": "json_object"})
    assert text_of(response).startswith("{")
    plain = ask(client, message, response_format={"type": "text"})
    assert text_of(plain) == text_of(ask(client, message))


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert model.model_extra["meta"]["image_tokens"] == 9
    assert client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError, match="no model 'other' here: it is 'demo'"):
        client.models.retrieve("other")


def test_files_below_the_media_path(client: OpenAI) -> None:
    want = text_of(ask(client, user("Describe the image", HORSES)))
    assert text_of(ask(client, user("Describe the image", "file://horses.png"))) == want
    for url in ("file:///etc/passwd", "file://../horses.png", "file://none.png"):
        with pytest.raises(openai.BadRequestError, match="is no file below"):
            ask(client, user("Describe the image", url))


def test_messages_in_any_order(client: OpenAI, engine_demo: OmniVLM) -> None:
    options = GenerateOptions(max_tokens=24)

    def system(text: str) -> dict[str, Any]:
        return {"role": "system", "content": text}

    def said(text: str | None) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    picture = (EXAMPLES / "horses.png",)
    want = engine_demo.answer(list(picture), "Describe the image", options)
    assert text_of(ask(client, user("", HORSES), user("Describe the image"))) == want.text
    messages = [said("Hello!"), user("Describe the image", HORSES), said(None), said("")]
    assert text_of(ask(client, *messages)) == want.text
    want = engine_demo.answer(list(picture), "How many?\n\nHorses.", options, system="A\n\nB")
    messages = [system("A"), user("How many?", HORSES), system("B"), user("Horses.")]
    assert text_of(ask(client, *messages)) == want.text


def test_an_answer_that_was_begun_is_continued(client: OpenAI) -> None:
    message = user("Describe the image", HORSES)
    whole = text_of(ask(client, message))
    begun = " ".join(whole.split()[:3])
    for continued in (
        text_of(ask(client, message, {"role": "assistant", "content": begun})),
        "".join(
            chunk.choices[0].delta.content or ""
            for chunk in ask(client, message, {"role": "assistant", "content": begun}, stream=True)
        ),
    ):
        assert continued.startswith(" ")
        assert begun + continued == whole


def test_no_more_tokens_than_fit(client: OpenAI, engine_demo: OmniVLM) -> None:
    message = user("Is there a horse?")
    usual = ask(client, message)
    for more in (10**9, -1):
        assert text_of(ask(client, message, max_tokens=more)) == text_of(usual)
    full = ask(client, message, max_tokens=-1, logit_bias={token: -100 for token in ENDS})
    assert full.choices[0].finish_reason == "length"
    n_ctx = client.models.list().data[0].model_extra["meta"]["n_ctx"]
    assert full.usage.total_tokens == n_ctx


def test_penalties_and_biases(client: OpenAI) -> None:
    message = user("Describe the image", HORSES)
    ducks = ask(client, message, logit_bias={TOKENS["Ġducks"]: 100}, max_tokens=5)
    assert text_of(ducks) == " ".join(["ducks"] * 5)
    on_and_on = {"logit_bias": {token: -100 for token in ENDS}, "max_tokens": 100}
    usual = text_of(ask(client, message, **on_and_on))
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert text_of(ask(client, message, **on_and_on, **{penalty: 2})) != usual
        assert text_of(ask(client, message, **on_and_on, **{penalty: 0})) == usual


# --- the original runtime's clients ---------------------------------------------------------------


def original(text: str, **image: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": image}]
    return {"messages": [{"role": "user", "content": parts}]}


def test_the_original_endpoint(server: Server, client: OpenAI) -> None:
    want = text_of(ask(client, user("Describe the image", HORSES)))
    for image in ({"url": HORSES}, {"url": HORSES.partition(",")[2]}, {"path": "horses.png"}):
        reply = server.post(original("Describe the image", **image), ORIGINAL).json
        assert sorted(reply) == ["choices", "created", "id", "object"]
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": want}
    body = original("Describe the image", url=HORSES) | {"stream": True}
    *chunks, speed, done = server.post(body, ORIGINAL).body.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    assert sorted(json.loads(speed.removeprefix("metrics: "))) == ["decoding_speed", "ttft"]
    values = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert "".join(value["choices"][0]["delta"]["content"] for value in values) == want
    cut = server.post(body | {"stream": False, "stop_words": [" three"], "top_k": 1}, ORIGINAL)
    assert cut.json["choices"][0]["message"]["content"] == want.partition(" three")[0]
    refused = server.post({"messages": [{"role": "user", "content": "hi"}]}, ORIGINAL)
    assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")


# --- bad input ------------------------------------------------------------------------------------

PNG = "data:image/png;base64,"


def bomb() -> str:
    return data_uri(Image.new("1", (9000, 9000)))


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return question("x", response_format=form)


BAD: dict[str, tuple[Any, str, str]] = {
    "nothing": (b"", "invalid_request_error", "the body"),
    "not JSON": (b"{", "invalid_request_error", "the body is not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "invalid_request_error", "the body is not JSON"),
    "too deep": (b"[" * 100_000, "invalid_request_error", "the body is not JSON"),
    "a list": (b"[]", "invalid_request_error", "the body"),
    "no messages": ({}, "invalid_request_error", "messages: Field required"),
    "empty messages": ({"messages": []}, "invalid_request_error", "messages: "),
    "wrong types": ({"messages": 3}, "invalid_request_error", "messages: "),
    "a text as a number": (question("x", max_tokens="3"), "invalid_request_error", "max_tokens: "),
    "out of range": (question("x", temperature=3), "invalid_request_error", "temperature: "),
    "not a number": (
        json.dumps(question("x", top_p=float("nan"))).encode(),
        "invalid_request_error",
        "top_p",
    ),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "invalid_request_error",
        "messages.0.content.0: Input tag 'audio'",
    ),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "invalid_request_error",
        "messages.0.role: ",
    ),
    "nothing of the user's": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        "invalid_request_error",
        "messages hold none of the user's",
    ),
    "a user's null": (
        {"messages": [{"role": "user", "content": None}]},
        "invalid_request_error",
        "messages[0] must have content",
    ),
    "a token twice": (
        question("x", logit_bias={"5": 1, "05": 1}),
        "invalid_request_error",
        "logit_bias names '05'",
    ),
    "no completion tokens": (
        question("x", max_completion_tokens=0),
        "invalid_request_error",
        "max_completion_tokens is 0",
    ),
    "no question": ({"messages": [user("", HORSES)]}, "invalid_request_error", "has no text"),
    "half a character": (question("\ud800"), "invalid_request_error", "UTF-8"),
    "half a character in an address": (
        question("x", "\ud800://x"),
        "invalid_request_error",
        "no address",
    ),
    "tools": (
        question("x", tools=[{}]),
        "invalid_request_error",
        "tools are not supported by this",
    ),
    "a bias of no token": (
        question("x", logit_bias={"a": 1}),
        "invalid_request_error",
        "logit_bias names 'a': it must be a token's id",
    ),
    "a bias of a token there is not": (
        question("x", logit_bias={"999999": 1}),
        "invalid_request_error",
        "logit_bias names the token 999999",
    ),
    "a large bias": (question("x", logit_bias={"1": 101}), "invalid_request_error", "logit_bias.1"),
    "a large penalty": (
        question("x", frequency_penalty=2.1),
        "invalid_request_error",
        "frequency_penalty: ",
    ),
    "no tokens": (question("x", max_tokens=0), "invalid_request_error", "max_tokens is 0"),
    "17 stops": (question("x", stop=["a"] * 17), "invalid_request_error", "stop"),
    "an empty stop": (question("x", stop=[""]), "invalid_request_error", "stop"),
    "logprobs without": (question("x", top_logprobs=2), "invalid_request_error", "logprobs"),
    "a long prompt": (question("x" * 10_000), "exceed_context_size_error", "do not fit"),
    "too many pictures": (
        question("x", *["data:,x"] * 600),
        "exceed_context_size_error",
        "600 pictures do not fit",
    ),
    "broken base64": (question("x", PNG + "%%%"), "invalid_request_error", "data URI is damaged"),
    "no picture": (
        question("x", HORSES, PNG + "aGFsbG8="),
        "invalid_request_error",
        "picture 2: is not a picture of a kind that can be read here, such as JPEG",
    ),
    "no picture, with a name": (
        question("x", "data:image/png;name=my%20cat.png;base64,aGFsbG8="),
        "invalid_request_error",
        "my cat.png: is not a picture",
    ),
    "an empty address": (question("x", ""), "invalid_request_error", "1: its address is empty"),
    "half a picture": (question("x", HORSES[: len(HORSES) // 8 * 4]), "invalid_request_error", ""),
    "a bomb": (question("x", bomb()), "invalid_request_error", "pixels"),
    "an address": (question("x", "http://127.0.0.1/"), "invalid_request_error", "--allow-urls"),
    "a path": (
        question("x", "/etc/passwd"),
        "invalid_request_error",
        "'/etc/passwd' is no address",
    ),
    "no schema": (
        question("x", response_format={"type": "json_schema"}),
        "invalid_request_error",
        "response_format",
    ),
    "no such schema": (schema({"$ref": "#/none"}), "invalid_request_error", "JSON schema"),
    "a schema of nothing": (schema({"enum": []}), "invalid_request_error", "grammar"),
    "a schema of nothing, and a stream": (
        schema({"properties": {"secret": {"enum": []}}}) | {"stream": True},
        "invalid_request_error",
        "grammar",
    ),
    "a large schema": (schema({"enum": ["x" * 70_000]}), "invalid_request_error", "64 KiB"),
    "a large grammar": (schema({"enum": ["x" * 40_000]}), "invalid_request_error", "simpler"),
    # llama.cpp would be busy with these for minutes, and everybody would wait.
    "a slow pattern": (
        schema({"anyOf": [{"type": "string", "pattern": "^(a?){200}$"}]}),
        "invalid_request_error",
        "64 choices",
    ),
    "another": (
        schema({"type": "string", "pattern": "^" + "a?" * 100 + "$"}),
        "invalid_request_error",
        "64 choices",
    ),
    "a nested one": (
        schema({"type": "string", "pattern": "^((((a?){9}){9}){9}){9}$"}),
        "invalid_request_error",
        "64 choices",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(server: Server, name: str) -> None:
    body, kind, message = BAD[name]
    for path in (CHAT, ORIGINAL) if isinstance(body, bytes) else (CHAT,):
        reply = server.post(body, path)
        assert reply.status == 400, reply.body
        assert reply.error["type"] == kind
        assert message in reply.error["message"]
        assert reply.error["code"] == 400
        assert len(reply.body) < 1000
        assert not re.search(r"\(-|pip install|/clear|its path", reply.error["message"])
    for line in server.lines:  # nothing else, such as llama.cpp's words, is written there
        assert line.startswith("Listening on") or json.loads(line)
    assert "secret" not in "".join(server.lines)


def test_clients_are_told_facts_and_no_advice_for_the_command_line() -> None:
    error = ImageError("cat.heic: is a HEIC picture", 'pip install "omnivlm-edge[heif]" adds it')
    assert str(error) == 'cat.heic: is a HEIC picture: pip install "omnivlm-edge[heif]" adds it'
    status, body, _ = describe_error(error)
    assert (status, body["error"]["message"]) == (400, "cat.heic: is a HEIC picture")
    status, body, _ = describe_error(ModelFileError("/home/me/model.gguf: is damaged"))
    assert (status, "/home" in body["error"]["message"]) == (500, False)


def test_deep_schemas_are_refused_or_followed(server: Server) -> None:
    for depth in (50, 300, 900, 5000):
        deep = b'{"properties":{"a":' * depth + b"{}" + b"}}" * depth
        head = b'{"max_tokens":2,"messages":[{"role":"user","content":"x"}],"response_format":'
        reply = server.post(head + b'{"type":"json_object","schema":' + deep + b"}}")
        assert reply.status in (200, 400), reply.body


def test_unknown_fields_are_ignored(server: Server) -> None:
    more = {"user": "me", "store": True, "metadata": {"a": [1]}, "messages_": 3}
    assert server.post(question("Who are you?") | more).status == 200


def test_errors_have_openais_shape_everywhere(server: Server) -> None:
    for method, path, status, kind in (
        ("GET", "/nothing", 404, "not_found_error"),
        ("GET", CHAT, 405, "invalid_request_error"),
        ("DELETE", "/v1/models", 405, "invalid_request_error"),
        ("GET", "/static-offline-docs/../../gate.py", 404, "not_found_error"),
    ):
        reply = server.request(method, path)
        assert (reply.status, reply.error["type"]) == (status, kind)
        assert reply.headers["x-request-id"]


def test_only_json_is_understood(server: Server) -> None:
    """A page of another origin can send other kinds without being asked for its own."""
    lax = ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "")
    page: dict[str, str]
    for page in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Referer": "http://evil.example/page"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        for kind in lax:
            reply = server.post(question("x"), Content_Type=kind, **page)
            assert (reply.status, reply.error["type"]) == (415, "invalid_request_error")
    assert server.post(question("x"), Content_Type="multipart/form-data").status == 415
    for kind in (*lax, "Application/JSON; charset=utf-8"):
        assert server.post(question("x"), Content_Type=kind).status == 200
    body = json.dumps(question("x")).encode()
    with server.connect() as connection:
        connection.sendall(raw_post(body).replace(b"Content-Type: application/json\r\n", b""))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_no_page_can_reach_it_by_another_name(server: Server) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", ""):
        for reply in (server.get("/v1/models", Host=host), server.post(question("x"), Host=host)):
            assert (reply.status, reply.error["type"]) == (403, "permission_error")
    assert "'evil.example'" in server.get("/v1/models", Host="evil.example").error["message"]
    assert "--allowed-host" in server.get("/v1/models", Host="evil.example").error["message"]
    for host in (
        "localhost",
        "localhost.",
        f"omnivlm.localhost:{server.port}",
        f"LOCALHOST:{server.port}",
        "[::1]",
        f"[::1]:{server.port}",
    ):
        assert server.get("/v1/models", Host=host).status == 200
    with server.connect() as connection:  # a probe, such as a load balancer's
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    reply = server.request("OPTIONS", CHAT, headers={"Origin": "http://evil.example"})
    assert reply.status == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


# --- faults ---------------------------------------------------------------------------------------


def test_a_client_that_goes_frees_its_place(server: Server) -> None:
    with busy(server, 4):
        wait_for(lambda: server.metric("requests_processing") == 4)
    wait_for(lambda: idle(server))  # its clients have hung up; the answers had many tokens to go
    wait_for(lambda: sum(entry["status"] == 499 for entry in server.log()) >= 4)
    body = json.dumps(question("x", max_tokens=LONG, **ENDLESS)).encode()
    with server.connect() as connection:  # one that waits for a whole answer
        connection.sendall(raw_post(body))
        wait_for(lambda: server.metric("requests_processing") == 1)
    wait_for(lambda: idle(server))
    assert server.post(question("Who are you?")).status == 200


def test_half_a_body_disturbs_nobody(server: Server) -> None:
    with server.connect() as half, server.connect() as head:
        half.sendall(raw_post(b'{"messages": [', 1000))
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        assert server.post(question("Who are you?")).status == 200
    wait_for(lambda: any(entry["status"] == 499 for entry in server.log()))


def test_bytes_that_are_no_request(server: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"GET\r\n\r\n", b"\0" * 999):
        with server.connect() as connection:
            connection.sendall(data)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.get("/health").status == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_and_the_client_sees_why(server: Server, announced: bool) -> None:
    size = 50 * 2**20
    with server.connect() as connection:
        if announced:
            connection.sendall(raw_post(b"x" * size))  # it listens when it has sent all
        else:
            head, _, _ = raw_post(b"").partition(b"Content-Length")
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(50):
                connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"32 MiB" in answer
    assert size > MAX_BODY


def test_a_client_that_asks_before_it_sends(server: Server) -> None:
    """`Expect: 100-continue`, as curl does it: what is refused need not be sent."""
    refused = raw_post(b"", 50 * 2**20).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(refused)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    body = json.dumps(question("Who are you?")).encode()
    head, _, _ = raw_post(body).partition(b"\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_closes_sees_the_413(server: Server) -> None:
    """Python's urllib: `Connection: close`, and it listens when it has sent all."""
    body = urllib.request.Request(
        server.url + CHAT, b"x" * (50 * 2**20), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(body, timeout=60)
    assert caught.value.code == 413
    assert "32 MiB" in json.loads(caught.value.read())["error"]["message"]


def test_openais_client_sees_the_413(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user("x", PNG + "A" * (40 * 2**20)))
    assert caught.value.status_code == 413


def test_a_full_queue_is_refused(server: Server) -> None:
    with busy(server, 8):
        reply = server.post(question("x"))
        assert (reply.status, reply.error["type"]) == (503, "unavailable_error")
        assert int(reply.headers["retry-after"]) >= 1
        assert server.get("/health").status == 200
    wait_for(lambda: idle(server))
    with busy(server, 6):  # answers count, not requests
        assert server.post(question("x", n=3)).status == 503
        assert server.post(question("x", max_tokens=1)).status == 200
    wait_for(lambda: idle(server))


def test_the_log_has_no_content(server: Server) -> None:
    reply = server.post(question("Where is the secret?", HORSES), X_Request_Id="my-request.7")
    assert reply.headers["x-request-id"] == "my-request.7"
    wait_for(lambda: any(entry["request_id"] == "my-request.7" for entry in server.log()))
    (entry,) = (entry for entry in server.log() if entry["request_id"] == "my-request.7")
    assert entry["path"] == CHAT
    assert (entry["method"], entry["status"], entry["client"]) == ("POST", 200, "127.0.0.1")
    assert entry["completion_tokens"] > 0
    assert entry["ms"] > entry["ttft_ms"] > 0
    assert "secret" not in "".join(server.lines)
    other = server.get("/health", X_Request_Id="no id\t").headers["x-request-id"]
    assert len(other) == 32


def test_metrics(server: Server) -> None:
    before = server.metric("tokens_predicted_total")
    response = server.post(question("Describe the image", HORSES)).json
    after = server.metric("tokens_predicted_total")
    assert after - before == response["usage"]["completion_tokens"]
    text = server.get("/metrics").body.decode()
    for name in ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_seconds_total"):
        assert f"\nomnivlm_{name} " in text
    assert f'omnivlm_requests_total{{path="{CHAT}",status="200"}}' in text
    server.get("/some/path/of/a/stranger")
    assert "stranger" not in server.get("/metrics").body.decode()


def test_heads_are_answered(server: Server) -> None:
    for path in ("/health", "/", "/v1/models"):
        reply = server.request("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) == len(server.get(path).body)
    assert server.request("HEAD", CHAT).status == 405


def test_the_documentation_needs_no_other_host(server: Server) -> None:
    page = server.get("/docs").body.decode()
    assert "https://" not in page.replace("https://github.com", "")
    paths = server.get("/openapi.json").json["paths"]
    assert {CHAT, ORIGINAL, "/v1/models", "/health", "/metrics"} <= set(paths)
    assert "422" not in paths[CHAT]["post"]["responses"]
    policy = server.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")


# --- processes of their own -----------------------------------------------------------------------


def test_an_api_key(tmp_path: Path) -> None:
    with Server("--preload", OMNIVLM_API_KEY="sésame") as server:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert server.get(path).status == 200
        for path in ("/v1/models", "/metrics", "/v1/models/demo", "/docs/../v1/models"):
            assert server.get(path).status in (401, 404)
            assert b"demo" not in server.get(path).body
        for given in ("", "sésame", "Bearer", "Bearer ", "Bearer sesame", "Basic sésame"):
            value = given.encode().decode("latin-1")
            reply = server.post(question("x"), Authorization=value)
            assert (reply.status, reply.error["type"]) == (401, "authentication_error")
            assert reply.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            ask(server.openai("wrong"), user("x"))
        right = "Bearer sésame".encode().decode("latin-1")
        assert server.post(question("x"), Authorization=right).status == 200
        assert "same" not in "".join(server.lines)
        described = server.get("/openapi.json").json
        assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert described["paths"][CHAT]["post"]["security"] == [{"HTTPBearer": []}]
        assert "security" not in described["paths"]["/health"]["get"]


@pytest.mark.parametrize("key", ["", "two words", " key"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    result = subprocess.run(
        [*COMMAND, "serve", "demo", "--api-key", key], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "must not be empty" in result.stderr


def test_names_of_this_machine() -> None:
    options = ["--allowed-host", "Box.example.", "--cors-origin", "HTTP://a.example:80/"]
    with Server(*options, "--preload", OMNIVLM_ALLOWED_HOST="ignored.example") as server:
        assert not [line for line in server.lines if "Warning" in line]
        origin = {"Origin": "http://a.example"}
        for host in ("box.example", f"BOX.example:{server.port}", "localhost"):
            reply = server.get("/v1/models", Host=host, **origin)
            assert reply.status == 200
            assert reply.headers["access-control-allow-origin"] == "http://a.example"
        assert server.get("/v1/models", Host="a.example").status == 403
    with Server("--host", "0.0.0.0", OMNIVLM_ALLOWED_HOST="a.example b.example") as server:
        assert "--api-key" in server.lines[0]
        wait_for(lambda: server.get("/health").status == 200)
        assert server.get("/health", Host="b.example").status == 200
        assert server.get("/health", Host="c.example").status == 403


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cors-origin", "a.example", "is no origin such as http://a.example:3000"),
        ("--cors-origin", "http://a.example/page", "is no origin"),
        ("--allowed-host", "http://a.example", "is no name such as a.example"),
        ("--allowed-host", "a.example:80", "is no name"),
        ("--allowed-host", "b\u00fccher.example", "is no name"),
        ("--cors-origin", "http://b\u00fccher.example", "is no origin"),
    ],
)
def test_origins_and_hosts_that_are_none(option: str, value: str, message: str) -> None:
    command = [*COMMAND, "serve", "demo", option, value]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("name", "local"),
    [
        *((name, True) for name in ("LOCALHOST", "a.localhost.", "127.1.2.3", "[::1]", "::1")),
        *((name, True) for name in ("::ffff:127.0.0.1", "0:0:0:0:0:0:0:1", "ip6-localhost")),
        *((name, False) for name in ("0.0.0.0", "::", "192.168.1.5", "localhost.example", "")),
    ],
)
def test_what_is_this_machine(name: str, local: bool) -> None:
    assert is_local(name) == local


def test_two_servers_on_one_port(server: Server) -> None:
    command = [*COMMAND, "serve", "demo", "--device", "cpu", "--port", str(server.port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: port {server.port} of 127.0.0.1 cannot be had (Address already in use): "
        "is another server running? choose another with --port\n"
    )


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    files = find_model("demo")
    shutil.copy(files.mmproj, tmp_path)
    (tmp_path / files.text.name).write_bytes(files.text.read_bytes()[:-100_000])
    command = [*COMMAND, "serve", str(tmp_path), "--device", "cpu", "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}")
    assert "Traceback" not in result.stderr


def test_sigterm_under_load_finishes_what_runs() -> None:
    with Server("--parallel", 2, "--queue", 2, "--preload") as server:
        body = json.dumps(question("Tell me a story.", max_tokens=LONG, stream=True, **ENDLESS))
        streams = []
        for _ in range(3):
            streams.append(server.connect())
            streams[-1].sendall(raw_post(body.encode()))
        wait_for(lambda: server.metric("requests_processing") == 2)
        wait_for(lambda: server.metric("requests_deferred") == 1)
        server.process.send_signal(signal.SIGTERM)
        texts = [read_all(connection).decode() for connection in streams]
        texts.sort(key=len)
        for text in texts[1:]:
            assert text.count('"content":') > 50
            assert '"finish_reason":"length"' in text
            assert "data: [DONE]" in text
        assert '"unavailable_error"' in texts[0]
        assert server.wait() == 0
        loaded, finishing = server.said()
        assert loaded.startswith("the model is loaded (")
        assert finishing == "finishing 2 answers; Ctrl-C or SIGTERM again to stop at once"


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_second_signal_ends_it_at_once() -> None:
    with Server("--preload", exit_code=130) as server, busy(server):
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: not accepts(server))
        assert server.process.poll() is None  # an answer is being finished
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130


def accepts(server: Server) -> bool:
    try:
        server.connect().close()
    except OSError:
        return False
    return True


def test_sleeping_waking_and_a_model_that_was_removed(tmp_path: Path) -> None:
    files = find_model("demo")
    model = tmp_path / "model"
    shutil.copytree(files.text.parent, model)
    with Server("--sleep-idle-seconds", "0.5", model=model) as server:
        wait_for(lambda: server.get("/health").status == 200)
        want = server.post(question("Describe the image", HORSES))
        assert want.status == 200
        with busy(server) as (connection,):
            shutil.move(model, tmp_path / "elsewhere")
            rest = read_all(connection)
        assert b'"finish_reason":"length"' in rest
        assert b"data: [DONE]" in rest
        wait_for(lambda: server.metric("sleeping") == 1)
        assert server.get("/health").status == 200
        for stream in (False, True):
            gone = server.post(question("Describe the image", HORSES, stream=stream))
            assert (gone.status, gone.error["type"]) == (503, "unavailable_error")
            assert str(tmp_path) not in gone.error["message"]
        wait_for(lambda: sum(str(tmp_path) in line for line in server.said()) == 2)
        assert "cannot be loaded" in server.get("/health").error["message"]
        shutil.move(tmp_path / "elsewhere", model)
        wait_for(lambda: server.get("/health").status == 200)  # it tries again by itself
        again = server.post(question("Describe the image", HORSES))
        assert again.json["choices"] == want.json["choices"]


# --- inside the process: what takes too long, or a certain state ----------------------------------


class App:
    """The application over a scheduler of its own; requests are put to it without a network."""

    def __init__(self, model: Path, rules: GateRules | None = None, **settings: Any) -> None:
        self._model = model
        self._rules = rules or GateRules()
        self._settings = settings
        self.release = threading.Event()  # the model is loaded
        self.release.set()

    def _load(self) -> OmniVLM:
        assert self.release.wait(60)
        model = OmniVLM(
            self._model, device="cpu", n_threads=2, disk_cache=False, n_sequences=2, n_ctx=1024
        )
        self.facts = describe_model(model)
        return model

    def __enter__(self) -> App:
        self.facts = None
        self.scheduler = Scheduler(self._load, n_parallel=2, n_queue=4)
        if self.release.is_set():
            self.scheduler.wait_until_loaded()
        options = {"name": "tiny", "n_parallel": 2, "seconds": 60.0, "gate": self._rules}
        settings = Settings(**{**options, **self._settings})
        self.app = create_app(self.scheduler, lambda: self.facts, settings)
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.scheduler.close()

    def post(self, body: Any, **headers: str) -> Reply:
        return self.request("POST", CHAT, json.dumps(body).encode(), **headers)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        return asyncio.run(self.call(method, path, [body], headers))

    async def call(
        self,
        method: str,
        path: str,
        chunks: list[bytes],
        headers: dict[str, str] | None = None,
        *,
        pause: float = 0.0,
        stuck_after: int = 10**9,
    ) -> Reply:
        """A client that `pause`s before each chunk, and takes so many pieces of its answer."""
        left = list(chunks)
        sent: list[Any] = []

        async def receive() -> Any:
            if not left:
                await asyncio.sleep(60)
            await asyncio.sleep(pause)
            chunk = left.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        async def send(message: Any) -> None:
            if len(sent) >= stuck_after:
                await asyncio.sleep(60)
            sent.append(message)

        given = {"host": "localhost", "content-type": "application/json"}
        given |= {name.lower().replace("_", "-"): text for name, text in (headers or {}).items()}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), text.encode()) for name, text in given.items()],
        }
        await self.app(scope, receive, send)
        found = {name.decode(): text.decode() for name, text in sent[0]["headers"]}
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return Reply(sent[0]["status"], found, body)


def test_a_slow_body(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    with App(tiny_model) as app:
        reply = asyncio.run(app.call("POST", CHAT, [b"{"] * 99, pause=0.01))
        assert (reply.status, reply.error["type"]) == (408, "invalid_request_error")
        assert app.post(question("x")).status == 200


def test_a_client_that_takes_nothing_counts_as_gone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.1)
    with App(tiny_model) as app:
        body = json.dumps(question("x", max_tokens=400, stream=True)).encode()
        reply = asyncio.run(app.call("POST", CHAT, [body], stuck_after=3))
        assert (reply.status, b"[DONE]" in reply.body) == (200, False)
        wait_for(lambda: app.scheduler.n_running == 0)
        assert app.post(question("x")).status == 200


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of one that its client closed nothing is left."""
    made: list[weakref.ref[Any]] = []
    monkeypatch.setattr(process, "_REQUEST_SECONDS", 1000)

    async def connect() -> None:
        config = uvicorn.Config(lambda: None, http=process._Protocol)
        config.load()

        def protocol() -> process._Protocol:
            new = process._Protocol(config, ServerState(), {})
            made.append(weakref.ref(new))
            return new

        loop = asyncio.get_running_loop()
        listener = await loop.create_server(protocol, "127.0.0.1", 0)
        address = listener.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(*address)
        writer.write(b"GET")
        writer.close()
        while not made or made[0]() is not None:
            await asyncio.sleep(0.01)
            gc.collect()
        monkeypatch.setattr(process, "_REQUEST_SECONDS", 0.1)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nHost: ")
        assert await reader.read() == b""
        writer.close()
        listener.close()

    asyncio.run(asyncio.wait_for(connect(), 30))


def test_while_the_model_is_loaded(tiny_model: Path) -> None:
    app = App(tiny_model)
    app.release.clear()
    with app:
        for reply in (app.request("GET", "/health"), app.post(question("x"))):
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
            assert reply.error == {
                "message": LOADING,
                "type": "unavailable_error",
                "param": None,
                "code": 503,
            }
        assert app.request("GET", "/").status == 200
        app.release.set()
        app.scheduler.wait_until_loaded()
        assert app.request("GET", "/health").json == {"status": "ok"}


def test_an_answer_that_takes_too_long(tiny_model: Path) -> None:
    with App(tiny_model, seconds=0.002) as app:
        body = question("x", max_tokens=900)
        reply = app.post(body)
        assert (reply.status, reply.error["type"]) == (504, "timeout_error")
        streamed = app.post(body | {"stream": True}).body.decode().strip().split("\n\n")
        assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == 504


def test_cors_only_for_those_who_are_named(tiny_model: Path) -> None:
    origin = {"Origin": "http://app.example"}
    ask_first = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    with App(tiny_model, GateRules(api_key="k"), origins=["http://app.example"]) as app:
        allowed = app.request("OPTIONS", CHAT, **ask_first)
        assert allowed.status == 200
        assert allowed.headers["access-control-allow-origin"] == "http://app.example"
        refused = app.request("GET", "/v1/models", **origin)
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "http://app.example"
        other = app.request("OPTIONS", CHAT, **ask_first | {"Origin": "http://evil.example"})
        assert other.status == 400
        assert "access-control-allow-origin" not in other.headers


def test_questions_and_answers_are_logged_when_that_is_wanted(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "omnivlm_edge.access"), App(tiny_model, log_content=True) as app:
        text = app.post(question("What?")).json["choices"][0]["message"]["content"]
    entry = json.loads(caplog.messages[-1])
    assert (entry["question"], entry["answers"]) == ("What?", [text])


def test_ocr_models_take_a_picture_alone(tiny_ocr_model: Path) -> None:
    with App(tiny_ocr_model) as app:
        assert not app.request("GET", "/v1/models").json["data"][0]["meta"]["takes_questions"]
        body = {"messages": [user("", HORSES)], "max_tokens": 2}
        assert app.post(body).status == 200
        assert app.post({"messages": [user("x")]}).status == 400


def test_mistakes_of_ours_are_500_and_stay_in_the_log(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with App(tiny_model) as app:
        monkeypatch.setattr(OmniVLM, "prepare", lambda *_, **__: 1 / 0)
        reply = app.post(question("x"))
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        monkeypatch.undo()
        monkeypatch.setattr("omnivlm_edge.server.app.read_form", lambda _: 1 / 0)
        reply = app.post(question("x"))
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert b"division" not in reply.body
        monkeypatch.undo()
        assert app.post(question("x")).status == 200
    assert caplog.text.count("ZeroDivisionError") == 2


# --- whatever the schema allows, and does not -----------------------------------------------------


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> Iterator[Any]:
    with App(tiny_model, seconds=60.0) as app:
        yield schemathesis.openapi.from_asgi("/openapi.json", app.app)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_no_request_breaks_it(api: Any, mode: GenerationMode) -> None:
    for result in api.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing could be wrong

        @hypothesis.seed(7)
        @hypothesis.settings(max_examples=25, deadline=None, database=None)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            # A body may be as the schema says and still ask for what cannot be.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
