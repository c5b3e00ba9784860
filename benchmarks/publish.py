"""Writes the page of a benchmark's results beside them, and the table in the documentation.

trak-fast bench --output DIR && cp DIR/results.json benchmarks/results/DATE-MACHINE-bench.json
python benchmarks/publish.py benchmarks/results/DATE-MACHINE-bench.json [--table docs/speed.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trak_fast.bench import page, tables
from trak_fast.bench.results import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", type=Path, help="file with the lines <!-- bench --> and <!-- /bench -->")
    arguments = parser.parse_args()
    results = load(arguments.results)
    arguments.results.with_suffix(".html").write_text(page.page(results), encoding="utf-8")
    if arguments.table:
        arguments.table.write_text(tables.replace_table(arguments.table.read_text(), results))


if __name__ == "__main__":
    main()
