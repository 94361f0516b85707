"""The command line: what is wrong costs one line and exit code 2, and writes nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from matplotlib.figure import Figure

from tests.trainer import tiny
from trainer.__main__ import COMMANDS, main
from trainer.cli import hub, memory
from trainer.config import load
from trainer.runs.folder import RunFolder
from trainer.stages import registry
from trainer.worlds.toy import World

ROOT = Path(__file__).parents[3]
TINY = [*tiny.SMALL, "sft.steps=2", "rm.steps=2", "ppo.steps=2", "run.threads=1"]


@pytest.fixture
def gi(capsys):
    """gi(argument ...) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(each) for each in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(gi, tmp_path):
    """refused(message, argument ...): one line with the message, exit code 2, nothing written."""

    def check(message, *arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = gi(*arguments, "--output", tmp_path / "run")
        assert (code, out) == (2, "")
        assert message in err and err.count("\n") == 1 and err.startswith("gi: ")
        assert sorted(tmp_path.rglob("*")) == before

    return check


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from trainer.__main__ import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'matplotlib', 'datasets'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert "hh_8gpu" in done.stdout


def test_a_sink_without_its_package(refused, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else found(name, *rest),
    )
    refused("trainer.log=wandb: wandb is not installed", "train", "toy", "trainer.log=[wandb]")


def test_python_m_trainer():
    done = python("-m", "trainer", "tarin", "toy")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gi: tarin: no such command (did you mean train?)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "train wants a configuration, for example: gi train toy"),
        (["train", "tyo"], "tyo: no packaged configuration of this name (did you mean toy?)"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "toy", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["train", "toy", "groups.bta=1"], "groups.bta: unknown key (did you mean beta?)"),
        (["train", "toy", "ppo.lr=fast"], "ppo.lr: is 'fast'; want number"),
        (["metarm", "toy"], "metarm.rounds: is 0; want 1 or more"),
        (["train", "toy", "run.stages=[sft, metarm]"], "metarm.rounds: is 0; want 1 or more"),
        (["metarm", "toy", "metarm.rounds=1"], "run stage sft first"),
        (["train", "toy", "metarm.rounds=1", "metarm.samples=1"], "metarm.samples: is 1; want 2"),
        (["train", "toy", "metarm.rounds=1", "model.reward=some/rm"], "metarm.rounds: is 1; want"),
        (["train", "toy", "metarm.prompts=ood", "data.ood_prompts="], "metarm.prompts: is 'ood'"),
        (["train", "toy", "model.reference=./no"], "./no: model.reference: no such file or folder"),
        (["train", "toy", "model.policy=./no/model"], "./no/model: model.policy: no such file or"),
        (["train", "toy", "data.prompts=no.jsonl"], "data.prompts: no.jsonl: no such file"),
        (["train", "toy", "rollout.stop=['']"], "rollout.stop: is ['']; want texts that are not e"),
        (["train", "toy", "ppo.importance_cap=0.5"], "ppo.importance_cap: is 0.5; want 1 or more"),
        (["ppo", "toy"], "run stage sft first"),
        (["eval", "toy"], "run stage sft first"),
        (["report", "nowhere"], "nowhere: no run folder"),
        (["keys", "pop"], "pop: no such section (did you mean ppo?)"),
    ],
)
def test_what_cannot_be_is_refused(refused, arguments, message):
    refused(message, *arguments)


def test_resume_is_refused_where_it_is_not_there(refused):
    refused("--resume is not there yet for eval", "eval", "toy", "--resume")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a b', ":2: not JSON"),
        ('{"text": "a b"}', ":2: no column prompt or messages; there are text"),
        ('{"prompt": ""}', ":2: empty prompt"),
        (json.dumps({"prompt": "a " * 40}), ":2: prompt of 40 tokens is over data.max_prompt_tok"),
    ],
)
@pytest.mark.parametrize("key", ["prompts", "eval_prompts"])
def test_bad_data_is_found_before_anything_is_written(refused, tmp_path, key, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "copy copy a b :"}\n' + line + "\n")
    refused(f"{path}{message}", "train", "toy", *TINY, f"data.{key}={path}")


