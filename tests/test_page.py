"""The page at `/`, in a real browser, against a server that misbehaves on demand."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fake_openai import POLICY, UNAVAILABLE, FakeOpenAI
from serving import Server

HORSES = Path(__file__).parents[1] / "examples" / "horses.png"
SHOPPING = HORSES.with_name("shopping.png")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE = 20_000  # milliseconds, on a busy machine
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}

# A file that is dropped or pasted, from its bytes in base64.
FILE_EVENT = """([type, name, content]) => {
    const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name));
    const data = type === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
    const Event = type === "paste" ? ClipboardEvent : DragEvent;
    const target = document.activeElement;
    target.dispatchEvent(new Event(type, { ...data, bubbles: true, cancelable: true }));
}"""


expect.set_options(timeout=PATIENCE)


@pytest.fixture
def page_server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or else the one of `playwright install chromium`."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        with playwright.chromium.launch(executable_path=path, args=QUIET.split()) as browser:
            yield browser


class Opened:
    """Opens the page; at the end no request may have left the server, and no script failed."""

    def __init__(self, browser: Browser, server: FakeOpenAI | Server) -> None:
        self._browser, self._server = browser, server
        self._contexts: list[Any] = []
        self._requests: list[str] = []
        self._errors: list[str] = []

    def __call__(self, **options: Any) -> Page:
        context = self._browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        self._contexts.append(context)
        context.on("request", lambda request: self._requests.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: self._errors.append(str(error)))
        page.on("console", self._read_console)
        page.on("filechooser", lambda chooser: None)  # from now on none is the browser's own
        page.goto(self._server.url)
        return page

    def _read_console(self, message: Any) -> None:
        # The statuses that a test asks for are no errors of the page; a broken policy is one.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self._errors.append(message.text)

    def finish(self) -> None:
        for context in self._contexts:
            context.close()
        own = urlsplit(self._server.url).netloc
        assert {urlsplit(url).netloc for url in self._requests if url[:4] == "http"} == {own}
        assert {urlsplit(url).scheme for url in self._requests} <= {"http", "blob", "data"}
        assert self._errors == []


@pytest.fixture
def opened(browser: Browser, page_server: FakeOpenAI) -> Iterator[Opened]:
    opened = Opened(browser, page_server)
    yield opened
    opened.finish()


@pytest.fixture
def page(opened: Opened) -> Page:
    page = opened()
    expect(page.locator("#model")).to_have_text("demo")
    return page


def add(page: Page, *files: Path) -> None:
    page.set_input_files("#file", list(files))
    expect(page.locator(".waiting .seen")).to_have_count(len(files))


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def last(page: Page, part: str) -> Any:
    return page.locator(f".turn:last-child {part}")


def sent_pictures(server: FakeOpenAI) -> list[tuple[str, bytes]]:
    """Kind and bytes of the pictures in the last question."""
    urls = [
        part["image_url"]["url"]
        for message in server.messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    found = (re.fullmatch(r"data:([\w/+-]+);name=[^;,]+;base64,(.*)", url) for url in urls)
    return [(match[1], base64.b64decode(match[2])) for match in found if match]


def canvas(page: Page, selector: str) -> Image.Image:
    url = page.locator(selector).first.evaluate("(canvas) => canvas.toDataURL()")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- asking --------------------------------------------------------------------------------------


def test_a_picture_is_asked_about(page: Page, page_server: FakeOpenAI) -> None:
    add(page, HORSES)
    expect(page.locator(".waiting")).to_contain_text("384 × 384, 81 tokens")
    ask(page, "What is in the picture?")
    expect(last(page, ".answer")).to_have_text("Three horses and one duck.")
    body = page_server.asked[0]
    assert (body["model"], body["stream"]) == ("demo", True)
    assert body["stream_options"] == {"include_usage": True}
    assert page_server.texts() == [("user", "[picture] What is in the picture?")]
    assert sent_pictures(page_server) == [("image/png", HORSES.read_bytes())]
    after = last(page, ".after")
    expect(after).to_contain_text("31.2 tokens/s")
    for stage in (
        "picture 414 ms",
        "prompt 311 ms (95 tokens)",
        "answer 448 ms (14 tokens)",
        "first token 742 ms",
    ):
        expect(after).to_contain_text(stage)


def test_the_answer_is_shown_while_it_is_written(page: Page, page_server: FakeOpenAI) -> None:
    page_server.endless = True
    ask(page, "Count the ducks")
    expect(last(page, ".answer")).to_contain_text("one duck. duck. duck.")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    # A screen reader hears that it begins, and the whole of it once it is there.
    expect(page.locator("#spoken")).to_have_text("Waiting for the answer.")
    page_server.endless = False
    expect(page.locator("#spoken")).to_contain_text("Three horses and one duck.")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_follow_up_questions_send_what_was_said(page: Page, page_server: FakeOpenAI) -> None:
    add(page, HORSES)
    ask(page, "Describe it")
    expect(last(page, ".after")).to_be_visible()
    add(page, SHOPPING)
    ask(page, "And this?")
    expect(page.locator(".after")).to_have_count(2)
    ask(page, "Which is nicer?")
    expect(page.locator(".after")).to_have_count(3)
    answer = ("assistant", "Three horses and one duck.")
    assert page_server.texts() == [
        ("user", "[picture] Describe it"),
        answer,
        ("user", "[picture] And this?"),
        answer,
        ("user", "Which is nicer?"),
    ]
    contents = [content for _, content in sent_pictures(page_server)]
    assert contents == [HORSES.read_bytes(), SHOPPING.read_bytes()]

    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Anyone there?")
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "Anyone there?")]


def test_several_pictures_and_a_removed_one(page: Page, page_server: FakeOpenAI) -> None:
    add(page, HORSES, SHOPPING)
    page.get_by_role("button", name="Remove horses.png").click()
    expect(page.locator(".waiting .seen")).to_have_count(1)
    page.set_input_files("#file", [SHOPPING])
    expect(page.locator(".waiting .seen")).to_have_count(2)
    page.get_by_role("button", name="Describe the image").click()
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "[picture] [picture] Describe the image")]
    assert {content for _, content in sent_pictures(page_server)} == {SHOPPING.read_bytes()}


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_closes_the_connection(page: Page, page_server: FakeOpenAI, by: str) -> None:
    page_server.endless = True
    ask(page, "Go on for ever")
    expect(last(page, ".answer")).to_contain_text("duck")
    assert not page_server.hung_up.is_set()
    if by == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(last(page, ".state")).to_have_text("Stopped.")
    assert page_server.hung_up.wait(20)
    page_server.endless = False
    ask(page, "And now?")
    expect(last(page, ".after")).to_be_visible()
    question, answer, follow_up = page_server.texts()
    assert answer[1].startswith("Three horses and one duck.")  # as far as it came
    assert follow_up == ("user", "And now?")


def test_pictures_of_an_unanswered_question_go_to_the_next(
    page: Page, page_server: FakeOpenAI
) -> None:
    page_server.answer, page_server.endless = [""], True
    add(page, HORSES)
    ask(page, "What is thsi?")
    expect(last(page, ".state")).to_have_text("Looking at the picture…")
    page.keyboard.press("Escape")
    expect(last(page, ".state")).to_have_text("Stopped.")
    page_server.answer, page_server.endless = ["A duck."], False
    ask(page, "What is this?")
    expect(last(page, ".answer")).to_have_text("A duck.")
    assert page_server.texts() == [("user", "[picture] What is this?")]


def test_an_answer_cut_at_the_limit_says_so(page: Page, page_server: FakeOpenAI) -> None:
    page_server.finish_reason = "length"
    ask(page, "Tell me everything")
    expect(last(page, ".state")).to_have_text("The answer was cut off at its limit of tokens.")


def test_answers_and_errors_are_never_markup(page: Page, page_server: FakeOpenAI) -> None:
    markup = "<img src=x onerror='document.title=1'><b>bold</b>"
    page_server.answer, page_server.breaks_with = [markup], markup
    ask(page, markup)
    expect(last(page, ".error p")).to_have_text(markup)
    expect(last(page, ".answer")).to_have_text(markup)
    expect(last(page, ".question")).to_have_text(markup)
    assert page.locator(".turn img, .answer b, .error b").count() == 0


def test_the_answer_is_copied(opened: Opened) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#model")).to_have_text("demo")
    ask(page, "What?")
    page.get_by_role("button", name="Copy the answer").click()
    expect(last(page, ".copy")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Three horses and one duck."


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page: Page, page_server: FakeOpenAI, way: str) -> None:
    content = HORSES.read_bytes()
    page.get_by_label("Your question").focus()
    page.evaluate(FILE_EVENT, [way, "horses.png", base64.b64encode(content).decode()])
    expect(page.locator(".waiting .seen")).to_be_visible()
    ask(page, "What?")
    expect(last(page, ".after")).to_be_visible()
    assert [sent for _, sent in sent_pictures(page_server)] == [content]


def test_the_model_sees_the_picture_upright_and_square(page: Page, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    content = encoded(picture, "JPEG", exif=exif, quality=95, subsampling=0)
    file = {"name": "phone.jpg", "mimeType": "image/jpeg", "buffer": content}
    page.set_input_files("#file", [file])
    expect(page.get_by_role("img", name="phone.jpg as the model sees it")).to_be_visible()
    seen = canvas(page, ".seen")
    upright = picture.transpose(Image.Transpose.ROTATE_270).resize((384, 384))
    assert seen.size == (384, 384)
    difference = ImageChops.difference(seen, upright).convert("L")
    assert sum(difference.histogram()[64:]) < 0.03 * 384 * 384  # but for the edges


def test_transparency_is_seen_on_white(page: Page) -> None:
    content = encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG")
    file = {"name": "clear.png", "mimeType": "image/png", "buffer": content}
    page.set_input_files("#file", [file])
    expect(page.locator(".seen")).to_be_visible()
    assert canvas(page, ".seen").getpixel((200, 200)) == (255, 255, 255)


def test_what_the_browser_cannot_show_is_sent_as_it_is(page: Page, page_server: FakeOpenAI) -> None:
    content = encoded(Image.new("RGB", (30, 20), "red"), "TIFF")
    # Browsers leave the kind of some files empty.
    file = {"name": "scan.TIF", "mimeType": "", "buffer": content}
    page.set_input_files("#file", [file])
    expect(page.locator(".waiting")).to_contain_text("No preview")
    expect(page.locator(".waiting")).to_contain_text("sent as it is")
    ask(page, "What?")
    expect(last(page, ".after")).to_be_visible()
    assert sent_pictures(page_server) == [("image/tiff", content)]


def test_a_large_file_is_sent_as_a_jpeg(
    page: Page, page_server: FakeOpenAI, tmp_path: Path
) -> None:
    path = tmp_path / "big.bmp"
    Image.new("RGB", (4200, 700), "green").save(path)
    assert path.stat().st_size > 8e6
    add(page, path)
    ask(page, "What?")
    expect(last(page, ".after")).to_be_visible()
    ((kind, sent),) = sent_pictures(page_server)
    assert (kind, Image.open(io.BytesIO(sent)).size) == ("image/jpeg", (4096, 683))


def test_a_kind_that_the_server_does_not_read_is_converted(
    page: Page, page_server: FakeOpenAI
) -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='30'/>"
    page.set_input_files("#file", [{"name": "a.svg", "mimeType": "image/svg+xml", "buffer": svg}])
    expect(page.locator(".seen")).to_be_visible()
    ask(page, "What?")
    expect(last(page, ".after")).to_be_visible()
    ((kind, sent),) = sent_pictures(page_server)
    assert (kind, Image.open(io.BytesIO(sent)).size) == ("image/jpeg", (40, 30))


def test_what_is_no_picture_is_refused(page: Page) -> None:
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
    page.set_input_files("#file", [file])
    expect(page.get_by_role("alert")).to_have_text("notes.txt is not a picture.")
    add(page, HORSES)
    expect(page.locator("#notice")).to_be_hidden()


# ---- when things go wrong ------------------------------------------------------------------------


def test_an_error_is_shown_and_the_question_can_be_changed(
    page: Page, page_server: FakeOpenAI
) -> None:
    page_server.failure = (400, "The picture is damaged.", "invalid_request_error", {})
    add(page, HORSES)
    ask(page, "What?")
    expect(page.get_by_role("alert")).to_contain_text("The picture is damaged.")
    page.get_by_role("button", name="Change the question").click()
    expect(page.get_by_label("Your question")).to_have_value("What?")
    expect(page.locator(".turn")).to_have_count(0)
    page_server.failure = None
    page.keyboard.press("Enter")
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "[picture] What?")]


def test_a_refused_picture_does_not_spoil_the_next_question(
    page: Page, page_server: FakeOpenAI
) -> None:
    page_server.failure = (400, "The picture is damaged.", "invalid_request_error", {})
    add(page, HORSES)
    ask(page, "What?")
    expect(page.get_by_role("alert")).to_be_visible()
    page_server.failure = None
    ask(page, "Are you there?")
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "Are you there?")]


def test_a_full_queue_offers_another_try(page: Page, page_server: FakeOpenAI) -> None:
    page_server.failure = (503, "The queue is full.", UNAVAILABLE, {"Retry-After": "2"})
    add(page, HORSES)
    ask(page, "What?")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server is busy. Try again in 2 seconds.")
    page_server.failure = None
    alert.get_by_role("button", name="Try again").click()
    expect(last(page, ".answer")).to_have_text("Three horses and one duck.")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Your question")).to_be_focused()
    assert page_server.texts() == [("user", "[picture] What?")]


def test_an_error_in_the_middle_of_an_answer(page: Page, page_server: FakeOpenAI) -> None:
    page_server.breaks_with = "The model ran out of memory."
    ask(page, "What?")
    expect(page.get_by_role("alert")).to_contain_text("The model ran out of memory.")
    expect(last(page, ".answer")).to_have_text("Three horses and one duck.")


def test_a_server_that_is_gone(page: Page, page_server: FakeOpenAI) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "What?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(last(page, ".after")).to_be_visible()


def test_pictures_beyond_the_limit_of_a_request(page: Page, page_server: FakeOpenAI) -> None:
    page.evaluate("waiting = [{ url: { length: 33 * 2 ** 20 }, figure: '' }]")
    ask(page, "What?")
    expect(page.get_by_role("alert")).to_contain_text("together larger than 32 MiB")
    assert page_server.asked == []


def test_the_key_is_asked_for(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.api_key = "correct horse"
    page = opened()
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    field = dialog.get_by_label("API key")
    expect(field).to_be_focused()
    assert (field.get_attribute("type"), field.get_attribute("autocomplete")) == (
        "password",
        "off",
    )
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("That key was not accepted.")
    field.fill("correct horse")
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator("#model")).to_have_text("demo")
    expect(dialog).to_be_hidden()
    ask(page, "What?")
    expect(last(page, ".after")).to_be_visible()

    page.reload()  # kept until the tab is closed
    expect(page.locator("#model")).to_have_text("demo")
    page_server.api_key = "changed"
    ask(page, "And now?")
    expect(dialog.get_by_role("alert")).to_have_text("That key was not accepted.")
    page.keyboard.press("Escape")
    expect(last(page, ".error")).to_contain_text("only with an API key")
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_keys_of_any_characters(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.api_key = "schlüssel-ключ"
    page = opened()
    dialog = page.get_by_role("dialog")
    for wrong in ("“sesame”", "clé", "клю\u007f", "🔑"):
        dialog.get_by_label("API key").fill(wrong)
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_have_text("That key was not accepted.")
        expect(dialog.get_by_label("API key")).to_have_value("")
    dialog.get_by_label("API key").fill(" schlüssel-ключ\t ")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("demo")


def test_a_model_that_is_missing(page: Page, page_server: FakeOpenAI) -> None:
    page_server.loading, page_server.loading_message = True, "the model cannot be loaded"
    ask(page, "What?")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server says: the model cannot be loaded.")
    page_server.loading = False
    alert.get_by_role("button", name="Try again").click()
    expect(last(page, ".after")).to_be_visible()


def test_the_page_waits_while_the_model_loads(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.loading = True
    page = opened()
    expect(page.locator("#loading")).to_have_text("The model is loading…")
    page.set_input_files("#file", [HORSES])
    page_server.loading = False
    expect(page.locator("#model")).to_have_text("demo")
    expect(page.locator("#loading")).to_be_hidden()
    expect(page.locator(".waiting .seen")).to_be_visible()

    page_server.loading = True  # it was unloaded meanwhile
    ask(page, "What?")
    expect(last(page, ".state")).to_have_text("The model is loading…")
    page_server.loading = False
    expect(last(page, ".answer")).to_have_text("Three horses and one duck.")
    assert len(page_server.asked) == 1


# ---- other models --------------------------------------------------------------------------------


def test_a_model_that_does_not_remember(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.meta["single_turn"] = True
    page = opened()
    add(page, HORSES)
    ask(page, "What?")
    expect(page.get_by_text("each question stands alone")).to_be_visible()
    ask(page, "How many?")
    expect(page.locator(".after")).to_have_count(2)
    expect(page.locator("#alone")).to_be_hidden()  # told once
    assert page_server.texts() == [("user", "[picture] How many?")]


def test_a_model_that_takes_no_questions(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.meta["takes_questions"] = False
    page = opened()
    expect(page.locator("#welcome")).to_contain_text("This model takes no questions")
    expect(page.locator("#question")).to_be_hidden()
    add(page, HORSES)
    page.set_input_files("#file", [SHOPPING])
    expect(page.get_by_role("img", name="shopping.png", exact=True)).to_be_visible()
    expect(page.locator(".waiting .picture")).to_have_count(1)
    page.get_by_role("button", name="Read").click()
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "[picture]")]


# ---- everyone and everywhere ---------------------------------------------------------------------


def test_everything_works_with_the_keyboard_alone(page: Page, page_server: FakeOpenAI) -> None:
    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.matches(':focus-visible')")
            label = page.evaluate(
                "document.activeElement.ariaLabel || document.activeElement.innerText"
            )
            if label.strip() == name:
                assert focused
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != (
                    "none"
                )
                return
        raise AssertionError(f"no way to {name}")

    tab_to("Choose a picture")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(HORSES)
    expect(page.locator(".seen")).to_be_visible()
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("How many?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("And what?")
    assert page_server.asked == []
    page.keyboard.press("Enter")
    expect(last(page, ".after")).to_be_visible()
    assert page_server.texts() == [("user", "[picture] How many?\nAnd what?")]
    expect(page.get_by_label("Your question")).to_be_focused()
    tab_to("Add a picture")
    tab_to("New conversation")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()


def test_a_phone(opened: Opened, page_server: FakeOpenAI) -> None:
    page_server.answer = ["W" * 200, " and a few words more"]
    page = opened(**PHONE)
    with page.expect_file_chooser() as chooser:
        page.locator("#welcome").get_by_role("button", name="Take a photo").tap()
    assert chooser.value.element.get_attribute("capture") == "environment"
    assert_fits(page)
    chooser.value.set_files(HORSES)
    expect(page.locator(".seen")).to_be_visible()
    assert_fits(page)
    page.get_by_role("button", name="Describe the image").tap()
    expect(last(page, ".after")).to_be_visible()
    page.set_input_files("#file", [HORSES, SHOPPING])
    expect(page.locator(".waiting .seen")).to_have_count(2)
    page_server.failure = (500, "E" * 300, "server_error", {})
    assert_fits(page)
    page.get_by_label("Your question").fill("Q" * 100)
    page.get_by_role("button", name="Ask", exact=True).tap()
    expect(page.get_by_role("alert")).to_be_visible()
    assert_fits(page)


@pytest.mark.parametrize("size", [(320, 568), (360, 640), (390, 844)])
def test_nothing_covers_anything_on_a_phone(opened: Opened, size: tuple[int, int]) -> None:
    page = opened(**PHONE | {"viewport": {"width": size[0], "height": size[1]}})
    expect(page.locator("#model")).to_have_text("demo")

    def ends(selector: str) -> float:
        box = page.locator(selector).last.bounding_box()
        assert box is not None
        return box["y"] + box["height"]

    def begins(selector: str) -> float:
        box = page.locator(selector).first.bounding_box()
        assert box is not None
        return box["y"]

    assert ends("#welcome .photograph") <= begins("#ask")
    add(page, HORSES)
    assert ends("#first .whole") <= begins(".suggestions")
    assert ends("#first .remove") <= begins(".suggestions")
    remove = page.locator("#first .remove span")
    assert remove.evaluate("(text) => text.getClientRects().length") == 1  # line
    title = page.locator("#first figcaption b")
    assert title.evaluate("(text) => text.getBoundingClientRect().height") < 45  # two at most


def assert_fits(page: Page) -> None:
    """No scrolling to the side, and nothing to tap is smaller than a finger."""
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 44, button
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, button


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_follow_the_system(opened: Opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    ground, ink = page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert abs(brightness[0] - brightness[1]) > 450


def test_the_page_needs_no_more_than_its_policy(opened: Opened, page_server: FakeOpenAI) -> None:
    page = opened()
    response = page.reload()
    assert response is not None
    assert response.headers["content-security-policy"] == POLICY
    text = response.text()
    assert not re.search(r"(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text)
    assert set(re.findall(r"https?://[^'\"\s)]+", text)) == {"http://www.w3.org/2000/svg"}


# --- the real server ------------------------------------------------------------------------------


def test_the_real_server_answers(browser: Browser) -> None:
    with Server("--preload", "--api-key", "sesame") as server:
        opened = Opened(browser, server)
        page = opened()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("demo")
        add(page, HORSES)
        ask(page, "Describe the image")
        text = "The image shows three horses and one duck near the water."
        expect(last(page, ".answer")).to_have_text(text)
        expect(last(page, ".after")).to_contain_text("tokens/s")
        ask(page, "Is there an egg?")
        expect(page.locator(".after")).to_have_count(2)
        expect(last(page, ".answer")).to_contain_text("No")
        page.get_by_role("button", name="New conversation").click()
        file = {"name": "my cat.png", "mimeType": "image/png", "buffer": b"no picture"}
        page.set_input_files("#file", [file])
        ask(page, "Is there an egg?")
        expect(page.get_by_role("alert")).to_contain_text("my cat.png: is not a picture of a kind")
        response = page.request.get(f"{server.url}/")
        assert response.headers["content-security-policy"] == POLICY  # as in the tests above
        opened.finish()
