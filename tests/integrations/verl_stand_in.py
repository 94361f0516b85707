"""verl without models: its real task runner, trainer, loader, TransferQueue and replay buffer, in
Ray, where answers and their scores are made up and no weights are trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import transfer_queue as tq
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1 import trainer_base
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

ANSWERS = 2


def score(row: int, answer: int) -> float:
    return (row % 10) / 10 + 0.1 * answer


class Nothing:
    """Of a worker group or a checkpoint engine, what is asked for has no effect."""

    _dispatch_info = {"actor": [0]}  # noqa: RUF012

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class WithoutModels:
    """Above verl's trainer, or ours: everything that needs a model does nothing."""

    def _setup(self):
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self.actor_rollout_wg, self.checkpoint_manager = Nothing(), Nothing()
        self.llm_server_manager = Nothing()
        self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
        self._load_checkpoint()

    def _compute_old_log_prob(self, batch, metrics):
        return batch

    def _update_actor(self, batch, metrics):
        return batch

    def _compute_metrics(self, batch, metrics, *args, **kwargs):
        self.agent_loop_manager.log(metrics, self.sampler)


class Answers:
    """An agent loop manager whose answers are there at once; notes what it was asked."""

    def __init__(self, config):
        self.path = Path(config.trainer.default_local_dir) / "asked.jsonl"

    def generate_sequences(self, prompts):
        rows = [int(row) for row in prompts["draw_row"]] if "draw_row" in prompts else []
        self.write(rows=rows, index=[int(i) for i in prompts["index"]])
        for i, uid in enumerate(prompts["uid"]):
            fields, keys = [], []
            for answer in range(ANSWERS):
                length = 2 + answer
                scores = torch.zeros(length)
                scores[-1] = score(rows[i] if rows else 0, answer)
                fields.append(
                    {
                        "prompts": torch.arange(3),
                        "responses": torch.arange(length),
                        "response_mask": torch.ones(length, dtype=torch.long),
                        "rm_scores": scores,
                        "uid": uid,
                        **({"draw_row": rows[i]} if rows else {}),
                    }
                )
                keys.append(f"{uid}_{answer}_0")
            tags = [{"status": "success", "seq_len": 3 + len(f["responses"])} for f in fields]
            tq.kv_batch_put(
                keys=keys,
                partition_id="train",
                fields=list_of_dict_to_tensordict(fields),
                tags=tags,
            )
            tq.kv_batch_put(keys=[uid], partition_id="train", tags=[{"status": "finished"}])

    def log(self, metrics, sampler):
        known = {} if sampler is None else {"mean": sampler.mean.tolist()}
        kept = {k: v for k, v in metrics.items() if k.startswith("draw/")}
        self.write(metrics=kept, **known)

    def write(self, **line):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@ray.remote
class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's task runner, whose trainers have no models."""

    def run(self, config):
        registry = trainer_base.TRAINER_REGISTRY  # by its module: Ray copies what a class refers to
        mode = config.trainer.v1.trainer_mode
        if not issubclass(registry[mode], WithoutModels):
            registry[mode] = type("Trainer", (WithoutModels, registry[mode]), {})
        super().run(config)

    def init_agent_loop_manager(self):
        self.agent_loop_manager = Answers(self.config)
