"""The page of queries and documents as a real browser draws it."""

import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from lm_pages import HOSTILE, card, content, query

from trak_fast.lm.page import PageContent, render

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
VOID = {"br", "img", "input", "link", "meta"}
DESKTOP, PHONE = (1280, 900), (360, 780)


class Text(HTMLParser):
    """The elements of a page that a browser has drawn: (tag, attributes, text) in the order of their starts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def of(self, kind: str) -> list[str]:
        """Returns the texts of the elements of a class."""
        return [
            "".join(texts) for _, attributes, texts in self.elements if kind in (attributes.get("class") or "").split()
        ]


def browse(folder: Path, page: str, size: tuple[int, int], script: str = "", address: str = "", flags: str = "") -> Any:
    """Opens a page, as it is, in a frame of a size in Chromium, and runs a script from outside in its window.

    Returns:
        The script's result, the page as it is then, and all that went to the console.
    """
    (folder / "index.html").write_bytes(page.encode("utf-8"))
    (folder / "frame.html").write_text(
        f"""<!doctype html><meta charset="utf-8">
        <iframe src="index.html{address}" style="border: 0; width: {size[0]}px; height: {size[1]}px"></iframe>
        <script>
        const rest = (time) => new Promise((done) => setTimeout(done, time));
        const frame = document.querySelector("iframe");
        frame.onload = async () => {{
          const run = async (window, document, location) => {{ {script} }};
          const inner = frame.contentWindow;
          const found = await run(inner, inner.document, inner.location) ?? null;
          document.body.dataset.found = JSON.stringify([found, inner.document.documentElement.outerHTML]);
        }};
        </script>""",
        encoding="utf-8",
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr", *flags.split()]
    command += ["--window-size=1400,1000", "--virtual-time-budget=8000", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    console = "\n".join(re.findall(r".*CONSOLE.*", done.stderr.decode("utf-8", "replace")))
    (body,) = [fields for tag, fields, _ in Text(done.stdout.decode("utf-8")).elements if tag == "body"]
    assert body.get("data-found"), console
    return *json.loads(str(body["data-found"])), console


@pytest.fixture(scope="module")
def full() -> PageContent:
    """A page with all that a page can have."""
    long = "\n".join(f"Line {number} of a long text, written by Park and others." for number in range(100))
    hostile = tuple(
        card(text, row=row, rank=row + 1, score=0.9 - 0.01 * row) for row, text in enumerate(HOSTILE.values())
    )
    tokens = ((0, 3, 0.5), (3, 9, -0.25), (9, 14, 0.0001))
    first = query(
        0,
        top=(*hostile, card(long, row=8, rank=9, score=0.5, tokens=tokens, word_rank=2)),
        worst=(card("Bad wording harms " * 9, row=9, score=-0.7, word_rank=113), card("x" * 500, row=10, score=-0.2)),
    )
    second = query(3, prompt=None, completion=None, text="Only text " * 90, name="named", top=(card("tea", row=11),))
    return content(first, second, tie=0.05, word_ranks_from="BM25")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_browser_draws_the_cards_without_complaint(
    tmp_path: Path, full: PageContent, size: tuple[int, int]
) -> None:
    _, drawn, console = browse(tmp_path, render(full), size)
    assert console == ""
    page = Text(drawn)
    cards = [*full.queries[0].top, *full.queries[0].worst]
    assert len(page.of("card")) == len(cards)
    assert page.of("number") == [f"score {'−' if one.score < 0 else '+'}{abs(one.score):.3f}" for one in cards]
    assert page.of("said") == ["Who wrote it?", "Park"]
    # a lone half of a pair is U+FFFD in UTF-8; control characters are shown as their pictures
    pictures = {code: chr(0x2400 + code) for code in range(0x20) if code not in (9, 10)}
    expected = [one.text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for one in cards[:8]]
    expected = [re.sub("\ufffd{3}", "\ufffd", text).translate(pictures) for text in expected]
    assert page.of("text")[:8] == expected
    assert page.of("text")[8] == "\n".join(cards[8].text.splitlines()[:12]) + "…"
    assert len(page.of("more")) == 1
    assert page.of("words") == ["words: 2nd", "words: 113th"]
    assert len(page.of("tie")) == 7  # of 0.9, 0.89, …, 0.83, 0.5; and -0.7, -0.2
    assert page.of("token")[-3:] == ["Lin", "e 0 of", " a lo"]


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_all_text_has_contrast_and_fits_the_window(
    tmp_path: Path, full: PageContent, size: tuple[int, int], scheme: int
) -> None:
    script = """
      const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d",
        { willReadFrequently: true });
      const light = (bytes) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, at) => {
        const part = bytes[at] / 255;
        return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
      }, 0);
      const paint = (colors) => {
        for (const color of colors) { pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); }
        return light(pen.getImageData(0, 0, 1, 1).data);
      };
      const low = [];
      let texts = 0;
      document.querySelector(".unfold").click();
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const holder = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !holder.checkVisibility() || holder.tagName === "title") continue;
        const grounds = [];
        for (let one = holder; one; one = one.parentElement) grounds.unshift(getComputedStyle(one).backgroundColor);
        const style = getComputedStyle(holder);
        const below = paint(grounds);
        const above = paint([holder.closest("svg") ? style.fill : style.color]);
        const ratio = (Math.max(below, above) + 0.05) / (Math.min(below, above) + 0.05);
        texts += 1;
        if (ratio < 4.5) low.push([holder.outerHTML.slice(0, 200), ratio]);
      }
      const root = document.documentElement;
      const paper = getComputedStyle(document.body).backgroundColor;
      return { low, texts, paper, inner: window.innerWidth, scroll: root.scrollWidth };
    """
    flags = f"--blink-settings=preferredColorScheme={scheme}"
    found, _, console = browse(tmp_path, render(full), size, script, flags=flags)
    assert console == ""
    assert found["inner"] == size[0]
    assert found["scroll"] <= size[0]
    assert found["paper"] == ("rgb(255, 255, 255)" if scheme else "rgb(22, 24, 28)")
    assert found["texts"] > 50
    assert found["low"] == []


def test_queries_are_chosen_by_address_buttons_and_keys(tmp_path: Path, full: PageContent) -> None:
    script = """
      const key = (name, target = document.body) =>
        target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
      const seen = [];
      const look = async () => {
        await rest(50);
        const position = document.querySelector(".position").innerText;
        seen.push([location.hash, position, document.title, document.querySelectorAll(".card").length]);
      };
      await look();
      document.querySelector('[aria-label="Previous query"]').click(); await look();
      key("ArrowRight"); await look();
      key("ArrowRight"); await look();
      document.querySelector(".list a").click(); await look();
      window.history.back(); await look();
      return seen;
    """
    second = ["#q3", "named 2 of 2", "named · A title", 1]
    first = ["#q0", "Q0 1 of 2", "Q0 · A title", 11]
    found, _, console = browse(tmp_path, render(full), DESKTOP, script, "#q3")
    assert found == [second, first, second, second, first, second]
    assert console == ""


def test_the_search_finds_queries_and_documents(tmp_path: Path, full: PageContent) -> None:
    script = """
      const field = document.getElementById("search");
      const seen = {};
      for (const words of ["WORDING", "only text", "line 99", "nowhere at all", ""]) {
        field.value = words;
        field.dispatchEvent(new Event("input"));
        await rest(300);
        seen[words] = [document.querySelector(".found").innerText, document.querySelectorAll(".list a").length,
          document.querySelectorAll(".card").length, document.querySelectorAll(".card mark").length];
      }
      return seen;
    """
    found, _, _ = browse(tmp_path, render(full), DESKTOP, script)
    assert found == {
        "WORDING": ["1 query, 1 document", 1, 1, 9],
        "only text": ["1 query, 0 documents", 1, 11, 0],
        "line 99": ["1 query, 1 document", 1, 1, 1],  # beyond the fold: unfolded
        "nowhere at all": ["0 queries, 0 documents", 0, 11, 0],
        "": ["", 2, 11, 0],
    }


def test_texts_unfold_and_keys_tell_what_a_token_adds(tmp_path: Path, full: PageContent) -> None:
    script = """
      const more = document.querySelector(".more");
      const body = more.parentElement;
      const text = body.querySelector(".text");
      const seen = [more.getAttribute("aria-expanded"), more.innerText];
      more.click();
      seen.push(more.getAttribute("aria-expanded"), more.innerText, text.textContent.length);
      more.click();
      seen.push(text.textContent.length);
      for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
        text.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
        seen.push(body.querySelector(".readout").innerText);
      }
      const tokens = [...text.querySelectorAll(".token")];
      seen.push(tokens.map((token) => [token.className.replace(" told", ""), token.title]));
      seen.push([...text.querySelectorAll("u")].map((word) => word.innerText).slice(0, 2));
      return seen;
    """
    length = len(full.queries[0].top[8].text)
    folded = len("\n".join(full.queries[0].top[8].text.splitlines()[:12]))
    found, _, _ = browse(tmp_path, render(full), DESKTOP, script)
    assert found == [
        "false",
        f"more ({length - folded:,} characters)",
        "true",
        "less",
        length,
        folded + 1,
        "“Lin” adds +0.500",
        "“e 0 of” adds −0.250",
        "“Lin” adds +0.500",
        [["token helps", "+0.500"], ["token harms", "−0.250"], ["token", "0.000"]],
        ["Park", "Park"],
    ]


def test_the_page_can_make_no_request(tmp_path: Path, full: PageContent) -> None:
    requests = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Counter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            script = """
              const site = "http://127.0.0.1:PORT";
              let refused = 0;
              document.addEventListener("securitypolicyviolation", () => { refused += 1; });
              const add = (tag, fields) => document.head.append(Object.assign(document.createElement(tag), fields));
              add("img", { src: site + "/image" });
              add("script", { src: site + "/script" });
              add("link", { rel: "stylesheet", href: site + "/style" });
              add("iframe", { src: site + "/frame" });
              add("style", { textContent: `body { background: url(${site}/background) }` });
              await window.fetch(site + "/fetch", { mode: "no-cors" }).catch(() => null);
              window.navigator.sendBeacon(site + "/beacon");
              add("script", { textContent: "document.title = 'taken'" });
              await rest(1000);
              return [refused, document.title];
            """.replace("PORT", str(server.server_port))
            page = render(full)
            (refused, title), _, _ = browse(tmp_path, page, DESKTOP, script)
            assert requests == []
            assert title == "Q0 · A title"
            assert refused >= 7
            browse(tmp_path, re.sub("<meta http-equiv[^>]*>", "", page), DESKTOP, script)
            assert len(requests) >= 4  # the same page without its policy: this test can fail
        finally:
            server.shutdown()
            thread.join()
