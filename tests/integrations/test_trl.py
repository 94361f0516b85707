"""The real TRL, on the CPU, with tiny models: off is TRL's own, on does what it says and trains."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)

import trl
import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer, RLOOTrainer

import gikernels.integrations.trl as ours
from gikernels.integrations import GroupInvariance
from gikernels.integrations.huggingface import LmHeadPatch
from gikernels.integrations.trl import GroupInvariantGRPOTrainer, GroupInvariantRLOOTrainer
from tests.integrations.tiny import qwen, tokenizer, trl_trainer

PAIRS = [(GRPOTrainer, GroupInvariantGRPOTrainer), (RLOOTrainer, GroupInvariantRLOOTrainer)]
SAME = dict(invariance=GroupInvariance(beta=0.0, kl_floor=1.0))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def history(trainer):
    """Losses and what is logged beside them, and the trained weights."""
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("theirs, mixed", PAIRS)
@pytest.mark.parametrize("settings", [{}, SAME], ids=["none", "beta=0, kl_floor=1"])
def test_off_is_trl_itself(tmp_path, theirs, mixed, settings):
    want, weights = history(trl_trainer(theirs, tmp_path, steps=3))
    got, ours_weights = history(trl_trainer(mixed, tmp_path, steps=3, **settings))
    assert len(want) == len(got) == 3
    assert any(abs(h["kl"]) > 1e-4 for h in want) and any(abs(h["grad_norm"]) > 0.1 for h in want)
    for a, b in zip(want, got):
        for key in ("loss", "kl", "entropy", "grad_norm", "reward"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    for name, p in weights.items():
        torch.testing.assert_close(ours_weights[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_adaptive_kl_of_grpo_scales_each_sequences_penalty(tmp_path, loss_type):
    """With no advantage the loss is the KL term; it is linear in kl_scale."""
    trainer = trl_trainer(
        GroupInvariantGRPOTrainer, tmp_path, config=dict(loss_type=loss_type), **SAME
    )
    trainer.train()
    inputs = dict(trainer._buffered_inputs[0])
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] - 0.1  # far enough to show

    def loss(scale):
        inputs["kl_scale"] = scale
        return trainer._compute_loss(trainer.model, inputs).item()

    ones = torch.ones(8)
    one_at_a_time = [loss(row) for row in torch.eye(8)]
    assert all(x > 0 for x in one_at_a_time) and len(set(one_at_a_time)) > 4
    assert loss(ones) == pytest.approx(sum(one_at_a_time), rel=1e-4)
    assert loss(ones / 4) == pytest.approx(loss(ones) / 4, rel=1e-4)
    del inputs["kl_scale"]
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(loss(ones))
    assert type(trainer.beta) is float and trainer.beta == 0.05


@pytest.mark.parametrize("theirs, mixed", PAIRS)
def test_on_weighs_hard_prompts_and_trains(tmp_path, theirs, mixed):
    trainer = trl_trainer(
        mixed, tmp_path, steps=4, invariance=GroupInvariance(beta=0.2, kl_floor=0.25)
    )
    seen = []
    inner = trainer._compute_loss

    def watch(model, inputs):
        seen.append({k: inputs[k].clone() for k in ("advantages", "kl_scale")})
        return inner(model, inputs)

    trainer._compute_loss = watch
    logs, weights = history(trainer)
    start = qwen().state_dict()
    assert any(not torch.equal(p, start[name]) for name, p in weights.items())
    for h, batch in zip(logs, seen, strict=True):
        assert h["group/inferred"] == 1 and h["group/gap"] > 0
        assert h["group/0/weight"] > 1 > h["group/1/weight"]
        assert h["group/0/kl_scale"] == 0.25 and h["group/1/kl_scale"] == 1
        assert sorted(set(batch["kl_scale"].tolist())) == [0.25, 1.0]
        # The easiest group, which is held the tightest, is the one with the higher rewards.
        assert h["group/0/score"] < h["reward"] < h["group/1/score"]
    assert type(trainer.beta) is float


def test_weights_multiply_trls_own_advantages(tmp_path):
    """Same seed, same samples: each advantage is TRL's times the weight of its prompt's group."""
    batches = []
    for settings in (SAME, dict(invariance=GroupInvariance(beta=0.2))):
        trainer = trl_trainer(GroupInvariantGRPOTrainer, tmp_path, steps=1, **settings)
        trainer.train()
        batches.append((trainer._buffered_inputs[0], trainer.inferred))
    (plain, _), (weighted, inferred) = batches
    order = weighted["kl_scale"]
    by_scale = {s.item(): w.item() for s, w in zip(inferred.kl_scale, inferred.weights)}
    assert len(by_scale) == 2
    factor = torch.tensor([by_scale[s.item()] for s in order])
    torch.testing.assert_close(weighted["advantages"], plain["advantages"] * factor)
    assert inferred.weights.view(-1, 2).diff(dim=1).abs().max() == 0  # one weight a prompt


def test_adaptive_kl_of_rloo_is_in_the_rewards(tmp_path):
    """advantage_1 = (r_1 - r_2) - beta * scale * (kl_1 - kl_2) for two samples of a prompt."""
    trainer = trl_trainer(
        GroupInvariantRLOOTrainer,
        tmp_path,
        config=dict(beta=1.0, temperature=1.0),
    )
    trainer.model.train()
    with torch.no_grad():
        for p in trainer.ref_model.parameters():
            p.mul_(2)
    advantages = []
    for floor in (0.0, 0.25, 1.0):
        trainer.invariance = GroupInvariance(beta=0.0, kl_floor=floor)
        torch.manual_seed(1)
        rows = [{"prompt": p} for p in ("a b", "a b", "z", "z", "d", "d", "e", "e")]
        out = trainer._generate_and_score_completions(rows)
        advantages.append(out["advantages"])
        assert set(out["kl_scale"].tolist()) == {floor, 1.0}
    loose, adaptive, tight = advantages
    hard = out["kl_scale"].new_tensor(trainer.inferred.group_ids.tolist()) == 0
    # The same samples three times: advantages are linear in the floor, and only hard ones move.
    torch.testing.assert_close(adaptive, loose + 0.25 * (tight - loose))
    assert torch.equal(adaptive[~hard], tight[~hard]) and (loose - tight)[hard].abs().min() > 1e-3


def test_a_baseline_column_takes_the_prompts_offset_out(tmp_path):
    data = {
        "prompt": ["a b c", "z y x", "d e", "b z"] * 2,
        "reference": [0.0, 100.0, 0.0, 0.0] * 2,
    }
    trainer = trl_trainer(
        GroupInvariantGRPOTrainer,
        tmp_path,
        steps=1,
        data=data,
        invariance=GroupInvariance(),
        baseline_column="reference",
    )
    logs, _ = history(trainer)
    assert logs[0]["group/0/score"] < -90 and logs[0]["group/0/mass"] == 0.25


def test_evaluation_is_not_weighted(tmp_path):
    trainer = trl_trainer(GroupInvariantGRPOTrainer, tmp_path, invariance=GroupInvariance())
    trainer.model.eval()
    rows = [{"prompt": p} for p in ("a b", "a b", "z", "z")]
    assert "kl_scale" not in trainer._generate_and_score_completions(rows)


# --- patched() ----------------------------------------------------------------------------------

NAMES = (
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "entropy_from_logits",
    "add_fused_lm_head",
)


TRLS = [getattr(trl_utils, name) for name in NAMES]
OURS = [getattr(ours, name) for name in NAMES]


def bindings():
    """Where in TRL these functions are bound, and to what."""
    return {
        (module_name, attribute): value
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] == "trl"
        for attribute, value in vars(module).items()
        if any(value is f for f in TRLS + OURS)
    }


def test_patched_undoes_itself_nested_and_after_an_exception():
    before = bindings()
    assert len(before) >= 6 and not any(value in OURS for value in before.values())
    with ours.patched():
        inside = bindings()
        assert inside.keys() == before.keys()
        assert all(value is getattr(ours, key[1]) for key, value in inside.items())
        with ours.patched():
            assert bindings() == inside
        assert bindings() == inside
        with pytest.raises(ZeroDivisionError), ours.patched():
            raise ZeroDivisionError
        assert bindings() == inside
    assert bindings() == before
    with pytest.raises(ZeroDivisionError), ours.patched():
        raise ZeroDivisionError
    assert bindings() == before


def test_patched_reaches_modules_imported_inside_and_leaves_them_clean():
    name = "trl.experimental.sdft.loss_utils"
    sys.modules.pop(name, None)
    with ours.patched():
        module = __import__(name, fromlist=["loss_utils"])
        assert module.selective_log_softmax is ours.selective_log_softmax
    assert module.selective_log_softmax is trl_utils.selective_log_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_functions_agree_with_trls(dtype):
    logits = (3 * torch.randn(2, 5, 50)).to(dtype).requires_grad_()
    index = torch.randint(0, 50, (2, 5))
    row_mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]])
    tight = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=6e-2)
    for name, args, kwargs in (
        ("selective_log_softmax", (logits, index), {}),
        ("selective_log_softmax", (logits, index), dict(temperature=0.7, row_mask=row_mask)),
        ("selective_log_softmax", (logits, torch.randint(0, 50, (2, 5, 3))), {}),
        ("entropy_from_logits", (logits,), {}),
        ("selective_log_softmax_and_entropy", (logits, index), dict(row_mask=row_mask)),
    ):
        want, got = getattr(trl_utils, name)(*args, **kwargs), getattr(ours, name)(*args, **kwargs)
        pairs = zip(want, got) if isinstance(want, tuple) else [(want, got)]
        for a, b in pairs:
            assert a.shape == b.shape
            torch.testing.assert_close(b.float(), a.float(), **tight)
            direction = torch.randn(a.shape)
            ga, gb = (
                torch.autograd.grad((x.float() * direction).sum(), logits, retain_graph=True)[0]
                for x in (a, b)
            )
            torch.testing.assert_close(gb.float(), ga.float(), **tight)
    _, entropy = ours.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    assert not entropy.requires_grad


def test_the_head_agrees_with_trls_where_it_is_hard():
    """Softcap, left-padded labels, shifted labels, and fields that we do not compute."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    ids = torch.randint(3, 40, (2, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    outs = []
    for add in (trl_utils.add_fused_lm_head, ours.add_fused_lm_head):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
        add(model, temperature=0.8, outputs=("log_probs", "entropy"))
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        shifted = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
        assert model(input_ids=ids).logits.shape == (2, 7, 40)
        outs.append((out.log_probs, out.entropy, out.loss, out.label_mask, shifted.log_probs))
    for a, b in zip(*outs):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_selective_log_softmax_of_several_tokens_keeps_float64_and_refuses_temperature_0():
    logits = torch.randn(2, 3, 9, dtype=torch.float64)
    index = torch.randint(9, (2, 3, 4))
    want = trl_utils.selective_log_softmax(logits, index, 0.7)
    got = ours.selective_log_softmax(logits, index, 0.7)
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="temperature"):
        ours.selective_log_softmax(logits, index, 0.0)


