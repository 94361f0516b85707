"""One palette for plots and page: a name stands for a colour on white and one on black.

Told apart in grey and by colour-blind readers too.
"""

from __future__ import annotations

RUN_COLOURS = ("#c8553d", "#2e6f95", "#588157", "#8e6c8a", "#b08900", "#1b998b", "#5f4b8b")
_RUNS_ON_BLACK = ("#ee7d63", "#6db3dc", "#8fbf85", "#c79bc2", "#e0b93a", "#46c9b9", "#a594de")
SFT_COLOUR = "#7d8597"
_SCALE = ("#7b2d26", "#d08c60", "#4f8a8b", "#1f4e5f", "#a3b18a", "#9b5de5", "#f0a202", "#3a5a40")
_SCALE_ON_BLACK = (
    "#ef6f61", "#f0b185", "#6fc2c2", "#5aa3d0", "#c3d3a6", "#bd94f5", "#ffc24a", "#86b38f",
)  # fmt: skip

RUN_NAMES = [f"run{i}" for i in range(len(RUN_COLOURS))]
SCALE = [f"scale{i}" for i in range(len(_SCALE))]
"""Groups and domains: the hardest first."""
SFT_NAME = "sft"

ON_WHITE = {
    **dict(zip(RUN_NAMES, RUN_COLOURS)),
    **dict(zip(SCALE, _SCALE)),
    SFT_NAME: SFT_COLOUR,
}
ON_BLACK = {
    **dict(zip(RUN_NAMES, _RUNS_ON_BLACK)),
    **dict(zip(SCALE, _SCALE_ON_BLACK)),
    SFT_NAME: "#9aa3b5",
}


def variables(palette: dict[str, str]) -> str:
    """As CSS custom properties: --run0, ..."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
