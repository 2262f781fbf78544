"""`collage results`: make the runs that are missing, and write the page of results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from collage.harness import console, options
from collage.harness.results import judged
from collage.harness.results.page import PLOTS, Section, page
from collage.harness.results.records import Records
from collage.harness.results.studies import EVIDENCE, Evidence
from collage.harness.sweep.running import Job, complete, expected, told
from collage.harness.sweep.store import STORE, Store, Stored
from collage.harness.train.checkpoints import write_whole

RECORDS, PAGE, PAPER, ADVICE = "results", "results.md", "paper.md", "advice"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collage results`."""
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), metavar="DIR", help="of the page (default: %(default)s)"
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs/results"), metavar="DIR",
        help="of the runs that are made, so that an interrupt loses the one in progress alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=[e.name for e in EVIDENCE], metavar="NAME",
        help=f"make the runs of these alone, of {', '.join(e.name for e in EVIDENCE)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--no-runs", action="store_true", help="make no runs: write the page of the records there are")
    parser.add_argument(
        "--judge", nargs="+", type=Path, default=(), metavar="DIR",
        help="--out of `collage sweep`: ask the advice about its runs, and record what it said and what became of them",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Make what is missing, record it, write the page and its plots. Returns the exit code."""
    screen, records = Console(), args.docs / RECORDS
    if not (args.docs / PAPER).is_file():
        raise ValueError(
            f"--docs '{args.docs}': holds no {PAPER}; run it in the folder of collage's source, or give its docs"
        )
    options.open_folder(records)
    wanted = [] if args.no_runs or args.judge else [e for e in EVIDENCE if not args.only or e.name in args.only]
    try:
        _make(wanted, records, Store(options.open_folder(args.store)), screen)
    except KeyboardInterrupt:
        console.say(screen, f"interrupted; finished runs are in {args.store}, and the same command goes on from there")
        return 130
    if args.judge:
        from collage.harness.results.advised import ask

        stored = [one for folder in args.judge for one in _runs(folder)]
        judged.write(judged.judge(stored, ask), records / f"{ADVICE}.json")
    sections = [Section.of(evidence, records) for evidence in EVIDENCE]
    write_whole(args.docs / PAGE, text_of(args.docs, sections))
    from collage.harness.results.plots import write_plots  # matplotlib takes a second

    for section in sections:
        write_plots(section, args.docs / PLOTS / section.evidence.name)
    console.say(screen, f"page: {args.docs / PAGE}")
    return 0


def _runs(folder: Path) -> list[Stored]:
    """Of a sweep. Raises ValueError if there are none: what was recorded before would be lost for nothing."""
    found = Store(folder / STORE).all() if (folder / STORE).is_dir() else []
    if not found:
        raise ValueError(f"--judge '{folder}': holds no runs of a sweep; give the --out of collage sweep")
    return found


def text_of(docs: Path, sections: Sequence[Section]) -> str:
    """The page, of the records and the paper's page in a folder."""
    paper = (docs / PAPER).read_text(encoding="utf-8")
    return page(sections, paper, judged.read(docs / RECORDS / f"{ADVICE}.json"))


def _make(wanted: Sequence[Evidence], folder: Path, store: Store, screen: Console) -> None:
    """Make the runs that have no record, study by study, and record them as each study is whole."""
    missing = [(evidence, jobs) for evidence in wanted if (jobs := _missing(evidence, folder, screen))]
    left = [job for _, jobs in missing for job in jobs if store.find(job.asked) is None]
    if left:
        takes = f"{told(expected(left, store.all()))} here"
        console.say(screen, f"Runs that are missing: {len(left)}, of studies: {len(missing)}; {takes}")
    for evidence, jobs in missing:
        console.say(screen, evidence.title, "bold")
        records = Records.read(folder / f"{evidence.name}.json")
        for stored in complete(jobs, store, screen):
            records.add(stored)
        records.keep_only(evidence.study().jobs())
        records.write(folder / f"{evidence.name}.json")


def _missing(evidence: Evidence, folder: Path, screen: Console) -> list[Job]:
    """The runs without a record; none where a package or data are missing, which is said."""
    recorded = Records.read(folder / f"{evidence.name}.json").runs
    jobs = [job for job in evidence.study().jobs() if job.asked.name not in recorded]
    try:
        if jobs:
            jobs[0].experiment()
    except (ValueError, OSError) as error:
        console.say(screen, f"{evidence.title}: left out, {error}", "yellow")
        return []
    return jobs