def test_trainers_that_ask_for_more_keep_trls_head_and_so_do_their_references():
    """DPO and KTO: policy first, then the reference, which asks for log-probabilities alone."""
    ids = torch.randint(2, 28, (2, 6))
    wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
    with ours.patched():
        policy, reference, next_policy = qwen(), qwen(), qwen()
        trl_utils.add_fused_lm_head(policy, outputs=wanted)
        trl_utils.add_fused_lm_head(reference)
        trl_utils.add_fused_lm_head(next_policy, outputs=("log_probs", "entropy"))
    out = policy(input_ids=ids, labels=ids, fused_lm_head=True)
    assert out.mean_logits is not None and out.is_top1 is not None
    assert not isinstance(reference.forward, ours.FusedForward)
    assert isinstance(next_policy.forward, ours.FusedForward)
    same = reference(input_ids=ids, labels=ids, fused_lm_head=True)
    assert torch.equal(same.log_probs, out.log_probs)  # the first ratio is 1, to the last bit


@pytest.mark.parametrize("trainer", ["DPOTrainer", "KTOTrainer"])
def test_preference_trainers_built_in_patched_train(trainer, tmp_path):
    torch.manual_seed(0)
    rows = [{"prompt": "a b", "chosen": " c d", "rejected": " d"}] * 4
    if trainer == "KTOTrainer":
        rows = [{"prompt": "a b", "completion": " c d", "label": bool(i % 2)} for i in range(4)]
    qwen().save_pretrained(tmp_path / "model")
    config = getattr(trl, trainer.replace("Trainer", "Config"))(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
    )
    with ours.patched():
        built = getattr(trl, trainer)(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32"),
            args=config,
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(rows),
        )
    assert torch.isfinite(torch.tensor(built.train().training_loss))


