"""The command `trak-fast lm`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failure import INTERRUPTED, Failure, checking_arguments
from .numbers import number
from .terminal import say

if TYPE_CHECKING:
    from ..lm.run import Run, Targets
    from ..lm.texts.documents import Documents, Fields

EPILOG = """
The same command goes on where a killed run stopped. Later, --out alone opens the run again: with --query or --ask it
answers other questions, and --train with more documents after the old ones adds these.
"""

SETTINGS = (
    "models", "train", "base", "tokenizer", "text", "prompt", "completion", "id", "label", "by_file", "task", "params",
    "method", "proj_dim", "sketch", "max_tokens", "long", "maskings", "dtype", "attention", "seed",
)  # fmt: skip
"""Flags that features depend on."""

GIGABYTE = 1e9
"""Bytes in the unit of --memory."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "say which training documents made a language model answer as it does, and write a page"
    parser = commands.add_parser("lm", help=text, description=text, epilog=EPILOG)
    parser.set_defaults(run=run, folder_is_told=True)
    flag = parser.add_argument
    flag("models", nargs="*", metavar="MODEL", help="folders of save_pretrained or of adapters; several are averaged")
    files = parser.add_argument_group("files (.jsonl, .json, .csv, .parquet, .txt, folders of these, save_to_disk)")
    add_training(files)
    flag = files.add_argument
    flag("--query", nargs="+", metavar="FILE", help="questions: the same kinds of files")
    flag("--ask", nargs="+", metavar="TEXT", help="one question: a prompt and its completion, or one text")
    flag(
        "--against", nargs="+", metavar="FILE", help="questions whose mean score is subtracted from that of each query"
    )
    flag("--group", metavar="FIELD", help="questions with the same value of this field are scored as one")
    out = parser.add_argument_group("results")
    flag = out.add_argument
    flag("--out", default="trak-fast-lm", metavar="DIR", help="folder to write to (trak-fast-lm)")
    flag("--name", metavar="NAME", help="folder in it for the results of these questions")
    flag("--top", type=number, default=20, metavar="N", help="best documents of each query (20)")
    flag("--worst", type=number, default=5, metavar="N", help="most harmful documents of each query (5)")
    flag("--tokens", type=number, default=3, metavar="N", help="documents of each query whose tokens are coloured (3)")
    flag("--scores", action="store_true", help="write all scores too, scores.npy: documents × queries")
    flag("--select", metavar="SHARE", help="write the documents with the highest scores, 5%% or a number, to train on")
    flag("--clean", action="store_true", help="rank training documents by self-influence: wrong ones come first")
    flag("--overwrite", action="store_true", help="delete the run in --out first")
    flag("--dry-run", action="store_true", help="predict time, memory and disk, and show one example; store nothing")
    flag("--json", action="store_true", help="print the results as JSON")
    add_way(parser)
    machine = parser.add_argument_group("machine (changes no scores)")
    add_machine(machine)


def add_training(files: argparse._ArgumentGroup) -> None:
    """Adds the flags of training documents and their fields."""
    flag = files.add_argument
    flag("--train", nargs="+", metavar="FILE", help="training documents")
    flag("--text", metavar="FIELD", help="field of a text; found by itself, as the next four are")
    flag("--prompt", metavar="FIELD", help="field of a prompt, which is not scored")
    flag("--completion", metavar="FIELD", help="field of a completion, which is scored")
    flag("--id", metavar="FIELD", help="field of a document's name")
    flag("--label", metavar="FIELD", help="field of a class, for classification")
    flag("--by-file", action="store_true", default=None, help="a .txt file is one document, not one a line")
    flag("--limit", type=number, metavar="N", help="take the first N training documents")


def _adder(group: argparse._ArgumentGroup, omitted: Collection[str]) -> Callable[..., None]:
    """Returns a function that adds a flag to a group, unless it is among those that a command has already."""

    def flag(name: str, **options: Any) -> None:
        if name.removeprefix("--").replace("-", "_") not in omitted:
            group.add_argument(name, **options)

    return flag


