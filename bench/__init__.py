"""Speed, memory and accuracy beside the peers, and the study of the method; run from a checkout.

ops/        `python -m bench`: each operation beside its peers
gpu/        `python -m bench.gpu`: right and fast on this GPU? Within minutes
training/   `python -m bench.training.NAME`: whole models and trainers
evidence/   `python -m bench.evidence`: does the method do what is claimed?
host/       what all of them ask of the machine
results/    what came out; `python -m bench.report` makes the GPU table of docs/results.md of it
"""
