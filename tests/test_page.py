"""The chat page in a real browser: it says what was sent and answered, keeps it, and nothing that a model writes can do harm."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

try:
    from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Request, expect, sync_playwright
except ImportError:
    pytest.skip("playwright is not installed: the chat page is tested in a browser", allow_module_level=True)

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(__file__).resolve().parents[1] / "src" / "zamba2" / "serve" / "page.html"
PATIENCE = 20_000  # milliseconds: the machine may be busy

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is absent: the chat page is tested in a browser")

# ---- a server that says what it is told to ---------------------------------------------------------------------------


@dataclass
class Answer:
    """One answer to POST /v1/chat/completions: `pieces` as events, then how it ends."""

    pieces: Sequence[str] = ("Hello",)
    pause: float = 0.0  # seconds between pieces
    gate: threading.Event | None = None  # waited for before the last piece
    hold: bool = False  # never ends: until the client goes away, when `closed` is set
    ends: str = "done"  # or "cut" (no end mark), "broken" (the connection), "error" (an error as an event), "length"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    usage: Mapping[str, Any] = field(
        default_factory=lambda: {"prompt_tokens": 40, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 32}}
    )
    closed: threading.Event = field(default_factory=threading.Event)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: deque[Answer] = deque()  # said in turn; then plain ones
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is a part of these tests

    def messages(self, k: int = -1) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.asked[k]["messages"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/v1/models":
            self.reply(200, "application/json", b'{"object": "list", "data": [{"id": "tiny", "object": "model"}]}')
        else:
            self.reply(404, "application/json", b'{"error": {"message": "no such page"}}')

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, data: object) -> None:
        self.chunk(b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n")

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.answers.popleft() if self.server.answers else Answer()
        if answer.status != 200:
            self.reply(answer.status, "application/json", json.dumps({"error": {"message": answer.message}}).encode(), answer.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.stream(answer)
        except OSError:
            answer.closed.set()
            self.close_connection = True

    def stream(self, answer: Answer) -> None:
        for k, piece in enumerate(answer.pieces):
            if answer.gate and k == len(answer.pieces) - 1:
                answer.gate.wait(PATIENCE / 1000)
            self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if answer.pause:
                time.sleep(answer.pause)
        while answer.hold:
            self.chunk(b": still here\n\n")
            time.sleep(0.05)
        if answer.ends == "broken":
            self.close_connection = True  # without the last chunk
            return
        if answer.ends == "error":
            self.event({"error": {"message": answer.message}})
        elif answer.ends in ("done", "length"):
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length" if answer.ends == "length" else "stop"}]})
            self.event({"choices": [], "usage": answer.usage})
            self.event(b"[DONE]")
        self.chunk(b"")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ---- the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a browser profile of its own, with what it asked for and complained about."""

    def __init__(self, browser: Browser, server: Server, before: str = "", **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.server = server
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        if before:
            self.context.add_init_script(before)
        self.page = self.context.new_page()
        self.page.on("request", self.requested)
        self.page.on("console", self.logged)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self.asked)
        self.context.on("page", lambda page: self.requests.append(f"new tab: {page.url}"))
        self.page.goto(f"{server.url}/")
        expect(self.page.locator("#model")).to_have_text("tiny")

    def requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def logged(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def asked(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    @property
    def input(self) -> Locator:
        return self.page.locator("#input")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".message.assistant .markdown")

    @property
    def titles(self) -> Locator:
        return self.page.locator("#chats .open")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def say(self, text: str, *answers: Answer) -> None:
        self.server.answers.extend(answers)
        self.input.fill(text)
        self.input.press("Enter")

    def finished(self, answers: int) -> None:
        """Waits until so many answers stand, and none is being written."""
        expect(self.answers).to_have_count(answers)
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0)

    def harmless(self, *, errors: str = "$^") -> None:
        """No dialog, nothing asked of anyone else, no complaint but those that `errors` matches."""
        own = re.compile(rf"({re.escape(self.server.url)}/(v1/models|v1/chat/completions)?|(data|blob):.*)")
        assert [url for url in self.requests if not own.fullmatch(url)] == []
        assert self.dialogs == []
        assert [error for error in self.errors if not re.search(errors, error)] == []


