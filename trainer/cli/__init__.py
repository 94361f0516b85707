"""The commands that train nothing: the plan of a run, and what this machine has."""
