"""Group-invariant PPO. Read `loop` first: an iteration on one page."""
