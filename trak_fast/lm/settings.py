"""The settings of a run that its features depend on: from flags, from run.json, and the differences of the two."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import choice, integer
from .models.loading import ATTENTION

METHODS = ("trak", "cosine", "dot", "less")
"""Names of the ways to scores."""

SKETCHES = ("auto", "dense", "sjlt", "two_sided")
"""Names of the ways in which gradients are made small."""

LONG = ("cut", "split")
"""Names of the ways to take documents that are longer than the model takes."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model may be run in."""

TASKS = ("causal_lm", "masked_lm", "text_classification")
"""Names of the tasks that texts are attributed for."""

FOUND_BY_CONTENT = ("models", "train", "base", "tokenizer")
"""Settings that may change as long as the weights and documents stay: paths."""

FIELDS = ("text", "prompt", "completion", "id")
"""Settings that name fields, of training documents and questions."""

MASKINGS = 4
"""Maskings of a document by default."""

MOST_TOKENS = 2**31
"""Tokens of a document at most."""


@dataclass(frozen=True)
class Settings:
    """All that the features of a run depend on.

    Attributes:
        models: Folders of the checkpoints.
        train: Files and folders of the training documents.
        base: Folder of the model that adapters belong to; None: as the adapters say.
        tokenizer: Folder of the tokenizer; None: the model's.
        text: Field of a text, like the next four; None: found.
        prompt: Field of a prompt.
        completion: Field of a completion.
        id: Field of a document's name.
        label: Field of a class.
        by_file: Takes a .txt file as one document, not as one a line.
        task: One of `TASKS`; None: as the architecture says.
        params: "all", "linear", "trainable", or patterns of parameters' names; None: as the method likes them.
        method: One of `METHODS`.
        proj_dim: Numbers of a feature, k; None: as the method likes them.
        sketch: One of `SKETCHES`.
        max_tokens: Tokens of a document at most; None: as many as the model takes.
        long: One of `LONG`.
        maskings: Maskings of a document whose scores are averaged, for masked language models; None: four.
        dtype: One of `DTYPES`; None: the checkpoint's.
        attention: Name of an implementation of attention; None: the model's.
        seed: Determines the projection, maskings, and the documents that a metric is made of.
    """

    models: tuple[str, ...]
    train: tuple[str, ...]
    base: str | None = None
    tokenizer: str | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    id: str | None = None
    label: str | None = None
    by_file: bool = False
    task: str | None = None
    params: tuple[str, ...] | None = None
    method: str = "trak"
    proj_dim: int | None = None
    sketch: str = "auto"
    max_tokens: int | None = None
    long: str = "cut"
    maskings: int | None = None
    dtype: str | None = None
    attention: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is not among those allowed.
            TypeError: A value is no number.
        """
        choice("--method", self.method, METHODS)
        choice("--sketch", self.sketch, SKETCHES)
        choice("--long", self.long, LONG)
        integer("--seed", self.seed, 0, 2**63 - 1)
        if self.maskings is not None:
            integer("--maskings", self.maskings, 1, 1000)
        if self.task is not None:
            choice("--task", self.task, TASKS)
        if self.dtype is not None:
            choice("--dtype", self.dtype, DTYPES)
        if self.attention is not None:
            choice("--attention", self.attention, ATTENTION)
        if self.proj_dim is not None:
            integer("--proj-dim", self.proj_dim, 1, 2**24)
        if self.max_tokens is not None:
            integer("--max-tokens", self.max_tokens, 2, MOST_TOKENS)
        if self.sketch == "two_sided" and self.method == "less":
            raise ValueError(
                "--sketch must be auto, dense or sjlt with --method less, not two_sided: a step of Adam has no factors"
            )

    def require_fit(self, task: str) -> None:
        """Refuses settings that would have no influence on a task.

        Raises:
            ValueError: There are some.
        """
        for name, own in {"maskings": "masked_lm", "label": "text_classification"}.items():
            if getattr(self, name) is not None and task != own:
                raise ValueError(f"{flag_of(name)} must be left out for {task}: it is for {own}")

    def stored(self) -> dict[str, Any]:
        """Returns what run.json has of the settings; paths are whole, so that the run can be opened from elsewhere."""
        content = dataclasses.asdict(self)
        for name in ("models", "train"):
            content[name] = [str(Path(path).expanduser().resolve()) for path in content[name]]
        for name in ("base", "tokenizer"):
            if content[name] is not None:
                content[name] = str(Path(content[name]).expanduser().resolve())
        return content


def settings_of(given: Mapping[str, Any], out: str) -> Settings:
    """Makes the settings of a new run of those that were given; the others are None.

    Args:
        given: The settings by name.
        out: The folder of the run, for the message.

    Raises:
        ValueError: There is no model or no training file, or a value is not among those allowed.
        TypeError: A value is no number.
    """
    known = {name: value for name, value in given.items() if value is not None}
    if not known.get("models"):
        raise ValueError(f"MODEL must be given, a folder of save_pretrained, or several: {out}/ has no run yet")
    if not known.get("train"):
        raise ValueError(f"--train must be given, a file of training documents, or several: {out}/ has no run yet")
    return _make(known)


def merged(stored: Mapping[str, Any], given: Mapping[str, Any], out: str, *, has_questions: bool = False) -> Settings:
    """Takes the settings of a run that is there, once those that are given agree with them.

    Args:
        stored: Those of run.json.
        given: Those that were given; the others are None.
        out: The run's folder, for the message.

    Raises:
        ValueError: Some differ, or run.json is no longer understood.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    if set(stored) != names:
        raise ValueError(f"{out}/run.json was written by another version; give another --out, or --overwrite")
    own = _make(stored)
    new: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}
    if new.get("train") is None:
        new = {name: value for name, value in new.items() if name not in FIELDS}
    _make({**stored, **new})  # refuses values that no run has
    different = [
        name for name, value in new.items() if name not in FOUND_BY_CONTENT and value != getattr(own, name)
    ]  # fmt: skip
    if different:
        raise ValueError(
            f"{out}/ was made {_told(own, different)}; {_mended(own, different)}, another --out, or --overwrite"
        )
    if "models" in new and len(new["models"]) != len(own.models):
        raise ValueError(
            f"{out}/ was made with {len(own.models)} checkpoints, not {len(new['models'])}; give these, another --out, "
            "or --overwrite"
        )
    return _make({**stored, **{name: value for name, value in new.items() if name in FOUND_BY_CONTENT}})


