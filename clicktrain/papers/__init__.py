"""What the four papers contain, item by item, and what stands for each of them here.

``contents.yaml`` lists the items as the papers have them; ``rows/PAPER.yaml`` has, for each, the code, the
tests, the commands that reproduce it, what came out or why it was not run, and where we leave the paper.
``clicktrain reproduce`` runs these commands; the tables of docs/papers.md are made from the same files.
"""

from clicktrain.papers.figures import Measured, measured_figures
from clicktrain.papers.plan import SCALES, Overrides, Step, steps_of
from clicktrain.papers.rows import Figure, Row, Setting, read_rows, read_settings, rows_called

__all__ = [
    "SCALES",
    "Figure",
    "Measured",
    "Overrides",
    "Row",
    "Setting",
    "Step",
    "measured_figures",
    "read_rows",
    "read_settings",
    "rows_called",
    "steps_of",
]