@pytest.fixture
def open_tab(browser: Browser, server: Server) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def opened(before: str = "", **options: Any) -> Tab:
        tabs.append(Tab(browser, server, before, **options))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.context.close()


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Iterator[Tab]:
    tab = open_tab()
    yield tab
    tab.harmless()


REFUSED = r"the server responded with a status of (400|401|429|503)|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_FAILED"

MARKDOWN = """\
# A *heading*

Some **bold**, *italic*, ***both***, `code *as is*` and 2 * 3 * 4 = 24, snake_case_name.
A second line with [a link](https://example.org/a_(b) "title"), <https://example.org/c> and https://example.org/d.

1. one
2. two
   - inner **a**
   - inner b

     a paragraph of b
3. three

* star

> quoted
> > twice

| name | price |
|:-----|------:|
| pear | 1 |
| fig \\| date | `x` |

```python
if a < b:
    print("**no bold**")
```

---
![a picture](https://example.org/p.png) and [no](/relative)

```
unclosed & <b>
"""

# ---- to send and to be answered --------------------------------------------------------------------------------------


def test_a_message_is_sent_and_its_answer_shown_as_it_comes(tab: Tab) -> None:
    """What is typed is sent as the last message of a stream request, and each piece of the answer shows before the next."""
    gate = threading.Event()
    tab.say("Sort: b, a", Answer(pieces=["One", " two"], gate=gate))
    expect(tab.answers).to_have_text("One")
    expect(tab.answers).to_have_attribute("aria-busy", "true")
    expect(tab.answers).to_have_attribute("aria-live", "polite")
    expect(tab.input).to_have_value("")
    gate.set()
    tab.finished(1)
    expect(tab.answers).to_have_text("One two")
    messages = [{"role": "user", "content": "Sort: b, a"}]
    assert tab.server.asked == [{"model": "tiny", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}]
    assert tab.server.keys == [None]
    tab.say("again")
    tab.finished(2)
    assert tab.server.messages() == [("user", "Sort: b, a"), ("assistant", "One two"), ("user", "again")]


def test_an_example_is_sent_by_one_click(tab: Tab) -> None:
    """The empty page offers three prompts, each sent as it reads."""
    expect(tab.page.locator("#examples button")).to_have_count(3)
    tab.button("Say this in upper case: the green boat").click()
    tab.finished(1)
    assert tab.server.messages() == [("user", "Say this in upper case: the green boat")]
    expect(tab.page.locator("#empty")).to_be_hidden()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_was_said_and_closes_the_request(tab: Tab, how: str) -> None:
    """Stop ends the request at the server, and the part that was said stays in the conversation."""
    answer = Answer(pieces=["One ", "two"], hold=True)
    tab.say("Count", answer)
    expect(tab.answers).to_have_text("One two")
    tab.button("Stop").click() if how == "button" else tab.input.press("Escape")
    assert answer.closed.wait(PATIENCE / 1000)
    tab.finished(1)
    expect(tab.page.locator(".stats")).to_contain_text("stopped")
    expect(tab.input).to_be_focused()
    tab.say("Go on")
    tab.finished(2)
    assert tab.server.messages() == [("user", "Count"), ("assistant", "One two"), ("user", "Go on")]


def test_regenerate_asks_the_same_again(tab: Tab) -> None:
    """Regenerate sends the very request again, and the new answer takes the place of the old."""
    tab.say("a", Answer(pieces=["first"]))
    tab.finished(1)
    tab.say("b", Answer(pieces=["second"]), Answer(pieces=["third"]))
    tab.finished(2)
    expect(tab.button("Regenerate")).to_have_count(1)
    tab.button("Regenerate").click()
    expect(tab.answers).to_have_text(["first", "third"])
    tab.finished(2)
    assert tab.server.asked[2] == tab.server.asked[1]