def _make(values: Mapping[str, Any]) -> Settings:
    """Makes settings of values as JSON has them."""
    known: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return Settings(**known)


def flag_of(name: str) -> str:
    """Returns the flag of a setting."""
    return "--" + name.replace("_", "-")


def _mended(settings: Settings, names: Sequence[str]) -> str:
    """Says what to do about flags that differ."""
    pronoun = "these" if len(names) > 1 else "this"
    are_left_out = [getattr(settings, name) is None or getattr(settings, name) is False for name in names]
    if all(are_left_out):
        return f"leave {pronoun} out"
    return f"give {pronoun}" if not any(are_left_out) else "do so"


def _told(settings: Settings, names: Sequence[str]) -> str:
    """Says which values settings have: "with --proj-dim 2048, without --base"."""
    parts: dict[str, list[str]] = {"with": [], "without": []}
    for name in names:
        value = getattr(settings, name)
        if value is None or value is False:
            parts["without"].append(flag_of(name))
        elif value is True:
            parts["with"].append(flag_of(name))
        else:
            words = value if isinstance(value, tuple) else (str(value),)
            parts["with"].append(f"{flag_of(name)} {shlex.join(words)}")
    return " and ".join(f"{word} {', '.join(flags)}" for word, flags in parts.items() if flags)
