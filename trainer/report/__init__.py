"""report.html and plots/*.png of a run, or of several side by side; the same while they run.

The page carries its data inside and asks nothing of the network, so it can be mailed or attached.
It is made from metrics.jsonl, samples.jsonl and config.yaml alone; what a run has not (yet)
measured leaves no empty chart. Reading downward: serve, page, document, panels, charts, runs.
"""

from trainer.report.colours import RUN_COLOURS, SFT_COLOUR
from trainer.report.draw import STYLE
from trainer.report.page import write
from trainer.report.runs import read_runs

__all__ = ["RUN_COLOURS", "SFT_COLOUR", "STYLE", "read_runs", "write"]
