"""What is around vLLM: order of calls, shares, seeds, buckets, failures. A recorder stands in for
vLLM itself here; tests/vllm runs the real one."""

import ctypes
import sys
import time

import pytest
import torch

from tests.trainer import children, tiny
from trainer import parallel
from trainer.cli import check, plan
from trainer.config import ConfigError
from trainer.models import loading
from trainer.rollout import vllm as ours
from trainer.rollout import watchdog as watchdogs
from trainer.rollout.vllm import Answer, EngineFailed, VllmEngine
from trainer.rollout.weights import buckets, whole_weights

PROMPTS = [[5, 6, 11, 12, 13, 3], [7, 5, 14, 11, 3], [5, 8, 11, 12, 3], [5, 6, 12, 3], [5, 3]]


class Recorder:
    """In vLLM's place: notes what is asked of it; a request's seed decides its answer."""

    can_sleep, longest, takes_adapters = True, 20, False

    def __init__(self):
        self.calls, self.weights, self.requests = [], {}, []
        self.asleep, self.weights_by = False, None

    def load(self, weights):
        self.calls.append("load")
        self.weights = {name: tensor.clone() for name, tensor in weights}

    def generate(self, requests, eos, heard):
        self.calls.append("generate")
        self.requests += requests
        heard()
        return [
            Answer([each.seed % 7 + 1] * min(each.limit, 3), [-0.5] * 3, each.seed % 2 == 0, None)
            for each in requests
        ]

    def forget(self):
        self.calls.append("forget")

    def sleep(self):
        self.calls.append("sleep")
        self.asleep = True

    def wake(self, what):
        self.calls.append(f"wake {what}")
        self.asleep = what != "kv_cache"


def engine_of(config):
    engine = VllmEngine(config, loading.load_tokenizer("toy", config))
    engine.vllm = Recorder()
    return engine, loading.load_policy("toy", config)


@pytest.fixture
def config(tmp_path):
    def make(*overrides):
        return tiny.config(tmp_path, "rollout.engine=vllm", *overrides)

    return make


def generate(engine, samples=2):
    return engine.generate(PROMPTS, samples, torch.Generator().manual_seed(0))


def test_order_of_waking_loading_and_sleeping(config):
    """The weights' memory wakes before they come, the cache's after; no prefix outlives them."""
    engine, policy = engine_of(config())
    engine.sync(policy, 0)
    assert engine.vllm.calls == ["load", "forget"]
    generate(engine)
    engine.rest()
    engine.rest()  # asleep already
    with pytest.raises(AssertionError, match="sync"):
        generate(engine)  # its weights are gone
    engine.vllm.calls.clear()
    engine.sync(policy, 1)
    generate(engine)
    engine.sync(policy, 2)  # awake: for an evaluation, say
    assert engine.vllm.calls == [
        *("wake weights", "load", "wake kv_cache", "forget", "generate"),
        *("load", "forget"),
    ]


def test_a_later_stage_wakes_what_an_earlier_one_left_asleep(config):
    engine, policy = engine_of(config())
    engine.sync(policy)
    engine.rest()
    later, _ = engine_of(config())
    later.vllm = engine.vllm
    later.vllm.calls.clear()
    later.sync(policy, 0)
    assert later.vllm.calls == ["wake weights", "load", "wake kv_cache", "forget"]


def test_weights_that_are_here_do_not_come_again(config):
    """After an evaluation they are the next rollout's. Gone is what sleep or another engine of
    this process took; and a reference policy has no step that could vouch for it."""
    engine, policy = engine_of(config())
    engine.sync(policy, 4)  # evaluation
    engine.sync(policy, 4)  # rollout
    assert engine.vllm.calls == ["load", "forget"] and engine.synced.number == 1
    other, another = engine_of(config())
    for change in (
        lambda: None,
        lambda: engine.sync(another, 5),
        lambda: engine.rest(),
        lambda: other.sync(policy, 5),
        lambda: engine.sync(policy),
    ):
        engine.sync(policy, 5)
        other.vllm = engine.vllm
        change()
        before = engine.vllm.calls.count("load")
        engine.sync(policy, 5)
        again = engine.vllm.calls.count("load") - before
        assert again == (0 if change.__code__.co_names == () else 1)


def test_what_cannot_sleep_is_not_asked_to(config):
    engine, policy = engine_of(config())
    engine.vllm.can_sleep = False
    engine.sync(policy)
    engine.rest()
    generate(engine)
    assert engine.vllm.calls == ["load", "forget", "generate"]


