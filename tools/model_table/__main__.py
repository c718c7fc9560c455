"""Try every backbone and fuser, and write docs/models.md.

python -m tools.model_table                    # all rows: well under an hour on two cores
python -m tools.model_table --only mmfuser     # the rows whose name holds this
python -m tools.model_table --page             # the page from the data, trying nothing
python -m tools.model_table --check            # some cells again, others each time: is the page still true?
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from layerfuse.files import write_text
from tools.model_table.check import COMMAND, check_table
from tools.model_table.data import DATA, TableData, TriedRow, read_data, versions_here, write_data
from tools.model_table.page import PAGE_FILE, model_page
from tools.model_table.tables import TABLES, all_keys, try_row

_WHOLE = 2**16


def main() -> int:
    """Run the command; the number is the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="try the rows whose name holds one of these")
    parser.add_argument("--missing", action="store_true", help="try the rows that the data lack, or lack cells of")
    parser.add_argument("--page", action="store_true", help="write the page from the data and try nothing")
    parser.add_argument("--check", action="store_true", help="say whether the page is stale; 1 if so")
    parser.add_argument("--seconds", type=float, default=15.0, help="that --check may try cells for")
    parser.add_argument("--seed", type=int, help="which cells --check draws; a random one if left out")
    args = parser.parse_args()
    if args.check:
        seed = random.SystemRandom().randrange(_WHOLE) if args.seed is None else args.seed
        stale = check_table(seconds=args.seconds, seed=seed, say=print)
        for sentence in stale:
            print(f"model table: {sentence}", file=sys.stderr)
        return 1 if stale else 0
    if not args.page:
        return _try(args.only, missing=args.missing)
    _write(read_data())
    return 0


def _try(only: list[str] | None, *, missing: bool) -> int:
    here = versions_here()
    partly = (only is not None or missing) and DATA.exists()
    data = read_data() if partly else TableData(here, ())
    if data.versions != here:
        print(f"the data are of {dict(data.versions)}, installed are {here}; run `{COMMAND}` for all rows.")
        return 1
    wanted = [(table, key) for table, key in all_keys() if only is None or any(text in key for text in only)]
    if missing:
        wanted = [each for each in wanted if _lacks(data, *each)]
    if not wanted:
        print(f"no row's name holds {' or '.join(only or ['anything that is missing'])}; names: {all_keys()}")
        return 1
    started = time.monotonic()
    for number, (table, key) in enumerate(wanted, 1):
        row = try_row(table, key)
        _write(TableData(here, (*(each for each in data.rows if (each.table, each.key) != (table, key)), row)))
        data = read_data()
        said = " ".join(f"{column}={cell.value}" for column, cell in row.cells.items())
        left = (time.monotonic() - started) / number * (len(wanted) - number) / 60
        print(f"{number}/{len(wanted)} {key}: {said}; about {left:.0f} min left", flush=True)
    return 0


def _lacks(data: TableData, table: str, key: str) -> bool:
    row: TriedRow | None = data.row(table, key)
    return row is None or not row.cells.keys() >= TABLES[table].columns.keys()


def _write(data: TableData) -> None:
    """Write data and page, rows in the order of the page, without those that are none any more."""
    order = {each: place for place, each in enumerate(all_keys())}
    rows = sorted(
        (row for row in data.rows if (row.table, row.key) in order), key=lambda row: order[row.table, row.key]
    )
    write_data(data.versions, rows)
    write_text(PAGE_FILE, model_page(TableData(data.versions, tuple(rows))))


if __name__ == "__main__":
    sys.exit(main())
