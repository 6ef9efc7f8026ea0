"""`qexp report STUDY_DIR ...`: rebuilds `results.csv` and the page, or shows it live; several studies share one page."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qexp.errors import QexpError
from qexp.report.dashboard import write_page
from qexp.report.forget import main as forget
from qexp.report.serve import serve
from qexp.results.closing_table import closing_table
from qexp.results.run_folder_read import worst_layer
from qexp.results.table_csv import collect, write_results

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  qexp report runs/widths                         rebuild results.csv and dashboard.html of one study
  qexp report runs/ptq runs/qat --out both.html   compare two studies on one page
  qexp report runs/widths --serve                 watch a sweep that still runs, in a browser
  qexp report forget runs/widths --failed         remove points (forget --help)"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(
        prog="qexp report",
        description="Rebuild results.csv and the HTML page of a study from its point folders.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("studies", nargs="+", type=Path, metavar="STUDY_DIR", help="a study: <runs_dir>/<study>")
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the page (default: dashboard.html in the study; comparison.html here for several studies)",
    )
    made.add_argument("--serve", action="store_true", help="show the page and update it after every finished point")
    made.add_argument("--port", type=int, default=5006, help="with --serve: the port, 0 for a free one (default: 5006)")
    made.add_argument(
        "--address",
        default="localhost",
        help="with --serve: address to listen on (default: localhost, this machine only)",
    )
    made.add_argument("--quiet", action="store_true", help="print the paths only, not the table")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr for a mistake in the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["forget"]:
        return forget(words[1:])
    args = parser().parse_args(words)
    try:
        for study in args.studies:
            if not study.is_dir():
                raise QexpError(
                    f"study folder {str(study)!r}: no such folder; give the folder that holds the point folders"
                )
        several = len(args.studies) > 1
        out = args.out or (Path("comparison.html") if several else args.studies[0] / "dashboard.html")
        if not out.parent.is_dir():
            raise QexpError(f"--out {str(out)!r}: the folder {str(out.parent)!r} does not exist; create it first")
        if out.is_dir():
            raise QexpError(f"--out {str(out)!r}: is a folder; name a file, such as {str(out / 'dashboard.html')!r}")
        if args.serve:
            serve(args.studies, out, args.address, args.port)
            return 0
        frames = {study: collect(study) for study in args.studies}
        # First the page: it raises where there is no point, before a table is written.
        page = write_page(args.studies, out, known=frames)
        tables = []
        for study in args.studies:
            try:
                tables += [write_results(study, frames[study])] if any(study.glob("*/metrics.json")) else []
            except OSError as error:
                if args.out is None:
                    raise
                log.warning("%s stays as it is: %s", study / "results.csv", error)  # another user's file, or read-only
        if not args.quiet:
            rows = pd.concat(frames.values(), ignore_index=True) if several else frames[args.studies[0]]
            folders = {point: study / point for study, frame in frames.items() for point in frame["point"]}
            print(closing_table(rows, lambda point: worst_layer(folders[point])), end="\n\n")
    except (QexpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in (*tables, page):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
