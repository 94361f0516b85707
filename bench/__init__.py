"""Speed, memory and accuracy of gikernels beside its peers. `python -m bench` runs everything.

cases.py      what is measured: one function for each op. READ FIRST
peers.py      how each peer is called, what it computes and what it lacks
timing.py     medians of interleaved runs
memory.py     the peak of one run, on a CPU in a process of its own
measure.py    one case: errors against fp64, then times and memory of everybody
report.py     the table and the plot, from a results file
"""
