"""A study in minutes that shows that everything runs, and nothing about the method."""

SECTIONS = ("main", "robustness")
ARMS = ("sft", "default", "ppo_equal", "plus_weights", "ppo_0", "ppo_0.2", "groups_30")
REASONING = (
    "reasoning.shares={chain_sum: 0.7, gcd: 0.3}",
    "reasoning.held_out=[basic_arithmetic]",
    "reasoning.demonstrations=2000",
    "reasoning.prompts=512",
    "reasoning.hidden=48",
    "reasoning.layers=1",
    "reasoning.heads=2",
    "reasoning.intermediate=96",
    "sft.steps=60",
    "ppo.steps=6",
    "ppo.warmup=1",
    "ppo.critic_warmup_steps=1",
    "eval.every=3",
    "eval.samples_per_domain=16",
)
TOY = (
    "toy.hidden=64",
    "toy.layers=1",
    "toy.intermediate=128",
    "toy.demonstrations=4000",
    "toy.prompts=512",
    "sft.steps=200",
    "rm.steps=30",
    "rm.pairs=512",
    "ppo.steps=12",
    "ppo.warmup=1",
    "ppo.lr=1e-3",
    "ppo.critic_warmup_steps=1",
    "ppo.prompts_per_step=32",
    "eval.every=3",
    "eval.samples_per_domain=16",
)
