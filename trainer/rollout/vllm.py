"""Sampling with vLLM, inside each rank's own process: no server, no Ray.

`VllmEngine` is what the trainer sees: shares and seeds, the order of waking, loading and sleeping,
errors. `Vllm` is all of vLLM's own interface, which changes with its versions. Tested with 0.32.0:
on a CPU the whole of it, but for what a CPU has not (sleep, graphs, several GPUs).

Each group of `rollout.tensor_parallel` ranks is one engine and answers its share of the prompts.
Of a policy that is an adapter on a shared base the base comes once, and the adapter alone with each
sync; the base is asked by leaving the adapter out, which takes no sync (`lora.sync`).

With `rollout.seeded` every request has a seed of its own, so an answer depends neither on what it
is batched with nor on which engine gives it (but for rounding); without, vLLM draws for all of
them together.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.config import Config, ConfigError
from trainer.models import adapters
from trainer.models.backbone import ALONE, Backbone, Use, unties
from trainer.models.policy import Policy
from trainer.models.saving import adapter_weights
from trainer.rollout.engine import Draws, Rollout, Sync, drawn, end_tokens, gathered, next_sync
from trainer.rollout.room import cache_bytes, gpu_share
from trainer.rollout.watchdog import Watchdog
from trainer.rollout.weights import whole_weights
from trainer.runs.faults import RunError
from trainer.runs.state import RandomStates

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput

TESTED = "0.32.0"
TIES = 8
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""


class EngineFailed(RunError):
    """One line: which rank's engine, doing what, and what it said."""


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    limit: int  # new tokens
    seed: int | None  # None: from the process's random numbers, with what it is batched with


@dataclass(frozen=True)
class Answer:
    tokens: list[int]  # with what ended it
    logprobs: list[float]
    truncated: bool
    kept: list[list[int]] | None  # of each token: what could be sampled; None: everything


def some_seeds(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**62, (count,), generator=generator)