def test_an_edited_message_goes_on_from_there(tab: Tab) -> None:
    """To edit a message drops all that came after it; to cancel, or press Escape, changes nothing."""
    for k, text in enumerate(["a", "b", "c"]):
        tab.say(text, Answer(pieces=[f"answer {text}"]))
        tab.finished(k + 1)
    edited = tab.page.locator(".message.user").nth(1)
    edited.hover()
    edited.get_by_role("button", name="Edit").click()
    area = tab.page.get_by_label("Edit the message")
    area.press("Escape")
    expect(area).to_have_count(0)
    expect(tab.answers).to_have_count(3)
    edited.get_by_role("button", name="Edit").click()
    area.fill("B\nmore")
    tab.server.answers.append(Answer(pieces=["answer B"]))
    area.press("Enter")
    expect(tab.answers).to_have_text(["answer a", "answer B"])
    assert tab.server.messages() == [("user", "a"), ("assistant", "answer a"), ("user", "B\nmore")]
    expect(tab.page.locator(".message.user .said")).to_have_text(["a", "B\nmore"])


def test_settings_are_sent(tab: Tab) -> None:
    """The system prompt and each sampling setting are in the request, survive a reload, and are left out where empty or wrong."""
    tab.button("Settings").click()
    for label, value in {"System prompt": "Be brief.", "Temperature": "0.25", "Top p": "0.9", "Max tokens": "77", "Seed": "5"}.items():
        tab.page.get_by_label(label, exact=True).fill(value)
    tab.page.get_by_label("Top p", exact=True).fill("7")  # out of range: the last good one stays
    tab.button("Done").click()
    expect(tab.input).to_be_focused()
    tab.page.reload()
    tab.say("a")
    tab.finished(1)
    sampling = {"temperature": 0.25, "top_p": 0.9, "max_tokens": 77, "seed": 5}
    assert {name: tab.server.asked[0][name] for name in sampling} == sampling
    assert tab.server.messages() == [("system", "Be brief."), ("user", "a")]
    tab.button("Settings").click()
    tab.button("Reset").click()
    tab.page.keyboard.press("Escape")
    tab.say("b")
    tab.finished(2)
    assert tab.server.asked[1].keys() == {"model", "messages", "stream", "stream_options"}


def test_the_key_is_sent_and_kept_in_the_tab_only(tab: Tab) -> None:
    """An API key goes out as a bearer token, survives a reload, and is never in localStorage."""
    tab.button("Settings").click()
    tab.page.get_by_label("API key").fill("s3cret")
    tab.button("Done").click()
    tab.page.reload()
    tab.say("a")
    tab.finished(1)
    assert tab.server.keys == ["Bearer s3cret"]
    assert "s3cret" not in tab.page.evaluate("JSON.stringify(localStorage)")


def test_stats_stand_under_an_answer(tab: Tab) -> None:
    """Tokens, tokens per second and cached tokens are those that the server counted."""
    tab.say("a", Answer(pieces=["x"] * 12, pause=0.1))
    tab.finished(1)
    stats = r"^12 tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt 40 \(32 cached\)$"
    expect(tab.page.locator(".stats")).to_have_text(re.compile(stats))
    rate = float(re.findall(r"([\d.]+) tokens/s", tab.page.locator(".stats").inner_text())[0])
    assert 0.5 < rate < 15  # eleven tokens in eleven pauses, ten a second; a busy browser may see the first late
    tab.say("b", Answer(ends="length"))
    tab.finished(2)
    expect(tab.page.locator(".stats").last).to_contain_text("cut at the token limit")


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_conversation_and_the_draft(tab: Tab) -> None:
    """After a reload the same conversation, its numbers and the half-typed message are there, and it goes on."""
    tab.say("a", Answer(pieces=["**bold**"]))
    tab.finished(1)
    shown = tab.page.locator("#messages").inner_html()
    tab.input.press_sequentially("half a thou")
    tab.page.reload()
    expect(tab.answers).to_have_text("bold")
    assert tab.page.locator("#messages").inner_html() == shown.replace(' aria-live="polite"', "")
    expect(tab.input).to_have_value("half a thou")
    tab.say("b")
    tab.finished(2)
    assert tab.server.messages() == [("user", "a"), ("assistant", "**bold**"), ("user", "b")]


