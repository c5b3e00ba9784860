"""The results of a benchmark, and the JSON file that holds them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..arguments import real
from ..store.files import atomic_file
from .case import Case
from .environment import Environment, environment
from .settings import Settings

FORMAT = 1


@dataclass(frozen=True)
class Present:
    """A candidate that runs on this machine.

    Attributes:
        version: The library's version.
        entries: Entries of the matrix that the candidate was tried with.
        seconds: Seconds in which it was made and projected once with that matrix.
    """

    version: str
    entries: int
    seconds: float


@dataclass(frozen=True)
class Absent:
    """A candidate that does not run on this machine.

    Attributes:
        status: "missing" if it is not installed or not for this device, "failed" if it did not start.
        error: The reason.
    """

    status: str
    error: str


@dataclass(frozen=True)
class Ceilings:
    """The best rates that a machine reached in plain operations.

    Attributes:
        copy_bytes_per_second: Bytes read and written by a large copy.
        flop_per_second: The rate of torch's product, by dtype.
    """

    copy_bytes_per_second: float
    flop_per_second: dict[str, float]


@dataclass(frozen=True)
class FirstCall:
    """Costs of making a projection and calling it once.

    Attributes:
        make_seconds: Seconds to make it.
        first_seconds: Seconds of its first call.
        memory_bytes: The peak of memory above gradients and result; None where the system does not tell.
    """

    make_seconds: float
    first_seconds: float
    memory_bytes: int | None


@dataclass(frozen=True)
class Timing:
    """The timing of one candidate at one case.

    Attributes:
        candidate: The candidate's name.
        case: The shape.
        dense: True if all entries of its matrix are drawn.
        make_seconds: See `FirstCall`.
        first_seconds: See `FirstCall`.
        memory_bytes: See `FirstCall`.
        rounds: Seconds of the calls of each round.
        warm: False if it was too slow for rounds; then `rounds` holds its first call.
        median: Median seconds of a call.
        low: Lower quartile of the seconds.
        high: Upper quartile of the seconds.
        flop_per_second: `case.flop` by the median.
        gradient_bytes_per_second: Bytes of gradients by the median.
        samples_per_second: B by the median.
        floor_seconds: Least seconds on this machine, see `figures.floor_seconds`; None if not known.
        of_floor: `floor_seconds` by the median.
    """

    candidate: str
    case: Case
    dense: bool
    make_seconds: float
    first_seconds: float
    memory_bytes: int | None
    rounds: list[list[float]]
    warm: bool
    median: float
    low: float
    high: float
    flop_per_second: float
    gradient_bytes_per_second: float
    samples_per_second: float
    floor_seconds: float | None
    of_floor: float | None

    def __post_init__(self) -> None:
        """Checks what a comparison of two timings relies on.

        Raises:
            ValueError: A round is empty, or the median is not above 0.
        """
        if not self.rounds or not all(self.rounds):
            raise ValueError(f"rounds must be one or more lists of seconds, not {self.rounds}")
        real("median", self.median, 0.0, above=True)


@dataclass(frozen=True)
class Quality:
    """Accuracy, distortion, independence and repeatability of a candidate's results.

    Attributes:
        repeatable: True if the same call gave the same bits twice.
        remade: True if a projection made anew gave the same bits.
        error: ‖y − P g‖/‖P g‖ against float64; None where P is not known.
        matrix: The source of P: "reference" for ours, "identity" for the projection of the identity, or None.
        column_dim: 1/mean squared correlation of two columns of P, which is k where entries are independent, or None.
        equal_columns: Pairs of columns that are equal up to sign, or None.
        norm_distortion: Root mean square of ‖y‖²/‖g‖² − 1.
        inner_distortion: Root mean square of ⟨y, y'⟩/(‖g‖ ‖g'‖) − ⟨g, g'⟩/(‖g‖ ‖g'‖).
        effective_dim: The k of independent entries with that distortion of norms, 2/distortion².
    """

    repeatable: bool
    remade: bool
    error: float | None
    matrix: str | None
    column_dim: float | None
    equal_columns: int | None
    norm_distortion: float
    inner_distortion: float
    effective_dim: float


@dataclass(frozen=True)
class Check:
    """The check of one candidate's results at one case.

    Attributes:
        candidate: The candidate's name.
        case: The shape.
        seconds: Seconds that the check took.
        found: Its figures.
    """

    candidate: str
    case: Case
    seconds: float
    found: Quality


@dataclass(frozen=True)
class Omission:
    """A timing or check without figures.

    Attributes:
        candidate: The candidate's name.
        case: The shape.
        status: "skipped" if the case is not for this candidate, "failed" if it was tried.
        error: The reason.
    """

    candidate: str
    case: Case
    status: str
    error: str


@dataclass
class Results:
    """All that a run knows; fields have the order of the file.

    Attributes:
        started: Date and time in UTC, in ISO format.
        finished: True if nothing is left.
        left: Number of timings and checks that there was no time for, by candidate.
        seconds: Seconds that the run took so far.
        settings: The run's settings.
        environment: The machine and its software.
        ceilings: The machine's best rates, once measured.
        candidates: The candidates asked for, by name.
        timings: Timings, in the order of the grid.
        checks: Checks, in the order of the grid.
    """

    started: str
    finished: bool
    left: dict[str, int]
    seconds: float
    settings: Settings
    environment: Environment
    ceilings: Ceilings | None
    candidates: dict[str, Present | Absent]
    timings: list[Timing | Omission]
    checks: list[Check | Omission]

    @property
    def present(self) -> dict[str, Present]:
        """The candidates that run, by name."""
        return {name: facts for name, facts in self.candidates.items() if isinstance(facts, Present)}

    @property
    def measured(self) -> list[Timing]:
        """The timings that have figures."""
        return [entry for entry in self.timings if isinstance(entry, Timing)]

    @property
    def checked(self) -> list[Check]:
        """The checks that have figures."""
        return [entry for entry in self.checks if isinstance(entry, Check)]

    @property
    def omissions(self) -> list[Omission]:
        """The timings and checks that have none."""
        return [entry for entry in [*self.timings, *self.checks] if isinstance(entry, Omission)]


def begin(settings: Settings) -> Results:
    """Returns the results of a run that begins now."""
    return Results(
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        finished=False,
        left={},
        seconds=0.0,
        settings=settings,
        environment=environment(settings.device),
        ceilings=None,
        candidates={},
        timings=[],
        checks=[],
    )


def save(path: Path, results: Results) -> None:
    """Writes the file, which is always there as a whole.

    Raises:
        OSError: It cannot be written.
    """
    facts = asdict(results.environment)
    if facts["device"] is None:
        del facts["device"]
    content = {
        "format": FORMAT,
        "started": results.started,
        "finished": results.finished,
        "left": results.left,
        "seconds": results.seconds,
        "settings": asdict(results.settings),
        "environment": facts,
        "ceilings": None if results.ceilings is None else asdict(results.ceilings),
        "candidates": {
            name: {"status": "found", **asdict(facts)} if isinstance(facts, Present) else asdict(facts)
            for name, facts in results.candidates.items()
        },
        "timings": [_entry_content(entry) for entry in results.timings],
        "checks": [_entry_content(entry) for entry in results.checks],
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Results:
    """Reads the file.

    Raises:
        ValueError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.expanduser().read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        return Results(
            candidates={name: _facts(facts) for name, facts in content.pop("candidates").items()},
            timings=[_entry(Timing, entry) for entry in content.pop("timings")],
            checks=[_entry(Check, entry) for entry in content.pop("checks")],
            **{name: _read(_hints(Results)[name], value) for name, value in content.items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of trak-fast bench (format {FORMAT})") from error


def _entry_content(entry: Timing | Check | Omission) -> dict[str, Any]:
    """Returns an entry of `timings` or `checks` as the file has it."""
    if isinstance(entry, Omission):
        return asdict(entry)
    head = {"candidate": entry.candidate, "case": asdict(entry.case), "status": "ok", "error": None}
    return {**head, **asdict(entry)}


def _entry(measured: type[Timing] | type[Check], content: dict[str, Any]) -> Any:
    """Makes an entry of `timings` or `checks` from the file's."""
    if content["status"] != "ok":
        return _read(Omission, content)
    return _read(measured, {name: value for name, value in content.items() if name not in ("status", "error")})


def _facts(content: dict[str, Any]) -> Present | Absent:
    """Makes the facts of a candidate from the file's."""
    if content["status"] != "found":
        absent: Absent = _read(Absent, content)
        return absent
    present: Present = _read(Present, {name: value for name, value in content.items() if name != "status"})
    return present


def _read(kind: Any, content: Any) -> Any:
    """Makes a value of a type from JSON: dataclasses from objects with just their fields, tuples from lists.

    Raises:
        KeyError: A dataclass has no such field.
        TypeError: `content` is not of that type.
        ValueError: A dataclass refuses its fields.
    """
    arguments = get_args(kind)
    if kind is Any:
        return content
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _read(hints[name], value) for name, value in _checked(dict, content).items()})
    if get_origin(kind) is UnionType:
        return None if content is None else _read(arguments[0], content)  # the other one is None
    if get_origin(kind) is tuple:
        return tuple(_read(arguments[0], item) for item in _checked(list, content))
    if get_origin(kind) is list:
        return [_read(arguments[0], item) for item in _checked(list, content)]
    if get_origin(kind) is dict:
        return {name: _read(arguments[1], value) for name, value in _checked(dict, content).items()}
    return _checked((int, float) if kind is float else kind, content)


def _checked(kind: Any, content: Any) -> Any:
    """Returns `content` if it is of a type; True and False are no numbers."""
    if not isinstance(content, kind) or (isinstance(content, bool) and kind is not bool):
        raise TypeError(f"{content!r} is not of type {kind}")
    return content


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    """Returns the types of a dataclass's fields."""
    return get_type_hints(kind)