def test_patched_passes_the_transform_on():
    ids = torch.randint(2, 28, (2, 6))
    with ours.patched(logit_scale=2.0, softcap=5.0):
        with ours.patched(softcap=None):  # as the trainers of this module do: the rest stays
            inner = qwen()
            trl_utils.add_fused_lm_head(inner)
        assert (inner.forward.patch.logit_scale, inner.forward.patch.softcap) == (2.0, None)
        model = qwen()
        trl_utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="logit_scale=2 and softcap=5"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.parametrize("autocast", [True, False])
def test_cast_lm_head_to_fp32(autocast):
    """As GRPOTrainer does it: an fp32 head on a bf16 model, and no autocast in it."""
    ids = torch.randint(2, 28, (2, 6))
    results = []
    for add in (trl_utils.add_fused_lm_head, ours.add_fused_lm_head):
        model = qwen().to(torch.bfloat16)
        head = model.lm_head.float()
        head.forward = lambda x, head=head: torch.nn.functional.linear(x.float(), head.weight)
        add(model, cast_lm_head_to_fp32=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results.append(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_trainers_built_in_patched_carry_our_head(tmp_path, monkeypatch):
    runs = []
    inner = LmHeadPatch.run
    monkeypatch.setattr(LmHeadPatch, "run", lambda *a, **k: runs.append(1) or inner(*a, **k))
    with ours.patched():
        trainer = trl_trainer(GRPOTrainer, tmp_path, steps=1)
    trainer.train()
    assert runs
    runs.clear()
    trl_trainer(GRPOTrainer, tmp_path, steps=1).train()
    assert not runs


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow
def test_peak_memory_of_a_grpo_step_is_at_most_half_of_trls(monkeypatch):
    """V = 32768, 8 sequences of 128 tokens: the peak of the whole process, imports included."""
    from bench.training.integrations import Size, measure

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    size = Size(vocab=32768, sequences=8, length=128)
    theirs, own = (measure(worker, size)["peak"] for worker in ("trl", "trl-gikernels"))
    assert own <= 0.5 * theirs, f"{own / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"


def test_importing_gikernels_imports_no_peer():
    names = "('trl', 'verl', 'openrlhf', 'peft', 'transformers', 'ray', 'gikernels.integrations')"
    code = f"import gikernels, sys; sys.exit([m for m in {names} if m in sys.modules] or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
