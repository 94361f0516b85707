"""In which worlds the study is made, and on what PPO stands there."""

from __future__ import annotations

from dataclasses import dataclass

NEW_POOL = ("groups.pool=4", "groups.refresh=1")
"""Prompts are drawn from a new pool at every step, as in all that has been published so far; the
packaged pool is kept, which asks an eighth as much and changes nothing (`kept_pool`)."""


@dataclass(frozen=True)
class World:
    """Overrides of the world and of what is trained in it before PPO."""

    about: str
    sft: tuple[str, ...] = ()
    """What changes the demonstrations, and with them the SFT model."""
    rewards: tuple[str, ...] = ()
    """What changes only gold, the annotators or the reward model."""
    drawing: tuple[str, ...] = NEW_POOL
    config: str = "toy"
    start: int | None = None
    """All seeds start from the SFT model of this one, on its problems: what differs is PPO."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of its PPO runs, before an arm's own."""
        return (*self.sft, *self.rewards, *self.drawing)

    def start_of(self, seed: int) -> int:
        """The seed whose SFT model a run of this seed starts from."""
        return seed if self.start is None else self.start


WORLDS = {
    "toy": World("as packaged: an annotator's liking for a flourish outweighs its cost a little"),
    "costly": World(
        "annotators like the flourish more and gold dislikes it more: loose KL is costly",
        rewards=("toy.liking=0.5", "toy.flourish_penalty=0.25"),
    ),
    "harmless": World(
        "the flourish that annotators like costs no gold: loose KL is harmless",
        rewards=("toy.flourish_penalty=0.0",),
    ),
    "thin": World(
        "annotators see one in twenty of the pairs of the two hardest domains",
        rewards=("toy.pairs={sort: 0.05, increment: 0.05}",),
    ),
    "unrated": World(
        "the reward model learns from pairs alone: an arbitrary offset for each prompt",
        rewards=("rm.rating=0.0",),
    ),
    "reasoning": World(
        "families of reasoning-gym, exact verifiers as rewards, no reward model",
        config="reasoning",
        start=1,
    ),
    "weak_start": World(
        "the same families from the SFT model of seed 0, which can hardly add",
        drawing=(),
        config="reasoning",
        start=0,
    ),
    "smollm": World(
        "such families for a pretrained model, SmolLM2-135M-Instruct after a short SFT",
        drawing=(),
        config="reasoning_smollm",
        start=1,
    ),
}
