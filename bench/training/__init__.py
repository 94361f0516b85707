"""Whole models and trainers: speed, memory, weights into an engine, MetaRM's study.

trainer.py        tokens a second beside TRL's GRPOTrainer
half_billion.py   steps of a random 0.5B model beside TRL's: tokens a second, memory, MFU
memory.py         peak of one PPO step of a 0.5B model against what has to be there
packing.py        packed against padded sequences
sync.py           weights from the trainer into vLLM
integrations.py   other people's training steps with and without our head
metarm.py         MetaRM's variants: the runs and what a step costs
metarm_page.py    what came out of them: the page and the plot
"""
