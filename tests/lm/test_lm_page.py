"""The page of queries and documents: its data, for hostile texts too, and the content that it refuses."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_pages import HOSTILE, card, content, query

from trak_fast.lm.page import Histogram, PageContent, render


def data_of(page: str) -> Any:
    """Reads a page's data as a browser does: the text of an element, then JSON."""

    class Island(HTMLParser):
        text, inside = "", False

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.inside = ("id", "content") in attributes

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            self.text += data if self.inside else ""

    island = Island()
    island.feed(page.encode("utf-8").decode("utf-8"))
    return json.loads(island.text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_data_holds_hostile_texts_as_they_are(text: str) -> None:
    shown = replace(card(text), id=text, where=text)
    page = render(
        content(query(prompt=text, completion=text, name=text, top=(shown,)), title=text, facts=((text, text),))
    )
    data = data_of(page)
    assert data["title"] == text
    assert data["documents"] == [{"row": 0, "id": text, "where": text, "text": text}]
    assert [data["queries"][0][field] for field in ("prompt", "completion", "name")] == [text] * 3
    assert page.lower().count("<script") == page.lower().count("</script") == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", page.split("</footer>")[1])


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_data_holds_any_text_as_it_is(text: str) -> None:
    assert data_of(render(content(query(top=(card(text),)))))["documents"][0]["text"] == text


def test_a_document_of_many_queries_is_written_once() -> None:
    marker = "a text like no other"
    queries = [query(number, top=(card(marker, row=5), card("b", row=2))) for number in range(10)]
    page = render(content(*queries))
    assert page.count(marker) == 1
    assert [[one["document"] for one in shown["top"]] for shown in data_of(page)["queries"]] == [[0, 1]] * 10


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab é€😀👩‍\ud83d\n")), st.data())
def test_places_of_tokens_are_those_of_javascript(text: str, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    tokens = tuple((start, end, 1.0) for start, end in pairwise(cuts))
    found = data_of(render(content(query(top=(card(text, tokens=tokens),)))))["queries"][0]["top"][0]["tokens"]
    units = text.encode("utf-16-le", "surrogatepass")
    cut = [units[2 * start : 2 * end] for start, end, _ in found]
    assert cut == [text[start:end].encode("utf-16-le", "surrogatepass") for start, end, _ in tokens]


def test_parts_of_tokens_that_share_a_character_add_up() -> None:
    tokens = ((0, 0, 0.5), (0, 1, 1.0), (1, 2, 0.25), (1, 2, 0.5), (1, 3, -1.0), (3, 4, 2.0), (4, 4, -0.125))
    found = data_of(render(content(query(top=(card("a😀bc", tokens=tokens),)))))["queries"][0]["top"][0]
    assert found["tokens"] == [[0, 1, 1.0], [1, 4, -0.25], [4, 5, 2.0]]
    assert found["rest"] == 0.375


def test_a_histogram_counts_each_score_once(rng: np.random.Generator) -> None:
    scores = rng.standard_normal(1000)
    found = Histogram.count(scores, bins=20)
    assert sum(found.counts) == 1000
    inside = [sum(low <= score < high for score in scores) for low, high in pairwise(found.edges)]
    inside[-1] += 1  # the largest score is the last edge
    assert list(found.counts) == inside


@pytest.mark.parametrize(
    ("bad", "message"),
    {
        "no query": (content(), "at least one query"),
        "numbers": (content(query(1), query(1)), "different numbers"),
        "tie": (content(query(), tie=-1.0), "`tie` must be finite and not negative, not -1.0"),
        "score": (
            content(replace(query(), top=(card("a", score=float("nan")),))),
            "score of row 0 must be finite, not nan",
        ),
        "token": (
            content(query(top=(card("abc", tokens=((0, 4, 1.0),)),))),
            r"text of 3 characters .* not \(0, 4, 1.0\)",
        ),
        "part": (content(query(top=(card("abc", tokens=((0, 1, float("inf")),)),))), "finite parts"),
        "row": (content(query(top=(card("a"),), worst=(card("b"),))), "row 0 must show one document"),
        "edges": (content(replace(query(), histogram=Histogram((1, 2), (0.0, 1.0)))), "2 edges of 2 counts"),
    }.values(),
)
def test_a_page_that_would_mislead_is_refused(bad: PageContent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(bad)


def test_a_tie_of_zero_claims_nothing() -> None:
    assert "±0.016" in render(content(query(), tie=0.016))
    assert "±" not in render(content(query(), tie=0.0)).split("<footer>")[1].split("</footer>")[0]


def test_without_scripts_a_page_tells_how_it_was_made_and_what_to_do() -> None:
    page = render(content(query(), title="a < b", facts=(("model <1>", "gpt2 & co"),)))
    still = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<h1>a &lt; b</h1>" in still
    assert "<dt>model &lt;1&gt;</dt><dd>gpt2 &amp; co</dd>" in still
    assert "scripts are switched\noff here" in still.split("<noscript>")[1].split("</noscript>")[0]