def test_a_reload_in_the_middle_keeps_what_was_said(tab: Tab) -> None:
    """A page that is left while an answer comes keeps the part that had come, as stopped."""
    tab.say("a", Answer(pieces=["One ", "two"], hold=True))
    expect(tab.answers).to_have_text("One two")
    tab.page.reload()
    expect(tab.answers).to_have_text("One two")
    expect(tab.page.locator(".stats")).to_contain_text("stopped")
    tab.finished(1)


def test_conversations_are_listed_renamed_exported_and_deleted(tab: Tab) -> None:
    """Each conversation is in the list, newest first; its name, its export and its end (once confirmed) concern it alone."""
    tab.say("first chat", Answer(pieces=["one"]))
    tab.finished(1)
    tab.button("New chat").click()
    expect(tab.page.locator("#empty")).to_be_visible()
    tab.say("second chat", Answer(pieces=["two"]))
    tab.finished(1)
    expect(tab.titles).to_have_text(["second chat", "first chat"])
    tab.titles.last.click()
    expect(tab.answers).to_have_text("one")

    item = tab.page.locator("#chats li.current")
    item.get_by_role("button", name="Rename").click()
    tab.page.get_by_label("Name of the conversation").fill("Old <b>times</b>")
    tab.page.keyboard.press("Enter")
    expect(tab.titles).to_have_text(["second chat", "Old <b>times</b>"])

    with tab.page.expect_download() as download:
        item.get_by_role("button", name="Export").click()
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert exported["title"] == "Old <b>times</b>"
    assert [(message["role"], message["content"]) for message in exported["messages"]] == [("user", "first chat"), ("assistant", "one")]
    with tab.page.expect_download() as download:
        tab.button("Export all").click()
    assert len(json.loads(download.value.path().read_text(encoding="utf-8"))) == 2

    item.hover()
    item.get_by_role("button", name="Delete").click()
    tab.button("Cancel").click()
    expect(tab.titles).to_have_count(2)
    item.hover()
    item.get_by_role("button", name="Delete").click()
    tab.page.locator("#confirm").get_by_role("button", name="Delete").click()
    expect(tab.titles).to_have_text(["second chat"])
    expect(tab.answers).to_have_text("two")
    tab.page.reload()
    expect(tab.titles).to_have_text(["second chat"])


def test_an_answer_goes_on_while_another_conversation_is_read(tab: Tab) -> None:
    """An answer is written into its own conversation, whichever one is shown."""
    gate = threading.Event()
    tab.say("slow", Answer(pieces=["One", " two"], gate=gate))
    expect(tab.answers).to_have_text("One")
    tab.page.keyboard.press("Control+k")
    tab.say("fast", Answer(pieces=["three"]))
    tab.finished(1)
    expect(tab.answers).to_have_text("three")
    expect(tab.page.locator("#chats .running")).to_have_count(1)
    gate.set()
    expect(tab.page.locator("#chats .running")).to_have_count(0)
    expect(tab.answers).to_have_text("three")
    tab.page.get_by_role("button", name="slow").click()
    expect(tab.answers).to_have_text("One two")


FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
DISABLED = """for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("off", "SecurityError"); } });"""


@pytest.mark.parametrize("storage", [FULL, DISABLED], ids=["full", "disabled"])
def test_without_storage_the_page_says_so_and_goes_on(open_tab: Callable[..., Tab], storage: str) -> None:
    """Storage that is full or switched off costs a notice, not the conversation."""
    tab = open_tab(storage)
    tab.say("a")
    tab.finished(1)
    expect(tab.page.locator("#notice")).to_contain_text("storage is full or switched off")
    tab.say("b")
    tab.finished(2)
    assert tab.server.messages() == [("user", "a"), ("assistant", "Hello"), ("user", "b")]
    expect(tab.titles).to_have_text(["a"])
    tab.harmless()


# ---- an answer's Markdown --------------------------------------------------------------------------------------------


