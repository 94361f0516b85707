"""Proof on a rented GPU within minutes: is it right there, and how fast? `python -m bench.gpu`.

stages.py     what is done, in order of worth                            READ FIRST
runner.py     each stage in a process of its own with its own limit; a second call goes on
record.py     what a stage has found, a JSON file each, written at once
worker.py     that process
ceilings.py   versions, and what this GPU can do at most
checks.py     the selftest and the tests
plugin.py     how pytest's results are written as they come, and what stands in for hypothesis
times.py      operations beside plain PyTorch, peers, and variants of our own kernels
training.py   steps of a 0.5B model
table.py      the table of all that
"""