def test_each_sync_has_a_name(config):
    engine, policy = engine_of(config())
    names = []
    for step in (0, 1):
        engine.sync(policy, step)
        names.append(str(engine.synced))
    engine.rest()
    engine.sync(policy, 2)
    names.append(str(engine.synced))
    resumed, policy = engine_of(config())
    for step in (None, 40, None, 41):  # None: the reference policy
        resumed.sync(policy, step)
        names.append(str(resumed.synced))
    assert names == [
        "sync 1 (the first, weights of step 0)",
        "sync 2 (an update, weights of step 1)",
        "sync 3 (after sleep, weights of step 2)",
        "sync 1 (the first)",
        "sync 2 (the first after a resume, weights of step 40)",
        "sync 3 (an update)",
        "sync 4 (an update, weights of step 41)",
    ]
    assert engine.synced.bytes == sum(p.nbytes for p in policy.parameters())


def test_weights_come_in_the_engines_dtype_tied_ones_once(config):
    engine, policy = engine_of(config("model.dtype=bfloat16"))
    engine.sync(policy)
    expected = dict(policy.model.named_parameters())
    assert engine.vllm.weights.keys() == expected.keys()
    for name, tensor in engine.vllm.weights.items():
        assert torch.equal(tensor, parallel.whole(expected[name]).bfloat16())


def test_without_seeds_all_ranks_of_an_engine_draw_alike(config):
    """From numbers that depend on the generator alone; the process's own stay as they are."""
    drawn = []
    for process_seed, seed in ((1, 0), (2, 0), (2, 1)):
        engine, policy = engine_of(config("rollout.seeded=false"))
        engine.sync(policy)
        generate_there = engine.vllm.generate

        def draw_and_generate(requests, eos, heard, generate_there=generate_there):
            assert all(each.seed is None for each in requests)
            drawn.append(torch.rand(3).tolist())
            some = [ours.Request(each.prompt, each.limit, 1) for each in requests]
            return generate_there(some, eos, heard)

        engine.vllm.generate = draw_and_generate
        torch.manual_seed(process_seed)
        before = torch.get_rng_state()
        engine.generate(PROMPTS, 2, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]


def test_limits_and_seeds_of_requests(config):
    engine, policy = engine_of(config())
    engine.sync(policy)
    rollout = generate(engine)
    requests = engine.vllm.requests
    assert [each.limit for each in requests] == [12] * 10
    assert len({each.seed for each in requests}) == 10
    assert [each.prompt for each in requests] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert rollout.truncated.tolist() == [each.seed % 2 == 0 for each in requests]
    engine.vllm.longest = 10
    generate(engine)
    assert [each.limit for each in engine.vllm.requests[10::2]] == [4, 5, 5, 6, 8]
    engine.vllm.longest = 6
    with pytest.raises(ConfigError, match=r"max_prompt_tokens: a prompt of 6 tokens leaves no roo"):
        generate(engine)


# --- several ranks ---


def sampled_on_ranks(output, share):
    """What the ranks' engines are asked, and what each of them returns."""
    config = tiny.config(output, f"rollout.tensor_parallel={share}")
    engine, policy = engine_of(config)
    engine.sync(policy)
    rollout = generate(engine)
    seeds = [each.seed for each in engine.vllm.requests]
    all_rollouts = parallel.gather_objects((rollout.sequences.answers(), seeds))
    if parallel.is_main():
        torch.save(all_rollouts, output / f"{parallel.world_size()}_{share}")


