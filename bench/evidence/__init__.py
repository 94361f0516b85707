"""Does the method do what is claimed of it? A matrix of runs, and its analysis.

    matrix.py      which runs: arms (settings), sections        READ FIRST
    worlds.py      in which worlds, from which models
    quick.py       the smallest settings that run
    store.py       what is done already, found again by its settings
    scheduler.py   what runs next, in as many processes as asked for
    worker.py      one run in a process of its own, and what is kept of it
    disturb.py     the disturbances of the section on robustness
    measure.py     the figures of one run
    stats.py       intervals, paired differences, agreement of groups
    claims.py      claim -> what we see, by rule
    plots.py       the pictures
    blocks.py      a page as blocks, written as Markdown or HTML
    page.py        evidence.md, evidence.html, evidence.json

`python -m bench.evidence --help` says how to run it, docs/evidence.md what was found.
"""
