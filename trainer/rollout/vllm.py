"""Sampling with vLLM, inside each rank's own process: no server, no Ray.

`VllmEngine` is what the trainer sees: shares and seeds, the order of waking, loading and sleeping,
errors. `Vllm` is all of vLLM's own interface, which changes with its versions. Tested with 0.32.0:
on a CPU the whole of it, but for what a CPU has not (sleep, graphs, several GPUs).

Each group of `rollout.tensor_parallel` ranks is one engine and answers its share of the prompts.
Every request has a seed of its own, so an answer depends neither on what it is batched with nor on
which engine gives it (but for rounding).
"""

from __future__ import annotations

import copy
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.config import Config, ConfigError
from trainer.models.policy import Policy
from trainer.rollout.engine import Rollout, Sync, end_tokens, gathered, next_sync
from trainer.rollout.watchdog import Watchdog
from trainer.rollout.weights import whole_weights
from trainer.runs.faults import RunError
from trainer.runs.state import RandomStates

TESTED = "0.32.0"


class EngineFailed(RunError):
    """One line: which rank's engine, doing what, and what it said."""


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    limit: int  # new tokens
    seed: int


@dataclass(frozen=True)
class Answer:
    tokens: list[int]  # with what ended it
    logprobs: list[float]
    truncated: bool


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
        moved = 0

        def weights() -> Iterator[tuple[str, Tensor]]:
            nonlocal moved
            bucket = self.config.rollout.sync_bucket_mb << 20
            for name, tensor in whole_weights(policy, self.dtype, bucket):
                self.watchdog.heard()
                moved += tensor.nbytes
                yield name, tensor

        slept = self.vllm.asleep
        with _OneClearError("take the weights"), self.watchdog("taking the weights"):
            if slept:  # the cache's memory comes last: until then buckets may use it
                self.vllm.wake("weights")
            self.vllm.load(weights())
            if slept:
                self.vllm.wake("kv_cache")
            self.vllm.forget()  # prefixes that other weights have computed
        self.eos = end_tokens(self.tokenizer, policy)
        self.synced = next_sync(self.synced, step, moved, slept)

    def rest(self) -> None:
        if self.vllm is None or not self.vllm.can_sleep or self.vllm.asleep:
            return
        with _OneClearError("go to sleep"), self.watchdog("going to sleep"):
            self.vllm.sleep()

    def generate(
        self, prompts: list[list[int]], samples: int, generator: torch.Generator
    ) -> Rollout:
        """Row i * samples + k is sample k of prompts[i]."""
        assert self.vllm is not None and not self.vllm.asleep, "sync() first"
        limit = self.config.rollout.max_new_tokens
        count = len(prompts) * samples
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        mine = range(self.engine, len(prompts), self.engines)
        rows = [i * samples + k for i in mine for k in range(samples)]
        requests = [
            Request(prompts[row // samples], self._limit(prompts[row // samples]), seeds[row])
            for row in rows
        ]
        with _OneClearError("generate"), self.watchdog("generating"):
            answers = self.vllm.generate(requests, sorted(self.eos), self.watchdog.heard)

        tokens = torch.zeros(count, limit, dtype=torch.long)
        logprobs = torch.zeros(count, limit)
        lengths, truncated = tokens.new_zeros(count), tokens.new_zeros(count)
        # Each rank of an engine has all of its answers, and one of them tells.
        if self.place == 0:
            for row, answer in zip(rows, answers, strict=True):
                length = len(answer.tokens)
                tokens[row, :length] = torch.tensor(answer.tokens)
                logprobs[row, :length] = torch.tensor(answer.logprobs)
                lengths[row], truncated[row] = length, answer.truncated
        parts = (x.to(parallel.device()) for x in (tokens, logprobs, lengths, truncated))
        return gathered(prompts, samples, *parts, self.tokenizer.pad_token_id)

    def _limit(self, prompt: list[int]) -> int:
        room = self.vllm.longest - len(prompt)
        if room < 1:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer: vLLM takes "
                f"{self.vllm.longest} tokens in all",
                "data.max_prompt_tokens",
            )
        return min(self.config.rollout.max_new_tokens, room)


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
        self.stop, self.temperature = list(rollout.stop), rollout.temperature
        shape = policy.model.config.get_text_config()
        self.longest = config.data.max_prompt_tokens + rollout.max_new_tokens
        self.longest = min(self.longest, getattr(shape, "max_position_embeddings", self.longest))
        self.can_sleep, self.asleep = self.on_gpu and rollout.sleep, False
        # vLLM reads the shape from a folder; weights come with the first sync.
        self.folder = tempfile.TemporaryDirectory(prefix="gikernels-")
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
            "max_num_seqs": rollout.batch,
            "enable_prefix_caching": True,
            "tensor_parallel_size": rollout.tensor_parallel,
            "seed": config.run.seed,
        }
        if self.on_gpu:
            options |= {
                "gpu_memory_utilization": rollout.gpu_memory,
                "enable_sleep_mode": rollout.sleep,
                "enforce_eager": not rollout.cuda_graphs,
            }
        else:
            options |= {
                "kv_cache_memory_bytes": _cache_bytes(shape, self.longest, config),
                "enforce_eager": True,
            }
        if parallel.world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        if not torch.distributed.is_initialized():
            # else vLLM makes a group of NCCL alone, and background checkpoints want gloo as well
            parallel.init_group(torch.distributed.HashStore(), 0, 1)
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

    def forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")

    def sleep(self) -> None:
        # 2: weights are dropped and not kept in the CPU's memory, for each sync brings them all.
        self.llm.sleep(level=2)
        self.asleep = True

    def wake(self, what: str) -> None:
        torch.cuda.empty_cache()  # what torch holds and does not use
        self.asleep = not self.llm.wake_up(tags=[what])  # whether all of it is awake

    def generate(
        self, requests: list[Request], eos: list[int], heard: Callable[[], None]
    ) -> list[Answer]:
        params = [
            self.make_params(
                temperature=self.temperature,
                max_tokens=each.limit,
                seed=each.seed,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=eos,
                ignore_eos=True,  # it is among them
                stop=self.stop or None,
                include_stop_str_in_output=True,
                detokenize=bool(self.stop),
            )
            for each in requests
        ]
        prompts = [{"prompt_token_ids": each.prompt} for each in requests]
        self.llm.enqueue(prompts, params, use_tqdm=False)
        engine, answers = self.llm.llm_engine, {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id)] = _answer(output.outputs[0])
            heard()
        return [answers[number] for number in sorted(answers)]  # it numbers them as they come


def _answer(output) -> Answer:
    tokens = list(output.token_ids)
    logprobs = [place[token].logprob for token, place in zip(tokens, output.logprobs, strict=True)]
    return Answer(tokens, logprobs, output.finish_reason == "length")


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
    # fully_shard puts a class of its own in front of the model's
    config.architectures = [type(policy.model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)


def _cache_bytes(shape, longest: int, config: Config) -> int:
    """Room for `rollout.batch` answers of full length; vLLM cuts the cache into blocks of 128 on a
    CPU."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = (
        2 * shape.num_hidden_layers * heads * width * getattr(torch, config.model.dtype).itemsize
    )
    return (config.rollout.batch + 2) * -(-longest // 128) * 128 * token
