"""Computes with features in a folder that may be read but not written; prints results and messages as JSON."""

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from attribution import CHECKPOINTS, TRAIN, M, N, build, run

ROOT = os.geteuid() == 0  # who may write everywhere
warned: list[str] = []


class Listener(logging.Handler):
    """Keeps warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warned.append(record.getMessage())


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except PermissionError as error:
        return str(error)
    return "no PermissionError"


outer = Path(tempfile.mkdtemp())
folder = outer / "results"
try:
    run(build(folder))
    outer.chmod(0o755)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(str(path) for path in folder.rglob("*"))
    if ROOT:
        os.seteuid(65534)
    handler = Listener(logging.WARNING)
    logging.getLogger("trak_fast").addHandler(handler)
    traker = build(folder)
    opened = len(warned)
    top = traker.top_scores("test", 3)
    scores = traker.finalize_scores("test")
    influence = traker.self_influence()
    computed = len(warned)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    refusals = [refusal(lambda: traker.featurize(TRAIN, num_samples=N))]
    for name in ("test", "other"):
        refusals.append(refusal(lambda name=name: traker.start_scoring_checkpoint(name, CHECKPOINTS[0], 0, M)))
    refusals.append(refusal(lambda: traker.delete_experiment("test")))
    refusals.append(refusal(lambda: traker.extend(N + 1)))
    refusals.append(refusal(lambda: traker.load_checkpoint(CHECKPOINTS[0], 0, True)))
    refusals.append(refusal(lambda: build(folder / "new")))
    after = sorted(str(path) for path in folder.rglob("*"))
finally:
    if ROOT:
        os.seteuid(0)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(outer)
json.dump(
    {
        "folder": str(folder),
        "indices": top.indices.tolist(),
        "top": top.scores.tolist(),
        "scores": scores.tolist(),
        "influence": influence.tolist(),
        "warned": [warned[:opened], warned[opened:computed], warned[computed:]],
        "refusals": refusals,
        "unchanged": before == after,
    },
    sys.stdout,
)