def add_way(parser: argparse.ArgumentParser, omitted: Collection[str] = ()) -> None:
    """Adds the flags of the way to features, but for those of names in `omitted`."""
    from ..lm.settings import DTYPES, LONG, METHODS, SKETCHES, TASKS

    flag = _adder(parser.add_argument_group("features (fixed once a run has begun)"), omitted)
    flag("--method", metavar="NAME", help=f"{', '.join(METHODS)} (trak)")
    flag("--task", metavar="NAME", help=f"{', '.join(TASKS)}; default: as the architecture says")
    flag("--params", nargs="+", metavar="NAME", help="all, linear, trainable, or patterns of parameters' names")
    flag("--proj-dim", type=number, metavar="K", help="numbers of a feature")
    flag("--sketch", metavar="NAME", help=f"{', '.join(SKETCHES)}: the way to make gradients small (auto)")
    flag("--max-tokens", type=number, metavar="T", help="tokens of a document at most; default: what the model takes")
    flag("--long", metavar="NAME", help=f"{' or '.join(LONG)} longer documents (cut)")
    flag("--maskings", type=number, metavar="N", help="maskings of a document, for masked language models (4)")
    flag("--base", metavar="DIR", help="the model that adapters belong to")
    flag("--tokenizer", metavar="DIR", help="the tokenizer, if the model's folder has none")
    flag("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}; default: the checkpoint's")
    flag("--attention", metavar="NAME", help="eager, sdpa or another; default: the model's")
    flag("--seed", type=number, metavar="N", help="seed of the projection and of maskings (0)")


def add_machine(machine: argparse._ArgumentGroup, omitted: Collection[str] = ()) -> None:
    """Adds the flags of the machine, but for those of names in `omitted`."""
    flag = _adder(machine, omitted)
    flag("--device", metavar="DEVICE", help="cpu or cuda; default: a CUDA device if there is one")
    flag("--batch-tokens", type=number, metavar="T", help="tokens of a batch (16384 on CUDA devices, else 4096)")
    flag("--memory", type=number, metavar="GB", help="memory for computing a batch; default: a part of what is free")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument or a file is refused, a package is missing, or a folder cannot be written.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _told_failures(), _told_warnings():
        _run(arguments)


@contextmanager
def _told_failures() -> Iterator[None]:
    """Turns what goes wrong in the block into a sentence for the user.

    Raises:
        Failure: A package is missing, an argument is refused, a file cannot be read or written, another process writes
            the same rows, or another one of this run failed.
    """
    from ..distributed import OtherRankError
    from ..store import BusyError

    try:
        with checking_arguments():
            yield
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in ("transformers", "peft", "tokenizers", "safetensors", "pyarrow", "datasets"):
            raise
        raise Failure(f"trak-fast lm needs {name}, which is not installed: pip install {name}") from error
    except (OSError, BusyError, OtherRankError) as error:
        raise Failure(str(error)) from error


@contextmanager
def _told_warnings() -> Iterator[None]:
    """Shows the package's warnings as the command's, in the first process alone."""
    logger = logging.getLogger("trak_fast")
    handler: logging.Handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("trak-fast: warning: %(message)s"))
    if not _is_first():
        handler = logging.NullHandler()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _is_first() -> bool:
    """Tells if this process is the first of those that share the work."""
    return os.environ.get("RANK", "0") == "0"


def _run(arguments: argparse.Namespace) -> None:
    """Opens the run, computes what is missing, and writes and prints results."""
    from ..lm import report
    from ..lm.machine import Machine
    from ..lm.results import checkpoint_weights, number_to_select
    from ..lm.run import open_run

    _check_flags(arguments)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if _is_first() and not arguments.json:
            say(line)

    machine = Machine(device=arguments.device, batch_tokens=arguments.batch_tokens, memory=_bytes_of(arguments.memory))
    given = {name: getattr(arguments, name) for name in SETTINGS} | {"models": arguments.models or None}
    found = open_run(
        arguments.out,
        given,
        machine,
        overwrite=arguments.overwrite,
        limit=arguments.limit,
        has_questions=arguments.query is not None,
    )
    questions, control = _questions(arguments, found)
    if arguments.select is not None:
        number_to_select(arguments.select, len(found.documents.documents))
    if found.documents.skipped:
        logging.getLogger("trak_fast").warning(report.skipped_warning(found.documents))
    tell(report.model_line(found))
    begun = found.folder.num_stored() is not None and not arguments.dry_run
    stored = found.num_featurized() if begun else [0]
    is_complete = min(stored) == len(found.documents.documents)
    if not is_complete or arguments.dry_run:
        tell(report.documents_line(found, "train", found.documents, found.encoded))
    if found.waiting:
        tell(report.label("", f"{found.waiting:,} more in these files; --train adds them"))
    name = arguments.name or ("ask" if arguments.ask is not None else None)
    sets: list[Targets] = []
    if questions is not None:
        sets.append(_targets(found, questions, "query", name or "queries", tell))
        checkpoint_weights(found)  # refuses before anything is computed
    if control is not None:
        sets.append(_targets(found, control, "against", f"{name or 'queries'}.against", tell))
    content: dict[str, Any] = {}
    if arguments.dry_run:
        content |= _dry_run(arguments, found, sets, tell)
    else:
        _compute(found, sets, stored, tell)
        content["documents"] = len(found.documents.documents)
        if sets:
            content |= _answer(arguments, found, sets, name, lines, tell)
        if arguments.clean:
            content["clean"] = _clean(arguments, found, tell)
        if not sets and not arguments.clean:
            tell(report.label("features", f"all stored; --out {arguments.out} with --query, --ask or --clean goes on"))
    if arguments.json and _is_first():
        say(json.dumps(content, ensure_ascii=False, indent=1))