def test_markdown_becomes_what_it_means(tab: Tab) -> None:
    """Each kind of Markdown becomes its element, with the text that it holds."""
    tab.say("a", Answer(pieces=[MARKDOWN]))
    tab.finished(1)
    selectors = ["h1", "h1 em", "strong", "p > em", "p code", "ol > li", "li li", "blockquote blockquote", "th", "td", "td code", "a"]
    found = {selector: tab.answers.locator(selector).all_inner_texts() for selector in selectors}
    assert found["h1"] == ["A heading"] and found["h1 em"] == ["heading"]
    assert found["strong"] == ["bold", "both", "a"] and found["p > em"] == ["italic", "both"]
    assert found["p code"] == ["code *as is*"]
    assert len(found["ol > li"]) == 3
    assert [" ".join(item.split()) for item in found["li li"]] == ["inner a", "inner b a paragraph of b"]
    assert found["blockquote blockquote"] == ["twice"]
    assert (found["th"], found["td"], found["td code"]) == (["name", "price"], ["pear", "1", "fig | date", "x"], ["x"])
    assert found["a"] == ["a link", "https://example.org/c", "https://example.org/d", "Image: a picture"]
    codes = tab.answers.locator("pre").all_text_contents()
    assert codes == ['if a < b:\n    print("**no bold**")', "unclosed & <b>\n"]
    assert tab.answers.locator(".bar span:first-child").all_inner_texts() == ["python", "text"]
    text = tab.answers.inner_text()
    assert "2 * 3 * 4 = 24, snake_case_name" in text and "[no](/relative)" in text
    for link in tab.answers.locator("a").all():
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer nofollow", "_blank")
    assert tab.answers.locator("a").first.get_attribute("href") == "https://example.org/a_(b)"


def test_pieces_make_the_same_page_as_the_whole(tab: Tab) -> None:
    """However an answer is cut into pieces, the same elements come of it as from the whole."""
    text = MARKDOWN.replace("unclosed", "closed") + "```\nend | of\nit | a\n--|-:\n1|2\n- x\n  - y\n-z\n"
    texts = [text, *(text[cut:] for cut in (37, 215))]
    shown = []
    for k, text in enumerate(texts):
        size = (2, 5, 9)[k]
        tab.say("a", Answer(pieces=[text[at : at + size] for at in range(0, len(text), size)], pause=0.004))
        tab.finished(k + 1)
        shown.append(tab.answers.last.inner_html())
    tab.page.reload()
    tab.finished(len(texts))
    assert [answer.inner_html() for answer in tab.answers.all()] == shown


def test_code_is_copied(open_tab: Callable[..., Tab]) -> None:
    """The button of a code block copies the code, that of an answer its Markdown."""
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    code = "a <b>\n  c"
    answer = f"So:\n```\n{code}\n```\n"
    tab.say("a", Answer(pieces=[answer]))
    tab.finished(1)
    for where, text in {".bar button": code, ".assistant footer button >> nth=0": answer}.items():
        button = tab.page.locator(where)
        button.click()
        expect(button).to_have_text("Copied")
        assert tab.page.evaluate("navigator.clipboard.readText()") == text
    tab.harmless()


HOSTILE = [
    "<script>window.harmed = 1; alert(1)</script>",
    "<img src=x onerror='window.harmed = 1; alert(2)'><svg onload=alert(3)><iframe srcdoc='<script>parent.harmed = 1</script>'></iframe>",
    "![picture](https://harm.example/p.png) ![x](data:image/svg+xml,<svg/onload=alert(4)>) ![y](x.png)",
    "[a](javascript:alert(5)) [b](JaVaScRiPt:alert(6)) [c](data:text/html,<script>alert(7)</script>)",
    "[d](\tjava\nscript:alert(8)) <javascript:alert(9)>",
    '[e](vbscript:x) [f](//harm.example) [g](https://harm.example/"onmouseover="alert(10)) [h](blob:http://x) [i](file:///etc/passwd)',
    "<style>@import 'https://harm.example/s.css'; body { display: none }</style><link rel=stylesheet href=https://harm.example/s.css>",
    "<base href=https://harm.example/><meta http-equiv=refresh content='0;url=https://harm.example/'><form action=https://harm.example><button>x",
    "```html onclick=alert(11)\n<script>window.harmed = 1</script>\n<b>never closed",
]


