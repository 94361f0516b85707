"""Each operation beside its peers: errors against float64, times of one interleaved run, memory.

cases.py      what is measured: one function for each op. READ FIRST
peers.py      how each peer is called, what it computes and what it lacks
baselines.py  what trainers run where gikernels has one launch
calls.py      one call of a contender; its errors against float64
truth.py      the errors of a head at its full size
timing.py     medians of interleaved runs
memory.py     the peak of one call, on a CPU in a process of its own
split.py      memory of each rank where a vocabulary is split
measure.py    one case: errors, then times and memory of everybody
report.py     the table and the plot, from a results file
by_pytest.py  the same cases for pytest-benchmark, with the bench_*.py
"""
