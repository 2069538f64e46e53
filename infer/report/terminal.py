"""What a comparison has shown, for the terminal."""

import shutil
import textwrap

from infer.report.cells import summary_cells, text_table
from infer.report.means import summary_of
from infer.report.results import Comparison
from infer.report.tables import COSTS
from infer.report.words import arrow, explained_scores, in_words, unmeasured


def print_comparison(comparison: Comparison) -> None:
    """Words, costs and scores, and what the scores mean."""
    summary = summary_of(comparison)
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    print("\n".join(textwrap.wrap(" ".join(in_words(comparison)), width)))
    titles, cells = summary_cells(summary, "peak memory")
    lines = [[f"{title}{arrow(title)}" for title in titles], *([cell[0] for cell in line] for line in cells)]
    for columns in (range(COSTS), (0, 1, *range(COSTS, len(titles)))):
        if len(columns) > 2:
            print(f"\n{text_table([[line[i] for i in columns] for line in lines], width=width)}")
    print()
    for name, what in explained_scores(summary):
        print("\n".join(textwrap.wrap(f"{name}: {what}", width, subsequent_indent="  ")))
    print("\n".join(textwrap.wrap(unmeasured(comparison), width, subsequent_indent="  ")))
    print("The report has limits, paired differences and the pictures.")
