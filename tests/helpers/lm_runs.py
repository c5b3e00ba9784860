"""Small models and files for `trak-fast lm`, its command in this process, and gradients of single texts by autograd."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from libraries import needs
from numpy.typing import NDArray
from torch import Tensor
from transformer_models import WORDS, new_model

from trak_fast.cli import main

transformers = needs("transformers")
tokenizers = needs("tokenizers")

LONGEST = 24
"""Tokens that the models take."""

SYLLABLES = [first + second for first in "bdfgklmnprst" for second in "aeiou"]

VOCABULARY = ["?", "<s>", "</s>", "[M]", *SYLLABLES][:WORDS]
"""Words of the tokenizer: special ones, and syllables."""

PLAIN = VOCABULARY[4:]
"""Words without special ones."""

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_word_tokenizer(folder: Path, chat: str | None = None) -> Any:
    """Saves a tokenizer of words between blanks, without special tokens around a text, and returns it."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="?", bos_token="<s>", eos_token="</s>", mask_token="[M]", chat_template=chat
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, family: str = "gpt2", *, seed: int = 0, **settings: Any) -> Any:
    """Saves a small model with random weights and a tokenizer, and returns it."""
    limit = {"n_positions": LONGEST} if family == "gpt2" else {"max_position_embeddings": LONGEST}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(family, **{**limit, **settings})
    model.save_pretrained(folder)
    save_word_tokenizer(folder)
    return model


def texts_of(lengths: Iterable[int], *, seed: int = 0, words: Sequence[str] = PLAIN) -> list[str]:
    """Draws a text for each number of words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(np.array(words), length)) for length in lengths]


def write(file: Path, rows: Iterable[str | Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines; a string is the field "text"."""
    lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def page_data(file: Path) -> Any:
    """Reads the data of a page."""
    return json.loads(file.read_text(encoding="utf-8").split('id="content">')[1].split("</script>")[0])


@dataclass(frozen=True)
class Result:
    """The exit status of a command, and what it printed."""

    status: int
    out: str
    err: str


def call(*words: object) -> Result:
    """Runs `trak-fast lm` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["lm", *map(str, words)])
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*words: object) -> Result:
    """Runs `trak-fast lm`, which is to end well."""
    result = call(*words)
    assert result.status == 0, result.err
    return result


def refusal(*words: object) -> str:
    """Runs `trak-fast lm`, which is to refuse an argument or a file, and returns its one sentence."""
    result = call(*words)
    assert result.status == 2, (result.status, result.err)
    assert len(result.err.splitlines()) == 1, result.err
    return result.err.removeprefix("trak-fast: error: ").strip()


def scores_of(folder: Path) -> NDArray[np.float32]:
    """Reads all scores of a folder of results."""
    scores: NDArray[np.float32] = np.load(folder / "scores.npy")
    return scores


def gradients_alone(model: Any, texts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None) -> Tensor:
    """Differentiates f = log(p/(1 − p)) of single texts by all parameters, in float64, (B, D).

    Args:
        model: A causal language model.
        texts: Token ids of each.
        firsts: The first token of each that is scored; by default the second token.
    """
    model = model.double()
    parameters = list(model.parameters())
    rows = []
    for number, ids in enumerate(texts):
        first = 1 if firsts is None else firsts[number]
        tokens = torch.tensor([ids])
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
        )
        log_p = -losses[first - 1 :].mean()
        value = log_p - torch.log(-torch.expm1(log_p))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)
