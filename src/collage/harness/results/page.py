"""docs/results.md, made of the records alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from collage.harness.report.pairs import SURE, Run
from collage.harness.report.results import REFERENCE
from collage.harness.results import judged, tables
from collage.harness.results.records import Records, machines
from collage.harness.results.studies import Evidence
from collage.harness.sweep.grid import Grid
from collage.harness.sweep.losing import DIVERGED, LOST
from collage.harness.text import MISSING, duration, listed, percent

PLOTS = "images/results"

_HEAD = f"""# Results

What each strategy loses against float32 master weights (`{REFERENCE}`), task by task. `make results` writes this page
from the records of the runs in [docs/results](results), a line for each. Runs without a record are made, one by one,
and an interrupt loses the one in progress alone. Beneath every table stand the command that makes its runs and the
machines that made them; to make them again, delete the file of records and `runs/results`.

* Runs of one seed start from the same weights and see the same batches under every strategy: the *difference* is that
  on the same seed. ± is the standard deviation over seeds.
* *p* is of Student's paired t-test, two-sided: the chance of a mean so far from 0 without a difference.
  (The exact test by flipped signs takes less for granted, but n seeds have 2ⁿ arrangements: with three its p is never
  below 0.25.) A large p does not show that there is no difference; the {percent(SURE)} *interval* says how large it may
  be.
* *EDQ ratio*: the share of the intended update that arrived in the weights. *Updates lost*: those that changed no bit.
* On one machine class a run repeats to the last bit. On another it does not: matrix products add in another order, with
  other instructions or another number of threads, and training carries a last bit a long way.
"""

_TAIL = """## What is not shown

* Models of more than 135 M parameters, runs of more than some hundred steps, several GPUs. What is small here may grow
  there, and a second moment at β₂ = 0.999 needs more than a thousand steps to show all of its damage.
* Speed: `collage bench` measures it. Times beneath the tables are of a CPU.
* Other optimizers than AdamW: [docs/optimizers.md](optimizers.md) and [docs/muon.md](muon.md) have what bfloat16 loses
  under each.
"""


@dataclass(frozen=True)
class Section:
    """A study, and its records: None where some run is missing."""

    evidence: Evidence
    runs: Sequence[Run] | None

    @classmethod
    def of(cls, evidence: Evidence, folder: Path) -> Section:
        return cls(evidence, Records.read(folder / f"{evidence.name}.json").of(evidence.study().jobs()))

    def grid(self) -> Grid:
        assert self.runs is not None, "a section without runs has no grid"
        return self.evidence.study().grid(self.runs)


def page(sections: Iterable[Section], paper: str, advice: Sequence[judged.Record]) -> str:
    """The whole page. paper: the text of docs/paper.md; advice: records of `judged`."""
    sections = list(sections)
    parts = [_HEAD, *(section_text(section) for section in sections), judged.text(advice)]
    return "\n".join([*parts, _of_the_paper(sections, paper), _TAIL])


def section_text(section: Section) -> str:
    """A heading, what was found, the table, the plot, the command."""
    evidence = section.evidence
    head = f"## {evidence.title}\n\n{evidence.says}\n"
    if section.runs is None:
        needs = ", ".join(f"`[{extra}]`" for extra in dict.fromkeys(evidence.of_task.needs.values()))
        return f"{head}\nNot run yet: `make results` does{f', where {needs} is installed' if needs else ''}.\n"
    grid = section.grid()
    if evidence.axis:
        found = "\n".join(f"* {line}" for line in grid.sentences())
        table, plots = tables.along_an_axis(grid), [f"heat-{grid.measures[0].key}", "heat-edq_ratio"]
    else:
        found, table, plots = verdict(grid), tables.of_strategies(grid), ["differences"]
    shown = "\n".join(f"![{evidence.title}: {name}]({PLOTS}/{evidence.name}/{name}.png)" for name in plots)
    return "\n".join([head, found, "", table, "", shown, "", _source(section, section.runs), ""])


def verdict(grid: Grid) -> str:
    """What the seeds settle, in one sentence."""
    (cells,), measure = grid.cells.values(), grid.measures[0]
    others = [name for name in grid.strategies if name != REFERENCE]
    gone = [name for name in others if cells[name].state == DIVERGED]
    lost = [name for name in others if cells[name].state == LOST]
    kept = [name for name in others if name not in gone and measure.kept(cells[name].differences[measure.key])]
    rest = [name for name in others if name not in {*gone, *lost, *kept}]
    parts = [
        _part(kept, "loses", "lose", f"no more than {measure.allowed}, with all of the interval"),
        _part(lost, "loses", "lose", f"more than {measure.allowed}, and than twice the standard error"),
        _part(gone, "diverges", "diverge", "under some seed"),
        f"these seeds do not settle it for {_names(rest)}" if rest else "",
    ]
    text = "; ".join(filter(None, parts))
    return f"{text}."


def _part(names: Sequence[str], one: str, many: str, what: str) -> str:
    return f"{_names(names)} {one if len(names) == 1 else many} {what}" if names else ""


def _names(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names])


def _source(section: Section, runs: Sequence[Run]) -> str:
    seconds = duration(sum(run["seconds"] for run in runs))
    made = "; ".join(machines(runs))
    return f"```bash\n{section.evidence.command()}\n```\n\n{len(runs)} runs, {seconds}, on {made}."


def _of_the_paper(sections: Sequence[Section], paper: str) -> str:
    """The paper's experiments by name: what stands for each here, and the status that docs/paper.md gives."""
    rows = []
    for name, status in experiments(paper):
        here = [s.evidence.title for s in sections if s.evidence.paper and name.startswith(s.evidence.paper)]
        rows.append([name, ", ".join(f"[{title}](#{_anchor(title)})" for title in here) or MISSING, status])
    lines = [["in the paper", "here", "status"], ["---"] * 3, *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## The paper's own experiments\n\n[docs/paper.md](paper.md#experiments) says more of each.\n\n{table}\n"


def experiments(paper: str) -> list[tuple[str, str]]:
    """(experiment, status) of the paper's own, in the table of docs/paper.md."""
    _, _, after = paper.partition("\n## Experiments\n")
    lines = after.lstrip("\n").partition("\n\n")[0].splitlines()  # of the first table
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [(cells[0], cells[-1]) for cells in table[1:] if not cells[0].startswith("ours")]


def _anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