def test_hostile_output_does_no_harm(tab: Tab) -> None:
    """No markup of a model's is interpreted: no script, no picture, no frame, no request, and links to http, https and mail only."""
    for k, text in enumerate(HOSTILE):
        tab.say(text, Answer(pieces=[text[:9], text[9:30], text[30:]]))
        tab.finished(k + 1)
    assert tab.page.locator("#messages :is(script, img, iframe, style, link, base, meta, form, object, embed, video, audio)").count() == 0
    links = [link.get_attribute("href") or "" for link in tab.answers.locator("a").all()]
    assert links and all(link.startswith("https://harm.example/") for link in links)
    handlers = "node => [...node.querySelectorAll('*')].flatMap(n => n.getAttributeNames()).filter(name => name.startsWith('on'))"
    assert tab.page.locator("#messages").evaluate(handlers) == []
    assert tab.page.evaluate("window.harmed") is None
    for text in HOSTILE[:3]:
        assert text.split("](")[0].lstrip("![") in tab.page.locator("#messages").inner_text()
    tab.say("still there?", Answer(pieces=["yes"]))
    expect(tab.answers.last).to_have_text("yes")


def test_a_huge_table_stays_usable(tab: Tab) -> None:
    """A table of 5,000 rows shows its first rows, all on request, and the page answers on."""
    rows = [f"| {k} | **name {k}** | a value of {k * k} |\n" for k in range(5000)]
    pieces = ["| n | name | value |\n|--:|---|---|\n", *("".join(rows[at : at + 50]) for at in range(0, 5000, 50))]
    tab.say("a", Answer(pieces=pieces, pause=0.005))
    tab.finished(1)
    assert tab.answers.locator("tbody tr").count() == 200
    tab.button("Show all 5,000 rows").click()
    expect(tab.answers.locator("tbody tr")).to_have_count(5000)
    assert tab.answers.locator("tbody tr").last.all_inner_texts() == ["4999\tname 4999\ta value of 24990001"]
    tab.say("b", Answer(pieces=["yes"]))
    expect(tab.answers.last).to_have_text("yes")


LONG = {
    "one line": "word *and* `code` of a sentence. " * 6250,
    "paragraphs": "A paragraph with **bold** words and some more of them.\n\n" * 3600,
    "code": "```\n" + "a line of code that goes on\n" * 7000,
    "list": "".join(f"{k}. item *{k}*\n" for k in range(1, 12000)),
}


def test_a_long_answer_stays_usable(tab: Tab) -> None:
    """While 200 kB stream in, what is typed appears; at the end the whole text is there."""
    for name, text in LONG.items():
        assert len(text) > 190_000
        tab.say("a", Answer(pieces=[text[at : at + 1000] for at in range(0, len(text), 1000)], pause=0.005))
        expect(tab.answers).to_contain_text("o" if name != "list" else "item")
        tab.input.press_sequentially("still typing")
        expect(tab.input).to_have_value("still typing")
        tab.finished(1)
        shown = tab.answers.evaluate("root => root.textContent.replaceAll(/\\s/g, '')")
        assert len(shown) > 0.75 * len(re.sub(r"[\s*`]|^\d+\.", "", text, flags=re.MULTILINE)), name
        tab.page.keyboard.press("Control+k")
        expect(tab.answers).to_have_count(0)


N = 30_000
HARD = [
    "*a " * N, "_a*b~~" * N, "***a " * N + " a***" * N, "* " * 40 + "a" * N, "\\" * N,
    "[" * N, "[a](" * N, "![a](" + "(" * N, "https://a" + ")" * N + "b",
    "`" * N + " `a``" * N, "`" + " a" * N + "`",
    "> " * N, "- " * N + "a", "#" * N, "# " * N, "|" * N + "\n" + "|-" * N,
]  # fmt: skip
DEPTH = """root => Math.max(0, ...[...root.querySelectorAll("*")].slice(-2000).map(node => {
  let depth = 0;
  for (; node !== root; node = node.parentNode) depth++;
  return depth;
}))"""


def test_texts_that_are_hard_to_parse_take_no_time(tab: Tab) -> None:
    """Unclosed or deeply nested marks cost time in proportion to their number, and nest no deeper than a page can bear."""
    for text in HARD:
        began = time.monotonic()
        tab.say("a", Answer(pieces=[text, "."]))
        tab.finished(1)
        assert time.monotonic() - began < 15, text[:20]
        assert tab.answers.evaluate(DEPTH) < 50, text[:20]
        tab.page.keyboard.press("Control+k")
        expect(tab.answers).to_have_count(0)


