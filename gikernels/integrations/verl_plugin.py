"""For VERL_USE_EXTERNAL_MODULES: verl imports this in all of its processes, which is the wish."""

from gikernels.integrations.verl import install, register

register()
install()
