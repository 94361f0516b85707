"""For VERL_USE_EXTERNAL_MODULES: what verl_plugin does, and trainers that can draw by group."""

import gikernels.integrations.verl_plugin  # noqa: F401
from gikernels.integrations.verl_draw import install

install()
