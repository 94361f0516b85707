"""Until the fused operations are merged: their specification, under their public names."""

from gikernels.reference import *  # noqa: F403