def test_an_answer_is_drawn_ten_times_a_second_at_most(tab: Tab) -> None:
    """However fast the pieces come, the answer's text changes at most about ten times a second."""
    tab.page.evaluate(
        """() => {
          window.drawn = 0;
          const changes = { childList: true, characterData: true, subtree: true };
          new MutationObserver(() => window.drawn++).observe(document.getElementById("messages"), changes);
        }"""
    )
    began = time.monotonic()
    tab.say("a", Answer(pieces=["x "] * 300, pause=0.005))
    tab.finished(1)
    elapsed = time.monotonic() - began
    assert 2 <= tab.page.evaluate("drawn") <= 10 * elapsed + 4  # and the message, the empty answer, the end


# ---- what goes wrong -------------------------------------------------------------------------------------------------


FAILURES = {
    "asks for a valid API key. Wrong key.": Answer(status=401, message="Wrong key."),
    "busy. Too many. Try again in 7 s.": Answer(status=429, message="Too many.", headers={"Retry-After": "7"}),
    "not ready. Loading.": Answer(status=503, message="Loading."),
    "refused (400). Bad <b>seed</b>.": Answer(status=400, message="Bad <b>seed</b>."),
    "Out of memory.": Answer(pieces=["Part"], ends="error", message="Out of memory."),
    "ended before the answer was complete": Answer(pieces=["Part"], ends="cut"),
    "connection broke": Answer(pieces=["Part"], ends="broken", pause=0.5),
}


def test_a_failure_is_shown_and_tried_again(open_tab: Callable[..., Tab]) -> None:
    """A failure stands in the conversation with what had been said, also after a reload, and Retry sends the same once more."""
    tab = open_tab()
    alert = tab.page.get_by_role("alert")
    for shown, failing in FAILURES.items():
        tab.say("my long question", failing, Answer(pieces=["well"]))
        expect(alert).to_contain_text(shown)
        expect(tab.answers).to_have_text("Part" if failing.status == 200 else "")
        expect(tab.page.locator(".said")).to_have_text("my long question")
        expect(tab.button("Set the key")).to_have_count(1 if failing.status == 401 else 0)
        if failing.status in (200, 401):
            tab.page.reload()
            expect(alert).to_contain_text(shown)
        tab.button("Retry").click()
        expect(tab.answers).to_have_text("well")
        expect(alert).to_have_count(0)
        assert tab.server.asked[-1] == tab.server.asked[-2]
        tab.finished(1)
        tab.page.keyboard.press("Control+k")
    tab.harmless(errors=REFUSED)


def test_a_server_that_is_gone_is_said_to_be(open_tab: Callable[..., Tab]) -> None:
    """Where no server answers, the page says so, and Retry works once it is back."""
    tab = open_tab()
    tab.page.route("**/v1/chat/completions", lambda route: route.abort())
    tab.say("a")
    expect(tab.page.get_by_role("alert")).to_contain_text("cannot be reached")
    tab.page.unroute("**/v1/chat/completions")
    tab.button("Retry").click()
    tab.finished(1)
    expect(tab.answers).to_have_text("Hello")
    tab.harmless(errors=REFUSED)


# ---- hands and eyes --------------------------------------------------------------------------------------------------


