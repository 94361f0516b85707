"""Attacks on a run, at random and from a seed: what was tried, and what the run survived.

    python -m tests.attack --minutes 10 --seed 0        or: make attack

A run has survived a kill, a full disk or a second start where it ends, bit for bit, as one that
nobody disturbed. It has survived damage where the damage is told, and bad input where one line
says what is bad and nothing was written. Each failure names the numbers that bring it back.
"""