def _check_flags(arguments: argparse.Namespace) -> None:
    """Checks the flags of results.

    Raises:
        ValueError: One is out of its range, or would have no influence without another.
        TypeError: One is no number.
    """
    from ..arguments import integer
    from ..lm.folder import require_name

    for flag, least in {"top": 1, "worst": 0, "tokens": 0}.items():
        setattr(arguments, flag, integer(f"--{flag}", getattr(arguments, flag), least, 10**6))
    if arguments.ask is not None and (arguments.query is not None or len(arguments.ask) > 2):
        fix = "leave out --query" if arguments.query is not None else "put each in quotation marks"
        raise ValueError(f"--ask must be one question, of a prompt and a completion or of one text; {fix}")
    require_name(arguments.name)
    if arguments.group is not None and arguments.query is None:
        raise ValueError("--query must be given with --group, which is a field of its files")
    if arguments.query is None and arguments.ask is None:
        for flag in ("against", "select", "name", "scores"):
            if getattr(arguments, flag):
                raise ValueError(f"--query or --ask must be given with --{flag}")


def _bytes_of(gigabytes: object) -> int | None:
    """Reads --memory.

    Raises:
        ValueError: It is no number above 0.
    """
    if gigabytes is None:
        return None
    if not isinstance(gigabytes, int | float) or not 0 < gigabytes < math.inf:
        raise ValueError(f"--memory must be a number of GB above 0, not {gigabytes!r}")
    return max(1, int(gigabytes * GIGABYTE))


def _compute(found: Run, sets: Sequence[Targets], stored: Sequence[int], tell: Callable[[str], None]) -> None:
    """Computes the features that are missing.

    Raises:
        Failure: The user interrupts it.
    """
    from ..lm import report
    from ..lm.compute import compute

    tell(report.gradients_line(found, found.traker))
    if max(stored) and min(stored) < len(found.documents.documents):
        tell(report.label("train", f"{report.stored_text(found, stored)} are there"))
    try:
        compute(found, sets)
    except KeyboardInterrupt as error:
        if _is_first():
            told = report.stored_text(found, found.num_featurized())
            print(f"trak-fast: stopped; {told} are stored. The same command goes on from here.", file=sys.stderr)
        raise Failure("", INTERRUPTED) from error


def _targets(found: Run, documents: Documents, word: str, name: str, tell: Callable[[str], None]) -> Targets:
    """Encodes questions, and tells of them.

    Raises:
        ValueError: None has a scored token.
    """
    from ..lm import report

    targets = found.targets(documents, name)
    if targets.left_out:
        logging.getLogger("trak_fast").warning(report.left_out_warning(targets))
    if not targets.documents:
        raise ValueError(f"--{word} must have a question with a scored token, and none of them has one")
    tell(report.documents_line(found, word, documents, targets.encoded))
    return targets


def _questions(arguments: argparse.Namespace, found: Run) -> tuple[Documents | None, Documents | None]:
    """Reads the questions, and those of the control set."""
    import dataclasses

    from ..lm.texts.documents import Fields

    known = {name: getattr(arguments, name) or getattr(found.settings, name) for name in ("text", "id", "label")}
    pair = {name: getattr(arguments, name) for name in ("prompt", "completion")}
    if any(pair.values()):
        known["text"] = None
    elif arguments.text is None:
        pair = {name: getattr(found.settings, name) for name in pair}
    fields = Fields(**known, **pair)
    by_file = found.settings.by_file
    # the mean of all of a control set is subtracted, whatever their groups
    control = None if arguments.against is None else _read_questions(arguments.against, fields, by_file, found)
    if arguments.ask is not None:
        return _asked(arguments.ask, found), control
    if arguments.query is None:
        return None, None
    grouped = dataclasses.replace(fields, group=arguments.group)
    return _read_questions(arguments.query, grouped, by_file, found), control