REWARDS = """
def good(prompts, answers, meta): return [0.0] * len(answers)
def raises(prompts, answers, meta): raise KeyError("no such thing")
def short(prompts, answers, meta): return [0.0]
def words(prompts, answers, meta): return ["a"] * len(answers)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "reward.functions[0]: rewards_of_a_test:raises raised KeyError"),
        ("short", "rewards_of_a_test:short returned shape (1,), want 2 numbers"),
        ("words", "rewards_of_a_test:words returned list, want 2 numbers"),
        ("none", "cannot import rewards_of_a_test:none"),
    ],
)
def test_bad_reward_functions_are_found_before_anything_is_written(
    refused, tmp_path, monkeypatch, name, message
):
    (tmp_path / "rewards_of_a_test.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    functions = f"reward.functions=[{{function: 'rewards_of_a_test:{name}'}}]"
    refused(message, "train", "toy", *TINY, functions)


def test_a_tokenizer_without_an_end_is_refused(refused, tmp_path):
    world = World(load("toy").toy)
    tokenizer = world.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    world.model_config().save_pretrained(tmp_path / "model")
    refused("its tokenizer has no eos_token", "train", "toy", f"model.policy={tmp_path / 'model'}")


def test_oracle_groups_want_domains(refused, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "copy copy a b :"}\n')
    oracle = "groups.inference=oracle"
    refused("wants a domain for each prompt", "train", "toy", *TINY, f"data.prompts={path}", oracle)


# The dry run.


def test_a_dry_run_says_the_plan_and_writes_nothing(gi, tmp_path):
    code, out, err = gi("train", "toy", "--dry-run", *TINY, "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    assert not (tmp_path / "run").exists()
    for part in (
        "sft    2 steps of 64 demonstrations",
        "prompts         toy: 64 rows",
        "optimiser",
    ):
        assert part in out
    assert "not checked" not in out


def test_a_dry_run_tells_of_rounds(gi, tmp_path):
    code, out, _ = gi("train", "toy", "--dry-run", *TINY, *ROUND, "--output", tmp_path / "run")
    assert code == 0 and "metarm 1 rounds: 8 prompts (train) x 5 answers, 2 steps" in out
    assert "theta, kept aside" in out


def test_a_dry_run_of_a_local_architecture(gi, tmp_path):
    """Enough of a model to plan with: its config.json."""
    world = World(load("toy").toy)
    folder = tmp_path / "model"
    world.model_config().save_pretrained(folder)
    overrides = [f"model.policy={folder}", "run.ranks=4", "model.gradient_checkpointing=false"]
    code, out, _ = gi("train", "hh_8gpu", "--dry-run", *overrides)
    assert code == 0 and "0.65M parameters" in out and "4 ranks" in out
    assert f"{folder}: no tokenizer" in out
    code, other, _ = gi("train", "hh_8gpu", "--dry-run", overrides[0], "run.ranks=4")
    assert code == 0 and other != out  # activations


def test_a_dry_run_without_a_network(gi, refused, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    for name in ("hh_8gpu", "tldr_1gpu"):
        code, out, _ = gi("train", name, "--dry-run")
        assert code == 0
        assert "cannot be resolved" in out and "not checked here" in out
        assert "Qwen/Qwen2.5-7B, 7.62B parameters" in out or name == "tldr_1gpu"
    refused("gi: Qwen/Qwen2.5-7B: model.policy: cannot be resolved", "train", "hh_8gpu")


def test_the_hub_is_given_up_before_its_library_is_imported():
    """It reads HF_HUB_OFFLINE once; set later, every name costs a timeout."""
    code = (
        "import sys, trainer.cli.check as it; from trainer.__main__ import main;"
        "it.check = lambda *_, **__: sys.exit('huggingface_hub' in sys.modules);"
        "main(['train', 'toy', '--dry-run'])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their authors publish them
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_architectures(name, parameters):
    assert memory.published(name).parameters == parameters


def test_parameters_are_counted_without_memory():
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        tie_word_embeddings=True,
    )
    name = "Qwen/Qwen2.5-0.5B"
    assert memory.shape_of(config, name) == memory.published(name)


def test_memory_by_hand():
    config = load("hh_8gpu")
    shape = memory.published("Qwen/Qwen2.5-7B")
    parts = memory.estimate(config, "ppo", shape, shape, ranks=8)
    table = 152064 * 3584
    whole, body = shape.parameters, shape.parameters - table
    # masters, gradients and moments in float32; in bfloat16 what is frozen, gathered and sampled
    assert parts["weights"] == parts["gradients"] == 4 * whole // 8
    assert parts["optimiser"] == 8 * whole // 8
    assert parts["reference"] == 2 * whole // 8 and parts["reward model"] == 2 * body // 8
    assert parts["critic"] == 12 * body // 8
    block = (body - table - 3584) // 28
    assert parts["gathered for compute"] == 2 * (block + 2 * table + 3584)
    assert parts["policy for sampling"] == 2 * whole
    # 28 layers x 2 x 512 numbers of 2 bytes for each of 64 x 768 tokens, and what is drawn from
    assert parts["generation cache"] == 64 * (28 * 2 * 512 * 2 * 768 + 24 * 152064)
    training = parts["gradients"] + parts["gathered for compute"] + parts["activations"]
    assert training > parts["generation cache"]
    at_once = memory.at_once(config, parts)
    assert at_once == sum(parts.values()) - parts["generation cache"]
    judges = memory.estimate(config, "rm", shape, shape, ranks=8)
    assert judges["gathered for compute"] == 2 * (block + table + 3584)
    plain = load("hh_8gpu", ["ppo.advantages=leave_one_out", "ppo.samples_per_prompt=2"])
    assert "critic" in memory.estimate(plain, "ppo", shape, shape, 8)  # it carries the group head
    none = plain.override(["groups.inference=none"])
    assert "critic" not in memory.estimate(none, "ppo", shape, shape, 8)


def test_memory_of_one_gpu_and_of_vllm():
    shape, card = memory.published("Qwen/Qwen2.5-0.5B"), 80 * 2**30
    one = load("hh_1gpu", ["model.offload_reference=true"])
    parts = memory.estimate(one, "ppo", shape, shape, 1, card)
    assert parts["policy for sampling"] == 2 * shape.parameters  # not the trainer's shards
    assert "reference" not in parts  # in the CPU's memory
    precise = load("hh_1gpu", ["model.dtype=float32"])
    on_cpu = memory.estimate(precise, "ppo", shape, shape, 1)
    assert not {"policy for sampling", "gathered for compute"} & on_cpu.keys()
    assert on_cpu["reference"] == 4 * shape.parameters
    for sleep in ("true", "false"):
        vllm = load("hh_1gpu", ["rollout.engine=vllm", f"rollout.sleep={sleep}"])
        parts = memory.estimate(vllm, "ppo", shape, shape, 1, card)
        assert parts["vLLM"] == int(0.4 * card)
        assert not {"policy for sampling", "generation cache"} & parts.keys()
        training = sum(parts[name] for name in memory.WHILE_TRAINING)
        saved = min(training, parts["vLLM"]) if sleep == "true" else 0
        assert memory.at_once(vllm, parts) == sum(parts.values()) - saved


# Whole runs.


ROUND = [
    "metarm.rounds=1",
    "metarm.steps=2",
    "metarm.meta_prompts=8",
    "metarm.meta_batch=4",
    "metarm.test_prompts=8",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "toy", *TINY, *ROUND, "--output", str(path)]) == 0
    return path


def test_train_leaves_a_whole_run_folder(trained):
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "report.html"):
        assert (trained / name).stat().st_size > 100
    assert list((trained / "plots").glob("*.png"))
    for name in ("sft", "rm", "policy"):
        assert (trained / "models" / name / "config.json").is_file()
    with_round = [*TINY, *ROUND, f"run.output={trained}"]
    assert load(str(trained / "config.yaml")) == load("toy", with_round)
    assert "MetaRM, round by round" in (trained / "report.html").read_text()
    for number in (0, 1):
        assert (trained / "rounds" / str(number) / "models" / "rm" / "config.json").is_file()


def test_another_configuration_does_not_overwrite_a_run(trained, gi):
    before = (trained / "config.yaml").read_text()
    code, _, err = gi("ppo", "toy", *TINY, *ROUND, "kl.coef=0.7", "--output", trained)
    assert code == 2 and err.count("\n") == 1
    before_and_now = f"(kl.coef: {load('toy', TINY).kl.coef} -> 0.7)"
    assert f"holds a run with other settings {before_and_now}" in err
    assert (trained / "config.yaml").read_text() == before


def test_a_stage_alone_and_an_evaluation_in_the_same_folder(trained, gi):
    code, out, err = gi("ppo", "toy", *TINY, *ROUND, "--output", trained)
    assert code == 0, err
    assert not (trained / "rounds").exists()  # they were of another policy
    code, out, err = gi("metarm", "toy", *TINY, *ROUND, "--output", trained)
    assert code == 0 and (trained / "rounds" / "1").is_dir(), err
    code, out, err = gi("eval", "toy", *TINY, "eval.samples_per_domain=4", "--output", trained)
    assert code == 0 and "eval/gold" in out, err


def test_reports_of_one_run_and_of_two(trained, gi, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write_bytes(b"png"))
    code, out, _ = gi("report", trained)
    assert code == 0 and out.strip() == str(trained / "report.html")
    code, out, _ = gi("report", trained, trained, "--output", tmp_path / "both")
    assert code == 0 and out.strip() == str(tmp_path / "both" / "report.html")
    assert "Comparison of runs" in (tmp_path / "both" / "report.html").read_text()


def test_keys_and_doctor(gi):
    code, out, _ = gi("keys", "kl")
    assert code == 0 and "floor: 0.5" in out and "ppo" not in out.split()
    code, out, _ = gi("doctor")
    assert code == 0
    for part in ("torch", "gikernels: reference", "vLLM", ".[vllm]"):
        assert part in out


def test_kernels_can_be_checked_and_switched_off(gi, monkeypatch, capsys):
    """`gi doctor --kernels` is the operations' own test; model.kernels holds for every stage."""
    from gikernels import selftest
    from gikernels.backends import dispatch

    monkeypatch.setattr(selftest, "main", lambda arguments: 7 if arguments == [] else 0)
    assert gi("doctor", "--kernels")[0] == 7
    seen = []
    monkeypatch.setitem(registry.STAGES, "sft", lambda *_: seen.append(dispatch._preferred))
    for name in ("auto", "reference"):
        registry.run("sft", load("toy", [f"model.kernels={name}"]), RunFolder("unused"), False)
    assert seen == ["auto", "reference"] and dispatch._preferred == "auto"
