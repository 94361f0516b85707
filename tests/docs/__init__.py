"""Documents tell the truth: their links lead somewhere, their code runs, their settings exist."""
