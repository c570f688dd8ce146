"""A table of results, written for a terminal, Markdown, LaTeX or a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_LATEX = {"±": "$\\pm$", "×": "$\\times$", "↑": "$\\uparrow$", "–": "--", "%": "\\%", "_": "\\_", "&": "\\&", "#": "\\#"}


@dataclass(frozen=True)
class ResultTable:
    """Cells as text, with a title above and sentences below.

    >>> print(ResultTable("t", ("method", "F1"), (("mlp", "47.0±0.2"),), "notes").markdown())
    **t**
    <BLANKLINE>
    | method | F1 |
    |---|--:|
    | mlp | 47.0±0.2 |
    <BLANKLINE>
    notes
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def show(self, console: Console) -> None:
        """A table where it fits, and otherwise one line per number: a narrow table would cut them short."""
        table = self.rich()
        if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
            console.print(table)
            return
        console.print(self.title, highlight=False)
        width = max(map(len, self.headings[1:]), default=0)
        for name, *cells in self.rows:
            lines = [f"  {heading:{width}} {cell}" for heading, cell in zip(self.headings[1:], cells)]
            console.print(name, *lines, sep="\n", highlight=False)
        console.print(self.caption, highlight=False)

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, caption=self.caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """As a pipe table."""
        lines = [_piped(self.headings), "|---|" + "--:|" * (len(self.headings) - 1), *map(_piped, self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.caption])

    def latex(self) -> str:
        """As a `tabular` with the rules of the package booktabs."""
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in (self.headings, *self.rows)]
        head = rf"\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}"
        rules = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([f"% {self.title}. {self.caption}", head, *rules])

    def csv(self) -> str:
        """As comma-separated values, without title and caption."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.headings, *self.rows])
        return buffer.getvalue().rstrip("\n")


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