def _read_questions(paths: Sequence[str], fields: Fields, by_file: bool, found: Run) -> Documents:
    """Reads questions; fields of the training documents that they lack are not meant for them."""
    from ..lm.settings import FIELDS
    from ..lm.texts.documents import read_documents_of_some

    optional = [name for name in FIELDS if getattr(found.settings, name) is not None]
    return read_documents_of_some(paths, fields, optional, by_file=by_file)[0]


def _asked(texts: Sequence[str], found: Run) -> Documents:
    """Makes the question of --ask.

    Raises:
        ValueError: A class is missing, where classes are scored.
    """
    from ..lm.texts.documents import Document, Documents

    place: dict[str, Any] = {"file": "--ask", "place": 1, "row": 0}
    if found.models.task == "text_classification":
        if len(texts) != 2:
            raise ValueError(f"--ask must be a text and its label for a classifier, not {len(texts)} text alone")
        return Documents((Document(**place, text=texts[0], label=texts[1]),), ("text", "label"))
    if len(texts) == 1:
        return Documents((Document(**place, text=texts[0]),), ("text",))
    prompt, completion = texts
    if prompt[-1:].isalnum() and completion[:1].isalnum():
        logging.getLogger("trak_fast").warning(
            "the completion follows the prompt without a blank: …%s; write --ask %r %r for a new word",
            prompt[-10:] + completion[:10],
            prompt,
            " " + completion,
        )
    return Documents((Document(**place, prompt=prompt, completion=completion),), ("prompt", "completion"))


def _dry_run(
    arguments: argparse.Namespace, found: Run, sets: Sequence[Targets], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Shows an example, predicts what the run needs, and returns it for --json."""
    from ..lm import forecast

    pieces = sets[0].pieces if sets else found.encoded.pieces
    for line in forecast.example_lines(pieces[0], found):
        tell(line)
    predicted = forecast.forecast(found, sets, tokens=arguments.tokens)
    for line in forecast.lines(found, predicted, found.folder.name if arguments.folder_is_told else None):
        tell(line)
    return predicted.content()


def _answer(
    arguments: argparse.Namespace,
    found: Run,
    sets: Sequence[Targets],
    name: str | None,
    lines: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Writes and prints the answer to the questions, and returns it for --json."""
    from ..lm import report
    from ..lm.answer import Wanted, answer, has_other_answer

    if has_other_answer(found, sets[0], name):
        tell(report.label("", "(results of other questions are replaced; --name NAME keeps both)"))
    from ..lm.results import tie_of

    control = sets[1] if len(sets) > 1 else None
    tie = tie_of(found, sets[0], control)
    result = answer(
        found,
        sets[0],
        control,
        Wanted(arguments.top, arguments.worst, arguments.tokens, arguments.scores, arguments.select),
        name=name,
        title=f"trak-fast lm: {arguments.out}",
        facts=report.made_facts([*lines, report.scores_line(found, tie)]),
        tie=tie,
    )
    shown = _shown(arguments.out, result.folder)
    tell(report.scores_line(found, tie))
    if arguments.ask is not None:
        for line in report.document_lines(result.rankings[0], found):
            tell(line)
    else:
        for line in report.ranking_lines(result.rankings, found):
            tell(line)
    if result.selected:
        tell(
            report.label(
                "selected",
                f"{result.selected:,} of {len(found.documents.documents):,} documents: {shown}/selected.jsonl",
            )
        )
    files = f"{shown}/index.html      top {arguments.top} of each: {shown}/top.jsonl, {shown}/top.csv"
    settings = f"      settings: {arguments.out.rstrip('/')}/run.json"
    scores = f"      all scores: {shown}/scores.npy" if arguments.scores else ""
    tell(report.label("page", files + settings + scores))
    return {"page": f"{shown}/index.html", "queries": result.entries}


def _shown(out: str, folder: Path) -> str:
    """Returns the folder of results as the user would write it."""
    own = Path(out).expanduser().resolve()
    return out.rstrip("/") if folder == own else f"{out.rstrip('/')}/{folder.name}"


def _clean(arguments: argparse.Namespace, found: Run, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Ranks the training documents by self-influence, and returns their lines for --json."""
    from ..lm import report, results

    entries = results.self_influence_lines(found)
    if not _is_first():
        return entries
    results.write_lines(found.folder.path / "clean.jsonl", entries)
    for line in report.influence_lines(entries[: min(arguments.top, report.LISTED)], found):
        tell(line)
    shown = arguments.out.rstrip("/")
    tell(report.label("clean", f"all {len(entries):,} documents by self-influence: {shown}/clean.jsonl"))
    return entries
