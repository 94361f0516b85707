"""RLHF from demonstrations to a policy. Start at `ppo.loop`; `python -m trainer` runs it."""
