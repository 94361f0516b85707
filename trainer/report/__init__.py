"""report.html and plots/*.png of a run, or of several side by side.

The page carries its pictures inside and asks nothing of the network, so it can be mailed or
attached. It is made from metrics.jsonl, samples.jsonl and config.yaml alone; what a run has not
(yet) measured leaves no empty plot. Reading downward: page, panels, plots, runs.
"""

from trainer.report.page import write
from trainer.report.plots import STYLE
from trainer.report.runs import RUN_COLOURS, SFT_COLOUR, read_runs

__all__ = ["RUN_COLOURS", "SFT_COLOUR", "STYLE", "read_runs", "write"]
