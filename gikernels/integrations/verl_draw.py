"""verl's trainers (0.9.1, trainer.use_v1) with prompts drawn by group, in place by `install`.

    +algorithm.group_draw.rule=variance  data.dataloader_num_workers=0

The loader and what is known of the prompts live in verl's driver, and are saved in its data.pt.
"""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from gikernels.integrations.sampler import GroupSampler

ROW = "draw_row"
"""Field of a prompt and of its answers: the prompt's place in the data set."""
Trainer: Any = object  # to a type checker: whatever verl's trainers have, the mixin has


class Numbered(Dataset):
    """A data set whose prompts know their place. verl's own `index` is what the data says it is."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return {**self.dataset[row], ROW: row}


class GroupDrawMixin(Trainer):
    """Without `algorithm.group_draw` in the configuration it is verl's own trainer."""

    sampler: GroupSampler | None = None
    train_dataset: Any
    train_dataloader: Any

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        settings = dict(self.config.algorithm.get("group_draw", None) or {})
        if not settings:
            return
        workers = self.config.data.dataloader_num_workers
        if workers:
            raise ValueError(
                f"data.dataloader_num_workers: got {workers}, want 0: workers fetch prompts before "
                f"the rewards are known by which they are drawn"
            )
        key = settings.pop("group_key", None)
        columns = self.train_dataset.dataframe.column_names
        if key is not None and key not in columns:
            raise ValueError(f"algorithm.group_draw.group_key: got {key!r}, not in {columns}")
        self.sampler = GroupSampler(
            len(self.train_dataset),
            self.config.data.train_batch_size,
            groups=None if key is None else self.train_dataset.dataframe[key],
            seed=self.config.data.get("seed", None) or 0,
            **settings,
        )
        theirs = self.train_dataloader
        self.train_dataloader = StatefulDataLoader(
            dataset=Numbered(self.train_dataset),
            batch_size=theirs.batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=theirs.collate_fn,
            sampler=self.sampler,
        )

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """The first place where all answers of a step have their scores."""
        if self.sampler is not None:
            self.sampler.observe(*scores_of(batch))
            metrics.update(self.sampler.metrics())
        return super()._compute_advantage(batch, metrics)


def scores_of(batch: Any) -> tuple[Tensor, Tensor]:
    """(S) prompts and (S) scores of a batch's answers, in an order that does not depend on which
    came first; copies that fill the batch up are left out."""
    keys = [k for k, tag in zip(batch.keys, batch.tags) if not tag.get("is_padding", False)]
    data = transfer_queue.kv_batch_get(
        keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores", ROW]
    )
    scores = [float(each.sum()) for each in data["rm_scores"].unbind()]
    rows = data[ROW]  # a list, or what can be made one
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    rows, values = zip(*sorted(zip(map(int, rows), scores)))
    return torch.tensor(rows), torch.tensor(values, dtype=torch.float64)


def install() -> None:
    """verl's trainers draw from now on, where the configuration asks for it."""
    for mode, cls in list(TRAINER_REGISTRY.items()):
        if not issubclass(cls, GroupDrawMixin):
            TRAINER_REGISTRY[mode] = type(f"GroupDraw{cls.__name__}", (GroupDrawMixin, cls), {})