@pytest.mark.parametrize("share", [1, 2])
def test_ranks_share_the_prompts_and_all_know_all_answers(tmp_path, share):
    """With an engine each, a part of the prompts; of one engine both ask for the same."""
    assert children.run_ranks(1, sampled_on_ranks, tmp_path, 1) == [0]
    assert children.run_ranks(2, sampled_on_ranks, tmp_path, share) == [0, 0]
    ((answers, seeds),) = torch.load(tmp_path / "1_1")
    (answers0, seeds0), (answers1, seeds1) = torch.load(tmp_path / f"2_{share}")
    assert answers0 == answers1 == answers
    if share == 1:
        rows = range(10)
        assert seeds0 == [seeds[row] for row in rows if row // 2 % 2 == 0]
        assert seeds1 == [seeds[row] for row in rows if row // 2 % 2 == 1]
    else:
        assert seeds0 == seeds1 == seeds


def gathered_in_buckets(output, size):
    config = tiny.config(output, "model.dtype=bfloat16")
    whole = dict(loading.causal("toy", config, trained=True).named_parameters())
    policy = loading.load_policy("toy", config)
    alive = {}  # buckets that a consumer of one tensor at a time keeps alive
    seen = []
    for name, tensor in whole_weights(policy, torch.bfloat16, size):
        assert torch.equal(tensor, whole[name].detach().bfloat16()), name
        storage = tensor.untyped_storage()
        alive[storage.data_ptr()] = storage.nbytes()
        seen.append(name)
    assert seen == list(whole)
    limit = max(size, max(p.numel() * 2 for p in whole.values()))
    assert max(alive.values()) <= 1.1 * limit  # and some padding


@pytest.mark.parametrize("size", [1, 5000, 10**9])
def test_buckets_of_shards_are_the_whole_weights(tmp_path, size):
    assert children.run_ranks(2, gathered_in_buckets, tmp_path, size) == [0, 0]


def test_buckets_are_bounded_and_lose_nothing():
    named = [(str(i), torch.empty(n)) for i, n in enumerate([10, 10, 50, 1, 1, 30, 10])]
    cut = [[name for name, _ in each] for each in buckets(iter(named), torch.float32, 4 * 31)]
    assert cut == [["0", "1"], ["2"], ["3", "4"], ["5"], ["6"]]


def one_rank_fails(output):
    engine, policy = engine_of(tiny.config(output))
    engine.sync(policy)
    if parallel.rank() == 1:
        engine.vllm.generate = lambda *_: 1 / 0
    try:
        generate(engine)
    except EngineFailed as error:
        assert "the engine of rank 1 could not generate: ZeroDivisionError" in str(error)
        return
    raise AssertionError("no error")


def test_an_engine_that_fails_on_one_rank_is_one_error_on_all(tmp_path):
    assert children.run_ranks(2, one_rank_fails, tmp_path) == [0, 0]


# --- silence ---


def silent(output, kind):
    watchdogs.HELD = 1.0
    sys.__stderr__ = (output / "stderr").open("w")
    watchdog = watchdogs.Watchdog(0.4, "rollout.timeout", "vLLM on rank 3")
    with watchdog("generating"):
        for _ in range(5):  # longer than the limit in all, but never silent for so long
            time.sleep(0.2)
            watchdog.heard()
    time.sleep(0.6)  # nobody is waited for
    with watchdog("generating"):
        if kind == "holds the lock":
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)


@pytest.mark.parametrize("kind", ["sleeps", "holds the lock"])
def test_a_hang_ends_the_process_in_words(tmp_path, kind):
    assert children.run(silent, tmp_path, kind) == 1
    said = (tmp_path / "stderr").read_text()
    assert "silent" in said  # where it hangs
    if kind == "sleeps":
        assert "gi: rollout.timeout=0.4: vLLM on rank 3: no sign of life" in said
        assert "from: generating" in said and "--resume" in said


# --- before a run ---


def test_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    config = tiny.config(tmp_path, "rollout.engine=vllm")
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm: vllm is not installed: pip inst"):
        check.check(config, ("ppo",))


def test_a_dry_run_plans_without_it(tmp_path, monkeypatch):
    real = check.importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util, "find_spec", lambda n, *rest: None if n == "vllm" else real(n, *rest)
    )
    config = tiny.config(tmp_path, "rollout.engine=vllm", "run.ranks=4")
    found = check.check(config, ("sft", "rm", "ppo"), dry_run=True)
    text = plan.describe(config, ("sft", "rm", "ppo"), found)
    assert "rollout.engine=vllm: vllm is not installed" in text and "policy for sampling" in text
    config = tiny.config(
        tmp_path, "rollout.engine=vllm", "run.ranks=4", "rollout.tensor_parallel=3"
    )
    with pytest.raises(ConfigError, match=r"tensor_parallel: is 3; want a divisor .* ranks, 4"):
        check.check(config, ("sft",), dry_run=True)


def test_a_second_engine_of_the_same_kind_is_not_started(config, monkeypatch):
    started = []
    monkeypatch.setattr(ours, "_running", {})
    monkeypatch.setattr(ours, "Vllm", lambda *arguments: started.append(arguments) or Recorder())
    for overrides in ([], [], ["rollout.max_num_seqs=3"]):
        made = config(*overrides)
        tokenizer, policy = loading.load_tokenizer("toy", made), loading.load_policy("toy", made)
        VllmEngine(made, tokenizer).sync(policy)
    assert len(started) == 2
