"""Small pages of `trak-fast lm`, and texts that could break one."""

from typing import Any

from trak_fast.lm.page import Card, Histogram, PageContent, QueryView

HOSTILE = {
    "end of script": "a</script><script>document.title = 'taken'</script><!--<script>",
    "quotes": "\"double\" 'single' `back` \\ \\u0041 &amp; &lt;b&gt;",
    "separators": "one\u2028two\u2029three\u0085four",
    "right to left": "\u202eabc\u202c שלום \u200f\u061c\u2067x\u2069 \ufeff\u00ad",
    "emoji": "a 👩‍🚀 b 🏳️‍🌈 c",
    "control": "nul \x00 escape \x1b delete \x7f\ttab\r\nline\rend",
    "lone surrogates": "high \ud83d low \udc00 swapped \ude00\ud83d",
    "noncharacters": "\ufffe\uffff\U0001ffff",
}


def card(text: str, *, row: int = 0, score: float = 0.1, rank: int = 1, **fields: Any) -> Card:
    return Card(rank=rank, score=score, row=row, id=f"doc-{row}", where=f"wiki.jsonl:{row + 1}", text=text, **fields)


def query(number: int = 0, top: tuple[Card, ...] = (), worst: tuple[Card, ...] = (), **fields: Any) -> QueryView:
    scores = [shown.score for shown in (*top, *worst)] + [0.0] * 7
    texts = {"prompt": "Who wrote it?", "completion": " Park", "text": None, "name": None, **fields}
    return QueryView(number=number, top=top, worst=worst, histogram=Histogram.count(scores, bins=9), **texts)


def content(*queries: QueryView, **fields: Any) -> PageContent:
    return PageContent(queries=queries, **{"title": "A title", "facts": (("model", "gpt2"),), "tie": 0.0, **fields})
