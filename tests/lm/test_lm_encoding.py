"""Tokens and labels of documents, against the tokenizer's own calls and labels written out by hand."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs

from trak_fast.lm.texts.documents import Document
from trak_fast.lm.texts.encoding import Encoded, Piece, collate, encode, make_batches

needs("transformers")
needs("jinja2")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from trak_fast.tasks import CausalLM  # noqa: E402

N = -100
SENTENCES = ["the cat sat on the mat", "who wrote the first paper", "um três 漢字", "Answer: the paper was written"]
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def words(template: str = "$A", **special: Any) -> Any:
    """Makes a tokenizer of letters, each a token: a is 5, b is 6 and so on, beside <s> 0, </s> 1, [M] 2, ? 3."""
    vocabulary = {"<s>": 0, "</s>": 1, "[M]": 2, "?": 3} | {chr(97 + i): 5 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>", "[M]"])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "[M]", "unk_token": "?"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level(template: str = "<s> $A", chat: str | None = None) -> Any:
    """Makes a tokenizer of byte-level BPE, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat, model_max_length=8
    )


class Slow:
    """A tokenizer that does not tell which characters a token stands for."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.fast = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __call__(self, *texts: Any, return_offsets_mapping: bool = False, **options: Any) -> Any:
        assert not return_offsets_mapping
        return self.fast(*texts, **options)


def document(row: int = 0, **content: Any) -> Document:
    if "messages" in content:
        content["messages"] = tuple({"role": role, "content": said} for role, said in content["messages"])
    return Document(file="wiki.jsonl", place=row + 14, row=row, **content)


def texts(*lines: str) -> list[Document]:
    return [document(row, text=text) for row, text in enumerate(lines)]


def encoded(documents: Sequence[Document], tokenizer: Any, **options: Any) -> Encoded:
    return encode(documents, tokenizer, **{"max_tokens": 100, "vocab_size": 1000} | options)


def rows(encoding: Encoded) -> list[tuple[int, list[int], list[int]]]:
    return [(piece.document, piece.input_ids.tolist(), piece.labels.tolist()) for piece in encoding.pieces]


def said(piece: Piece, shown: str) -> list[str]:
    assert piece.spans is not None
    return [shown[a:b] for a, b in piece.spans]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("slow", [False, True])
def test_texts_have_the_tokens_of_the_tokenizers_own_call(template: str, slow: bool) -> None:
    tokenizer = byte_level(template)
    documents = texts(*SENTENCES, "<s>twice</s>")
    encoding = encoded(documents, Slow(tokenizer) if slow else tokenizer)
    for piece, x in zip(encoding.pieces, documents, strict=True):
        ids = tokenizer(x.text)["input_ids"]
        assert piece.input_ids.tolist() == ids
        assert piece.labels.tolist() == [N, *ids[1:]]
        assert piece.input_ids.dtype == piece.labels.dtype == np.int32
        if slow:
            assert piece.spans is None
        else:
            assert piece.spans is not None
            assert piece.spans.tolist() == [
                [*x] for x in tokenizer(x.text, return_offsets_mapping=True)["offset_mapping"]
            ]
    assert encoding.lengths == [len(tokenizer(x.text)["input_ids"]) for x in documents]
    assert encoding.tokens == sum(encoding.lengths)
    assert (encoding.cut, encoding.empty) == (0, ())


def test_short_and_empty_documents_leave_their_neighbours_as_they_are() -> None:
    encoding = encoded(texts("abcdef", "", "abcde", "a", "abcd"), words())
    assert rows(encoding) == [
        (0, [5, 6, 7, 8, 9, 10], [N, 6, 7, 8, 9, 10]),
        (1, [1], [N]),
        (2, [5, 6, 7, 8, 9], [N, 6, 7, 8, 9]),
        (3, [5], [N]),
        (4, [5, 6, 7, 8], [N, 6, 7, 8]),
    ]
    assert encoding.empty == (1, 3)


def test_the_token_of_an_empty_document_is_one_that_the_model_knows() -> None:
    assert rows(encoded(texts(""), words(eos_token=None))) == [(0, [0], [N])]
    assert rows(encoded(texts(""), words(), vocab_size=1)) == [(0, [0], [N])]


@pytest.mark.parametrize(("template", "before"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_completions_alone_are_scored_after_prompts_that_no_special_token_ends(
    template: str, before: list[int]
) -> None:
    documents = [
        document(0, prompt="ab", completion="cd"),
        document(1, prompt="ab", completion="cd", ends_with_eos=True),
        document(2, prompt="", completion="cd"),
        document(3, prompt="ab", completion=""),
        document(4, prompt="a</s>", completion="<s>"),
    ]
    encoding = encoded(documents, words(template))
    none = [N for _ in before]
    alone = [N, 8] if not before else [N, 7, 8]
    assert rows(encoding) == [
        (0, [*before, 5, 6, 7, 8], [*none, N, N, 7, 8]),
        (1, [*before, 5, 6, 7, 8, 1], [*none, N, N, 7, 8, 1]),
        (2, [*before, 7, 8], alone),
        (3, [*before, 5, 6], [*none, N, N]),
        (4, [*before, 5, 1, 0], [*none, N, N, 0]),
    ]
    assert encoding.empty == (3,)
    assert said(encoding.pieces[1], "abcd") == ["" for _ in before] + ["a", "b", "c", "d", ""]


@pytest.mark.parametrize("ends", [False, True])
def test_the_end_token_is_added_where_it_is_asked_for(ends: bool) -> None:
    documents = [document(i, prompt="a", completion="b", ends_with_eos=bool(i)) for i in range(2)]
    encoding = encoded(documents, words(), ends_with_eos=ends)
    assert [ids for _, ids, _ in rows(encoding)] == [[5, 6, 1] if ends else [5, 6]] * 2


def test_a_cut_keeps_the_first_tokens_of_a_text() -> None:
    encoding = encoded(texts("abcdef", "abcd", "abcde"), words("<s> $A"), max_tokens=5)
    assert [ids for _, ids, _ in rows(encoding)] == [[0, 5, 6, 7, 8], [0, 5, 6, 7, 8], [0, 5, 6, 7, 8]]
    assert [labels for _, _, labels in rows(encoding)] == [[N, 5, 6, 7, 8]] * 3
    assert encoding.cut == 2
    assert said(encoding.pieces[0], "abcdef") == ["", "a", "b", "c", "d"]


CUTS: list[tuple[str, str, str, list[int], list[int]]] = [
    ("<s> $A", "abcdef", "xy", [0, 9, 10, 28, 29], [N, N, N, 28, 29]),
    ("$A", "abcdef", "xy", [8, 9, 10, 28, 29], [N, N, N, 28, 29]),
    ("<s> $A", "ab", "uvwxyz", [0, 25, 26, 27, 28], [N, 25, 26, 27, 28]),
    ("$A", "ab", "uvwxyz", [6, 25, 26, 27, 28], [N, 25, 26, 27, 28]),
    ("$A", "", "uvwxyz", [25, 26, 27, 28, 29], [N, 26, 27, 28, 29]),
    ("<s> $A", "abcdef", "", [0, 7, 8, 9, 10], [N] * 5),
    ("<s> $A", "ab", "xyz", [0, 6, 28, 29, 30], [N, N, 28, 29, 30]),
]


@pytest.mark.parametrize(("template", "prompt", "completion", "ids", "labels"), CUTS)
def test_a_cut_keeps_the_completion_and_the_end_of_the_prompt(
    template: str, prompt: str, completion: str, ids: list[int], labels: list[int]
) -> None:
    encoding = encoded([document(prompt=prompt, completion=completion)], words(template), max_tokens=5)
    assert rows(encoding) == [(0, ids, labels)]
    assert encoding.cut == 1
    shown = [chr(92 + token) if token else "" for token in ids]
    assert said(encoding.pieces[0], prompt + completion) == shown


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_windows_predict_every_token_but_the_first_once(length: int, size: int) -> None:
    text = "abcdefghijkl"[:length]
    encoding = encoded(texts(text), words(), max_tokens=size, long="split")
    predicted = [token for _, _, labels in rows(encoding) for token in labels if token != N]
    assert predicted == list(range(6, 5 + length))
    assert encoding.cut == 0
    for _, ids, labels in rows(encoding):
        assert len(ids) <= size
        assert labels == [N, *ids[1:]]
    assert len(encoding.pieces) == max(1, -(-(length - 1) // (size - 1)))


def test_windows_without_a_scored_token_are_left_out() -> None:
    documents = [document(0, prompt="abcdefg", completion="xy"), document(1, prompt="abcdefg", completion="")]
    encoding = encoded(documents, words(), max_tokens=4, long="split")
    assert rows(encoding) == [(0, [11, 28, 29], [N, 28, 29]), (1, [5, 6, 7, 8], [N] * 4)]
    assert encoding.empty == (1,)


CHATS = [
    [("user", "who wrote it"), ("assistant", "the cat três"), ("user", "a"), ("assistant", "Answer: ?")],
    [("system", "mat"), ("user", "assistant"), ("assistant", "user")],
    [("user", "no answer")],
    [("user", ""), ("assistant", "paper")],
]


ANSWERS = {
    MARKED: ["the cat três</s>Answer: ?</s>", "user</s>", "", "paper</s>"],
    PLAIN: [
        " the cat três\nAnswer: ?\n",
        "user\n",
        "",
        " paper\n",
    ],  # a space that is in an answer's first token counts
}


@pytest.mark.parametrize(("template", "slow"), [(MARKED, False), (MARKED, True), (PLAIN, False)])
def test_chats_have_the_tokens_of_their_template_and_the_assistant_is_scored(template: str, slow: bool) -> None:
    tokenizer = byte_level(chat=template)
    documents = [document(row, messages=chat) for row, chat in enumerate(CHATS)]
    encoding = encoded(documents, Slow(tokenizer) if slow else tokenizer)
    for piece, x, answers in zip(encoding.pieces, documents, ANSWERS[template], strict=True):
        ids = tokenizer.apply_chat_template(list(x.messages or ()), tokenize=True, return_dict=True)["input_ids"]
        assert piece.input_ids.tolist() == ids
        assert ids.count(0) == (template == MARKED)
        scored = piece.labels != N
        assert tokenizer.decode(piece.labels[scored]) == answers
        assert (piece.labels[scored] == piece.input_ids[scored]).all()
    assert encoding.empty == (2,)


def test_a_last_character_of_several_tokens_is_scored_whole() -> None:
    tokenizer = byte_level(chat=MARKED.replace("{{ eos_token }}{% endgeneration", "{% endgeneration"))
    [piece] = encoded([document(messages=[("user", "ß"), ("assistant", "xß"), ("user", "ß")])], tokenizer).pieces
    assert piece.labels[piece.labels != N].tolist() == tokenizer("xß", add_special_tokens=False)["input_ids"]


def test_chats_are_cut_after_their_first_tokens_and_split_as_texts_are() -> None:
    tokenizer = byte_level(chat=MARKED)
    documents = [document(messages=CHATS[0])]
    [whole] = encoded(documents, tokenizer).pieces
    cut = encoded(documents, tokenizer, max_tokens=40)
    assert rows(cut) == [(0, whole.input_ids[:40].tolist(), whole.labels[:40].tolist())]
    assert cut.cut == 1
    split = encoded(documents, tokenizer, max_tokens=10, long="split")
    predicted = [token for piece in split.pieces for token in piece.labels[piece.labels != N]]
    assert predicted == whole.labels[whole.labels != N].tolist()


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_spans_of_chats_are_those_of_the_contents(template: str) -> None:
    documents = [document(row, messages=chat) for row, chat in enumerate([*CHATS, [("user", "  cat \n")]])]
    for piece, x in zip(encoded(documents, byte_level(chat=template)).pieces, documents, strict=True):
        assert piece.spans is not None
        covered = sorted({character for a, b in piece.spans for character in range(a, b)})
        expected: list[int] = []
        place = 0
        for message in x.messages or ():
            place += len(message["role"]) + 2
            content = message["content"]
            kept = content.strip() if template == PLAIN else content
            expected += range(place + content.index(kept), place + content.index(kept) + len(kept))
            place += len(content) + 1
        assert covered == expected


def test_masking_replaces_every_seventh_token_and_scores_it() -> None:
    lines = ["abcdefghijklmnopqrst", "abc", "", "a", "[M]</s>a?"]
    encoding = encoded(texts(*lines), words("<s> $A </s>"), task="masked_lm", maskings=3)
    assert [piece.document for piece in encoding.pieces] == [row for row in range(5) for _ in range(3)]
    counts = {0: 3, 1: 1, 2: 0, 3: 1, 4: 1}
    for row, ids, labels in rows(encoding):
        whole = words("<s> $A </s>")(lines[row])["input_ids"]
        masked = [t for t, label in enumerate(labels) if label != N]
        assert len(masked) == counts[row]
        assert [ids[t] for t in masked] == [2] * len(masked)
        assert [label if label != N else token for token, label in zip(ids, labels, strict=True)] == whole
        assert not {whole[t] for t in masked} & {0, 1, 2, 3}
    assert encoding.empty == (2,)
    assert len({tuple(labels) for row, _, labels in rows(encoding) if row == 0}) == 3


def test_masked_tokens_depend_on_seed_text_and_masking_alone() -> None:
    def labels(*lines: str, **options: Any) -> list[list[int]]:
        return [row[2] for row in rows(encoded(texts(*lines), words(), task="masked_lm", **options))]

    long, other = "abcdefghijklmnopqrstuvwxyz" * 2, "zyx" * 9
    first, second = labels(long, maskings=2)
    assert first != second
    assert labels(other, long, "", maskings=2)[2:4] == [first, second]
    assert labels(long) == [first]
    assert labels(long, seed=1) != [first]


def test_every_token_is_masked_in_about_15_of_100_maskings() -> None:
    encoding = encoded(texts("abcdefghijklmnopqrst"), words(), task="masked_lm", maskings=1000)
    share = np.mean([piece.labels != N for piece in encoding.pieces], axis=0)
    # Each masking takes 3 of 20: variance 0.15 · 0.85 / 1000, so 5 standard deviations are 0.057
    assert np.abs(share - 0.15).max() < 0.057


@pytest.mark.parametrize("task", ["masked_lm", "text_classification"])
def test_windows_of_whole_texts_keep_the_special_tokens(task: str) -> None:
    documents = [document(text="abcde", label=1)]
    tokenizer = words("<s> $A </s>")
    cut = encoded(documents, tokenizer, task=task, max_tokens=4)
    split = encoded(documents, tokenizer, task=task, max_tokens=4, long="split")

    def originals(encoding: Encoded) -> list[list[int]]:
        if task == "text_classification":
            return [piece.input_ids.tolist() for piece in encoding.pieces]
        return [np.where(piece.labels == N, piece.input_ids, piece.labels).tolist() for piece in encoding.pieces]

    assert originals(cut) == [[0, 5, 6, 1]] == [tokenizer("abcde", truncation=True, max_length=4)["input_ids"]]
    assert originals(split) == [[0, 5, 6, 1], [0, 7, 8, 1], [0, 9, 1]]
    assert (cut.cut, split.cut) == (1, 0)
    assert said(split.pieces[1], "abcde") == ["", "c", "d", ""]


def test_labels_of_classes_are_numbers_or_names_that_the_model_knows() -> None:
    labels: list[str | int] = ["good", 0, "1", "bad"]
    documents = [document(row, text="ab", label=label) for row, label in enumerate(labels)]
    options = {"task": "text_classification", "label_ids": {"bad": 0, "good": 1}}
    assert [labels for _, _, labels in rows(encoded(documents, words(), **options))] == [[1], [0], [1], [0]]
    empty = encoded([document(7, text="", label=1)], words(), **options)
    assert (rows(empty), empty.empty) == ([(7, [1], [1])], (7,))


def plain_chat(*roles: str) -> Document:
    return document(messages=[(role, "a") for role in roles])


CANNOT_BE_TOLD = (
    "wiki.jsonl:14: the assistant's message {} cannot be told from the rest, as the chat template changes what is "
    "before it; --tokenizer DIR with a template that has {{% generation %}}"
)
REFUSED: list[tuple[Document, Any, Mapping[str, Any], str]] = [
    (
        document(text="abz"),
        words(),
        {"vocab_size": 30},
        "token 30 of wiki.jsonl:14 is beyond the model's 30: the tokenizer is another model's",
    ),
    (
        document(text="abz"),
        words(),
        {"vocab_size": 30, "task": "masked_lm"},
        "token 30 of wiki.jsonl:14 is beyond the model's 30: the tokenizer is another model's",
    ),
    (
        plain_chat("user"),
        words(),
        {},
        "wiki.jsonl:14 is a chat, and the tokenizer has no chat template; --tokenizer DIR with one, or --text names a "
        "field of text",
    ),
    (
        plain_chat("user"),
        byte_level(chat="{{ raise_exception('no system') }}"),
        {},
        "wiki.jsonl:14 does not fit the tokenizer's chat template (no system); mend its messages",
    ),
    (
        plain_chat("user", "assistant"),
        byte_level(chat="{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        {},
        CANNOT_BE_TOLD.format(2),
    ),
    (
        document(messages=[("user", "a"), ("assistant", "the")]),
        Slow(byte_level(chat=PLAIN)),  # the prompt ends with a space, which is part of the answer's first token
        {},
        CANNOT_BE_TOLD.format(2),
    ),
    (plain_chat("assistant", "user"), byte_level(chat=PLAIN), {}, CANNOT_BE_TOLD.format(1)),
    (
        document(prompt="a", completion="b"),
        words(),
        {"task": "masked_lm"},
        "wiki.jsonl:14 has a prompt and a completion, and masked_lm takes a text; --text names its field",
    ),
    (
        plain_chat("user"),
        words(),
        {"task": "text_classification"},
        "wiki.jsonl:14 has messages, and text_classification takes a text; --text names its field",
    ),
    (
        document(text="a"),
        words(mask_token=None),
        {"task": "masked_lm"},
        "the tokenizer has no mask token, which masked_lm needs; --tokenizer DIR, or another --task",
    ),
    (
        document(text="a"),
        words(),
        {"task": "text_classification"},
        "wiki.jsonl:14 has no label, a string or a whole number; --label names its field",
    ),
    (
        document(text="a", label="meh"),
        words(),
        {"task": "text_classification", "label_ids": {"bad": 0, "good": 1}},
        'wiki.jsonl:14 has the label "meh", and the model\'s labels are "bad" (0), "good" (1); mend one of them',
    ),
    (
        document(text="a", label=2),
        words(),
        {"task": "text_classification", "label_ids": {"bad": 0, "good": 1}},
        'wiki.jsonl:14 has the label 2, and the model\'s labels are "bad" (0), "good" (1); mend one of them',
    ),
    (
        document(text="a", label=-1),
        words(),
        {"task": "text_classification"},
        "wiki.jsonl:14 has the label -1, and the model's labels are numbers from 0; mend one of them",
    ),
    (
        document(text="a"),
        words(),
        {"task": "seq2seq_lm"},
        "`task` must be one of causal_lm, masked_lm, text_classification, not 'seq2seq_lm'",
    ),
    (document(text="a"), words(), {"long": "drop"}, "`long` must be cut or split, not 'drop'; --long cut"),
    (
        document(text="a"),
        words(),
        {"max_tokens": 1},
        "`max_tokens` must be 2 or more, not 1, as one token predicts another; --max-tokens",
    ),
    (
        document(text="a"),
        words("<s> $A </s>"),
        {"max_tokens": 2, "task": "masked_lm"},
        "`max_tokens` must be more than the 2 special tokens of a text, not 2; --max-tokens",
    ),
    (
        document(text="a"),
        words(),
        {"maskings": 2},
        "`maskings` must be 1, or more for masked_lm, not 2 for causal_lm; leave it out",
    ),
]


@pytest.mark.parametrize(("given", "tokenizer", "options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused(
    given: Document, tokenizer: Any, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        encoded([given], tokenizer, **options)
    assert str(caught.value) == message


def test_texts_longer_than_the_tokenizers_limit_are_encoded_without_a_word(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level(chat=MARKED)
    level = logging.getLogger("transformers").level
    encoded([document(text="z" * 50)], tokenizer)
    encoded([document(messages=CHATS[0]), document(1, prompt="z" * 50, completion="z" * 50)], tokenizer)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger("transformers").level == level


def test_documents_beyond_one_call_of_the_tokenizer_stay_in_order() -> None:
    lines = ["abcdefghijklmnopqrstuvwxyz"[: i % 27] for i in range(2100)]
    encoding = encoded(texts(*lines), words())
    assert [piece.document for piece in encoding.pieces] == list(range(2100))
    assert [piece.input_ids.tolist() for piece in encoding.pieces] == [
        [ord(letter) - 92 for letter in line] or [1] for line in lines
    ]


@pytest.mark.parametrize("batch_tokens", [1, 7, 16, 1000])
def test_batches_hold_every_piece_once_and_no_more_tokens_than_allowed(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 12, 100).tolist()
    batches = make_batches(lengths, batch_tokens)
    order = [i for batch in batches for i in batch]
    assert order == sorted(range(100), key=lambda i: (-lengths[i], i))
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        longest = lengths[batch[0]]
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert not following or (len(batch) + 1) * longest > batch_tokens


def test_batches_written_out() -> None:
    assert make_batches([6, 0, 5, 1, 4], 12) == [[0, 2], [4, 3, 1]]
    assert make_batches([], 12) == []
    with pytest.raises(ValueError, match="`batch_tokens` must be 1 or more, not 0; --batch-tokens"):
        make_batches([1], 0)


def test_batches_are_padded_at_the_right_and_predict_what_the_labels_say() -> None:
    pieces = encoded([*texts("abc", "a"), document(2, prompt="a", completion="b")], words()).pieces
    batch = collate(pieces, "causal_lm", pad_id=4)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7], [5, 4, 4], [5, 6, 4]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "labels": [[N, 6, 7], [N, N, N], [N, 6, N]],
    }
    assert all(x.dtype == torch.int64 for x in batch.values())
    assert CausalLM().labels(batch).tolist() == [[6, 7, N], [N, N, N], [6, N, N]]


def test_batches_of_classes_have_one_label_a_piece() -> None:
    documents = [document(0, text="ab", label=2), document(1, text="", label=0)]
    batch = collate(encoded(documents, words(), task="text_classification").pieces, "text_classification")
    assert batch["input_ids"].tolist() == [[5, 6], [1, 0]]
    assert batch["labels"].tolist() == [2, 0]