def test_the_keyboard_does_everything(tab: Tab) -> None:
    """Enter sends, Shift+Enter does not, Ctrl+K opens a new chat, and Tab comes to each control, which is then marked."""
    expect(tab.input).to_be_focused()
    tab.page.keyboard.type("a")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("b")
    assert tab.server.asked == []
    tab.page.keyboard.press("Enter")
    tab.finished(1)
    assert tab.server.messages() == [("user", "a\nb")]
    expect(tab.input).to_be_focused()

    seen = set()
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        name, outline = tab.page.evaluate(
            """() => { const node = document.activeElement, style = getComputedStyle(node);
            return [node.getAttribute("aria-label") ?? node.textContent.trim(), style.outlineStyle + style.outlineWidth]; }"""
        )
        seen.add(name)
        if name not in ("Message", "") and tab.page.evaluate("document.activeElement !== document.body"):
            assert outline == "solid2px", name
    assert {"Conversations"}.isdisjoint(seen)  # the drawer's button is for phones
    assert seen >= {"New chatCtrl K", "a\nb", "Rename", "Export", "Delete", "Export all"}
    assert seen >= {"Dark or light", "Settings", "Edit", "Copy", "Regenerate", "Message"}

    tab.page.keyboard.press("Control+k")
    expect(tab.page.locator("#empty")).to_be_visible()
    expect(tab.input).to_be_focused()
    tab.page.keyboard.press("Enter")  # nothing to send
    assert len(tab.server.asked) == 1


def test_a_phone_shows_all_without_scrolling_sideways(open_tab: Callable[..., Tab]) -> None:
    """At 360 pixels nothing is wider than the screen, the composer is in view, and the conversations are in a drawer."""
    tab = open_tab(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    width = "document.documentElement.scrollWidth"

    def fits() -> None:
        assert tab.page.evaluate(width) <= 360
        assert tab.page.evaluate("document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth")
        box = tab.page.locator("#composer").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 740

    fits()
    wide = "| " + " | ".join(f"column number {k}" for k in range(12)) + " |\n" + "|---" * 12 + "|\n" + "| value " * 12 + "|\n"
    tab.say("w" * 300, Answer(pieces=[MARKDOWN, "x" * 300, "\n```\n\n", wide, "\n", "y" * 400, "\n\n`", "z" * 400, "`"]))
    tab.finished(1)
    fits()
    expect(tab.page.locator("#sidebar")).to_be_hidden()
    tab.button("Conversations").click()
    expect(tab.page.locator("#sidebar")).to_be_visible()
    expect(tab.page.locator("#new")).to_be_focused()
    fits()
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#sidebar")).to_be_hidden()
    expect(tab.input).to_be_focused()
    tab.button("Settings").click()
    assert tab.page.evaluate(width) <= 360
    tab.button("Done").click()
    tab.say("and an error", Answer(status=503, message="e" * 200))
    expect(tab.page.get_by_role("alert")).to_be_visible()
    fits()
    tab.harmless(errors=REFUSED)


def test_dark_and_light(open_tab: Callable[..., Tab]) -> None:
    """The page is as dark as the system asks, until its button says otherwise, which a reload keeps."""
    tab = open_tab(color_scheme="dark")

    def dark() -> bool:
        red, green, blue = re.findall(r"[\d.]+", tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        return float(red) + float(green) + float(blue) < 3 * 128

    assert dark()
    tab.page.emulate_media(color_scheme="light")
    assert not dark()
    tab.button("Dark or light").click()
    assert dark()
    tab.page.reload()
    assert dark()
    tab.button("Dark or light").click()
    assert not dark()
    tab.harmless()


def test_the_view_follows_the_answer_unless_scrolled_away(tab: Tab) -> None:
    """The newest line is in view while an answer comes; who scrolls up stays there, and a button leads back."""
    lines = [f"line {k}\n\n" for k in range(200)]
    gate = threading.Event()
    tab.say("a", Answer(pieces=[*lines[:100], "".join(lines[100:])], pause=0.01, gate=gate))
    expect(tab.page.get_by_text("line 99", exact=True)).to_be_in_viewport()
    tab.page.locator("#messages").hover()
    tab.page.mouse.wheel(0, -5000)
    expect(tab.button("Go to the latest message")).to_be_visible()
    gate.set()
    tab.finished(1)
    expect(tab.page.get_by_text("line 199", exact=True)).not_to_be_in_viewport()
    tab.button("Go to the latest message").click()
    expect(tab.page.get_by_text("line 199", exact=True)).to_be_in_viewport()


def test_the_file_is_self_contained() -> None:
    """The page is one file under a strict policy: nothing is loaded, no text becomes markup or code."""
    text = PAGE.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc", text)
    assert not re.search(r"\bsrc=|@import|url\(", text)
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name space of SVG