class VllmEngine:
    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.dtype = getattr(torch, config.model.dtype)
        self.vllm: Vllm | None = None  # from the first sync on, which brings the model's shape
        self.synced: Sync | None = None
        together = config.rollout.tensor_parallel
        self.engines = parallel.world_size() // together
        self.engine, self.place = divmod(parallel.rank(), together)
        who = f"vLLM on rank {parallel.rank()}"
        self.watchdog = Watchdog(config.rollout.timeout, "rollout.timeout", who)

    def sync(self, policy: Policy, step: int | None = None) -> None:
        if self.vllm is None:
            with _OneClearError("start"):
                self.vllm = start(policy, self.tokenizer, self.config)
        # Asleep it has lost them; and another engine of this process may have brought others.
        here = self.vllm.weights_by is self.synced and not self.vllm.asleep
        if here and self.synced is not None and self.synced.brought(policy, step):
            return
        moved = 0

        def weights() -> Iterator[tuple[str, Tensor]]:
            nonlocal moved
            bucket = self.config.rollout.sync_bucket_mb << 20
            merged = None if self.vllm and self.vllm.takes_adapters else policy.through.adapter
            for name, tensor in whole_weights(policy, self.dtype, bucket, merged):
                self.watchdog.heard()
                moved += tensor.nbytes
                yield name, tensor

        use = policy.through if self.vllm.takes_adapters else ALONE
        slept, self.vllm.weights_by = self.vllm.asleep, None
        with _OneClearError("take the weights"), self.watchdog("taking the weights"):
            if slept:  # the cache's memory comes last: until then buckets may use it
                self.vllm.wake("weights")
            base = use.backbone if isinstance(use, Use) else None
            if base is None or self.vllm.base() is not base:
                self.vllm.load(weights())
                self.vllm.base = weakref.ref(base) if base else lambda: None
            if slept:
                self.vllm.wake("kv_cache")
            self.vllm.adapter = None  # which is to ask the base
            if isinstance(use, Use) and use.adapter is not None:
                moved += self.vllm.use_adapter(policy, use.backbone, use.adapter)
            self.vllm.forget()  # prefixes that other weights have computed
        self.eos = end_tokens(self.tokenizer, policy)
        self.synced = next_sync(self.synced, policy, step, moved, slept)
        self.vllm.weights_by = self.synced

    def rest(self) -> None:
        if self.vllm is None or not self.vllm.can_sleep or self.vllm.asleep:
            return
        with _OneClearError("go to sleep"), self.watchdog("going to sleep"):
            self.vllm.sleep()

    def generate(self, prompts: list[list[int]], samples: int, draws: Draws) -> Rollout:
        """Row i * samples + k is sample k of prompts[i]."""
        vllm = self.vllm
        assert vllm is not None and not vllm.asleep, "sync() first"
        limit = self.config.rollout.max_new_tokens
        count = len(prompts) * samples
        seeds: list[int | None] = [None] * count
        together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.config.rollout.seeded or not isinstance(draws, torch.Generator):
            seeds = [*drawn(draws, some_seeds, count).tolist()]
        else:
            each = some_seeds(self.engines, draws).tolist()
            together = random_numbers(each[self.engine])
        mine = range(self.engine, len(prompts), self.engines)
        rows = [i * samples + k for i in mine for k in range(samples)]
        requests = [
            Request(prompts[row // samples], self._limit(prompts[row // samples], vllm), seeds[row])
            for row in rows
        ]
        with _OneClearError("generate"), self.watchdog("generating"), together:
            answers = vllm.generate(requests, sorted(self.eos), self.watchdog.heard)

        tokens = torch.zeros(count, limit, dtype=torch.long)
        logprobs = torch.zeros(count, limit)
        lengths, truncated = tokens.new_zeros(count), tokens.new_zeros(count)
        keys: list[int] = []
        ids: list[int] = []
        # Each rank of an engine has all of its answers, and one of them tells.
        if self.place == 0:
            for row, answer in zip(rows, answers, strict=True):
                length = len(answer.tokens)
                tokens[row, :length] = torch.tensor(answer.tokens)
                logprobs[row, :length] = torch.tensor(answer.logprobs)
                lengths[row], truncated[row] = length, answer.truncated
                for step, kept in enumerate(answer.kept or ()):
                    keys += [row * limit + step] * len(kept)
                    ids += kept
        device = parallel.device()
        return gathered(
            prompts,
            samples,
            tokens.to(device),
            logprobs.to(device),
            lengths.to(device),
            truncated.to(device),
            (torch.tensor(keys, dtype=torch.long), torch.tensor(ids, dtype=torch.int32))
            if self.config.rollout.truncates
            else None,
        )

    def _limit(self, prompt: list[int], vllm: Vllm) -> int:
        room = vllm.longest - len(prompt)
        if room < 1:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer: vLLM takes "
                f"{vllm.longest} tokens in all",
                "data.max_prompt_tokens",
            )
        return min(self.config.rollout.max_new_tokens, room)


@contextlib.contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Inside, torch draws from `seed`: ranks that are one engine have to draw alike."""
    device = parallel.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _OneClearError:
    """An engine that fails on one rank is one EngineFailed on all of them."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return
        problem = None
        if error is not None:
            traceback.print_exception(error)  # vLLM's inside is worth seeing once
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        problems = parallel.gather_objects(problem)
        for rank, each in enumerate(problems):
            if each is not None:
                raise EngineFailed(
                    f"rollout.engine=vllm: the engine of rank {rank} could not {self.what}: "
                    f"{each}. Checkpoints are intact: --resume goes on from the newest"
                ) from error


# --- vLLM itself ----------------------------------------------------------------------------------

_running: dict[tuple, Vllm] = {}


def start(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: Config) -> Vllm:
    """One engine serves every stage of a process: it takes long to start, and vLLM's allocator of
    memory that can sleep allows no second one."""
    key = (
        policy.model.config.to_json_string(),
        config.rollout,
        config.model.dtype,
        config.data.max_prompt_tokens,
        config.lora,
    )
    if key not in _running:
        _running.clear()
        _running[key] = Vllm(policy, tokenizer, config)
    return _running[key]


class Vllm:
    """vLLM's interface, as far as it is used here."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        rollout, self.on_gpu = config.rollout, parallel.device().type == "cuda"
        # In this process: that is where the weights are, and what dies here is seen here.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams

        self.make_params = SamplingParams
        self.stop, self.rollout = list(rollout.stop), rollout
        shape = policy.model.config.get_text_config()
        # What it tells of the tokens that are left: so many of the most probable ones. Where some
        # are equally probable it keeps more than top_k.
        self.told = min(rollout.top_k + TIES, shape.vocab_size) if rollout.truncates else 0
        self.vocab = shape.vocab_size
        self.longest = config.data.max_prompt_tokens + rollout.max_new_tokens
        self.longest = min(self.longest, getattr(shape, "max_position_embeddings", self.longest))
        self.can_sleep, self.asleep = self.on_gpu and rollout.sleep, False
        self.weights_by: Sync | None = None  # that brought the weights which are here
        self.takes_adapters = config.lora.active and config.lora.sync == "adapter"
        self.base: Callable[[], Backbone | None] = lambda: None  # whose weights are here
        self.adapter: LoRARequest | None = None
        self.adapters = 0  # that have been here
        # vLLM reads the shape from a folder; weights come with the first sync.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = tempfile.TemporaryDirectory(prefix="gikernels-", dir=memory)
        _write_shape(policy, self.folder.name)
        if self.stop:
            tokenizer.save_pretrained(self.folder.name)
        options = {
            "dtype": config.model.dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": not self.stop,
            "trust_remote_code": config.model.trust_remote_code,
            "generation_config": "vllm",  # no sampling settings from the model's folder
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "max_model_len": self.longest,
            "max_num_seqs": rollout.max_num_seqs,
            "max_logprobs": max(20, self.told),
            "enable_prefix_caching": True,
            "tensor_parallel_size": rollout.tensor_parallel,
            "seed": config.run.seed,
        }
        if self.on_gpu:
            options |= {
                "gpu_memory_utilization": gpu_share(config),
                "enable_sleep_mode": rollout.sleep,
                "enforce_eager": not rollout.cuda_graphs,
            }
        else:
            options |= {
                "kv_cache_memory_bytes": cache_bytes(shape, self.longest, config),
                "enforce_eager": True,
            }
        if self.takes_adapters:
            highest = min(rank for rank in RANKS if rank >= config.lora.rank)
            options |= {"enable_lora": True, "max_lora_rank": highest, "max_loras": 1}
        if parallel.world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        # else vLLM makes a group of NCCL alone, and background checkpoints want gloo as well
        parallel.join_alone()
        if not self.on_gpu:
            _forget_shared_memory()
        random = RandomStates()
        before = random.state_dict()  # vLLM seeds the whole process
        self.llm = LLM(self.folder.name, **options)
        random.load_state_dict(before)
        # Its end would be that of the process group, which is the trainer's.
        self.llm.llm_engine.engine_core._finalizer.detach()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.on_gpu:
            self.llm.apply_model(_repack_heads)

    def use_adapter(self, policy: Policy, backbone: Backbone, name: str) -> int:
        """From now on; how many bytes came."""
        from vllm.lora.request import LoRARequest

        # A number of its own, or the one before would be taken for it. Files in memory, of MBs.
        self.adapters += 1
        folder = Path(self.folder.name, f"adapter_{self.adapters}")
        shutil.rmtree(folder.with_name(f"adapter_{self.adapters - 1}"), ignore_errors=True)
        folder.mkdir()
        weights = adapter_weights(policy.model, name)
        adapters.write(folder, weights, copy.copy(backbone.settings[name]), backbone.base)
        self.adapter = LoRARequest(f"adapter {self.adapters}", self.adapters, str(folder))
        return sum(weight.nbytes for weight in weights.values())

    def forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")

    def sleep(self) -> None:
        # 2: weights are dropped, for each sync brings them all. 1: they go to the CPU's memory.
        self.llm.sleep(level=1 if self.base() is not None else 2)
        self.asleep = True

    def wake(self, what: str) -> None:
        torch.cuda.empty_cache()  # what torch holds and does not use
        self.asleep = not self.llm.wake_up(tags=[what])  # whether all of it is awake

    def generate(
        self, requests: list[Request], eos: list[int], heard: Callable[[], None]
    ) -> list[Answer]:
        params = [
            self.make_params(
                temperature=self.rollout.temperature,
                top_p=self.rollout.top_p,
                top_k=self.rollout.top_k,
                max_tokens=each.limit,
                seed=each.seed,
                logprobs=self.told,  # 0: of the sampled token alone
                stop_token_ids=eos,
                ignore_eos=True,  # it is among them
                stop=self.stop or None,
                include_stop_str_in_output=True,
                detokenize=bool(self.stop),
            )
            for each in requests
        ]
        prompts = [{"prompt_token_ids": each.prompt} for each in requests]
        self.llm.enqueue(prompts, params, lora_request=self.adapter, use_tqdm=False)
        engine, answers = self.llm.llm_engine, {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id)] = self._answer(output.outputs[0])
            heard()
        return [answers[number] for number in sorted(answers)]  # it numbers them as they come

    def _answer(self, output: CompletionOutput) -> Answer:
        tokens, places = list(output.token_ids), output.logprobs
        logprobs = [place[token].logprob for token, place in zip(tokens, places, strict=True)]
        kept = None
        if self.told:
            kept = [[t for t, told in place.items() if told.logprob > -inf] for place in places]
            if self.told < self.vocab and max(map(len, kept)) >= self.told:
                raise RuntimeError(
                    f"it has sampled from more tokens than the {self.told} that it told: more than "
                    f"{TIES} as probable as the last of rollout.top_k={self.rollout.top_k}"
                )
        return Answer(tokens, logprobs, output.finish_reason == "length", kept)


def _repack_heads(model: torch.nn.Module) -> None:
    """On a CPU vLLM multiplies by packed copies of its weights. A head that is tied to the
    embeddings gets no weight of its own from a reload, which leaves its copy as it was."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _forget_shared_memory() -> None:
    """Ranks on a CPU that are one engine share memory whose name, under `external_launcher`, is
    always the same. It outlives them, and the next engine would not start."""
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink(missing_ok=True)


def _write_shape(policy: Policy, folder: str) -> None:
    config = copy.copy(policy.model.config)
    if unties(policy.model, policy.through.adapter):
        config = copy.deepcopy(config)
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    # fully_shard puts a class of its own in front of the model's
    config.architectures = [type(policy.model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
