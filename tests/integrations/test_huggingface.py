"""patch_lm_head against the models' own logits, architecture by architecture."""

import copy
import inspect
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from gikernels.integrations import patch_lm_head
from tests.forkserver import context, started, wait
from tests.integrations.tiny import qwen

V = 97
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
ARCHITECTURES = {
    "Llama": SMALL,
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": dict(SMALL, head_dim=8),
    "Gemma2": dict(SMALL, head_dim=8, final_logit_softcapping=3.0),
    "Gemma3Text": dict(SMALL, head_dim=8, final_logit_softcapping=2.0),
    "Cohere": dict(SMALL, logit_scale=0.25),
    "Granite": dict(SMALL, logits_scaling=4.0),
    "Phi": SMALL,  # bias
    "GPT2": dict(GPT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),  # tied
    "GPTJ": dict(GPT, rotary_dim=4),  # bias
    "Mixtral": dict(SMALL, num_local_experts=4, output_router_logits=True),
}


def tiny(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ARCHITECTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from uniform, and with biases that show
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + p.mean().round() if p.dim() == 1 else p * 6)
    return model


def batch():
    ids = torch.randint(3, V, (2, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 9:] = -100
    return ids, labels


def plain(model, ids, labels, temperature=1.0):
    """The same, from the model's own logits."""
    logp = (model(input_ids=ids).logits[:, :-1].float() / temperature).log_softmax(-1)
    kept = labels[:, 1:] != -100
    logprobs = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1).masked_fill(~kept, 0)
    return logprobs, (-(logp.exp() * logp).sum(-1)).masked_fill(~kept, 0)


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(got, want, rtol=2e-4):
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_the_models_own_logits(name, temperature):
    model = tiny(name)
    ids, labels = batch()
    direction, entropy_direction = torch.randn(2, *labels.shape)
    logprobs, entropy = plain(model, ids, labels, temperature)
    (logprobs * direction[:, 1:] + entropy * entropy_direction[:, 1:]).sum().backward()
    want = gradients(model)
    own_loss = model(input_ids=ids, labels=labels).loss

    with patch_lm_head(model, temperature=temperature):
        out = model(input_ids=ids, labels=labels)
        (out.logprobs * direction + out.entropy * entropy_direction).sum().backward()
    assert out.logits is None
    assert out.logprobs.shape == labels.shape and out.logprobs.dtype == torch.float32
    torch.testing.assert_close(out.logprobs[:, 1:], logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy[:, 1:], entropy, rtol=1e-4, atol=1e-5)
    assert not out.logprobs[:, 0].any() and not out.entropy[:, 0].any()
    if temperature == 1.0:
        torch.testing.assert_close(out.loss, own_loss, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), want)


def test_a_wrong_scale_or_softcap_raises_with_what_was_seen():
    model = tiny("Gemma2")
    ids, labels = batch()
    with patch_lm_head(model, softcap=30.0), pytest.raises(ValueError, match="softcap=30"):
        model(input_ids=ids, labels=labels)
    with patch_lm_head(model, logit_scale=2.0), pytest.raises(ValueError, match="logit_scale=2"):
        model(input_ids=ids, labels=labels)
    # HyperCLOVA X multiplies by what Granite divides by, under the same name.
    ARCHITECTURES["HyperCLOVAX"] = dict(SMALL, logits_scaling=4.0)
    try:
        model = tiny("HyperCLOVAX")
    finally:
        del ARCHITECTURES["HyperCLOVAX"]
    with patch_lm_head(model), pytest.raises(ValueError, match="Pass the right logit_scale"):
        model(input_ids=ids, labels=labels)
    want, _ = plain(model, ids, labels)
    with patch_lm_head(model, logit_scale=4.0):
        got = model(input_ids=ids, labels=labels).logprobs[:, 1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_softcap_of_none_is_none_whatever_the_config_says():
    """Gemma3ForConditionalGeneration ignores the softcap that its text config may carry."""
    model = tiny("Llama")
    model.config.final_logit_softcapping = 3.0
    ids, labels = batch()
    with patch_lm_head(model), pytest.raises(ValueError, match="softcap=3"):
        model(input_ids=ids, labels=labels)
    want, _ = plain(model, ids, labels)
    with patch_lm_head(model, softcap=None):
        got = model(input_ids=ids, labels=labels).logprobs[:, 1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_factor_that_is_a_word():
    """MPT's config has "inv_sqrt_d_model" for one; nothing of the kind stops an explicit one."""
    model = tiny("Llama")
    ids, labels = batch()
    model.config.logit_scale = "inv_sqrt_d_model"
    with patch_lm_head(model) as patch:
        assert patch.logit_scale == model.config.hidden_size**-0.5
    model.config.logit_scale = "by heart"
    with pytest.raises(ValueError, match="logit_scale: got str 'by heart'"):
        patch_lm_head(model)
    with patch_lm_head(model, logit_scale=1.0):
        model(input_ids=ids, labels=labels)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_call_may_be_checkpointed(reentrant):
    """It also verifies the head, and the second forward that checkpoint runs does not."""
    from torch.utils.checkpoint import checkpoint

    model = tiny("Gemma2")  # a softcap after the head: what it saves has the shape of the logits
    ids, labels = batch()
    plain_logprobs, _ = plain(model, ids, labels)
    plain_logprobs.sum().backward()
    want = gradients(model)
    model.zero_grad()
    start = torch.zeros((), requires_grad=True)

    def run(start):
        return model(input_ids=ids, labels=labels).logprobs.sum() + start

    with patch_lm_head(model):
        checkpoint(run, start, use_reentrant=reentrant).backward()
    assert_same(gradients(model), want)


def test_threads_share_a_patched_model():
    model = qwen()
    batches = [torch.randint(2, 28, (2, n)) for n in range(4, 12)]
    with patch_lm_head(model):
        want = [model(input_ids=ids, labels=ids).logprobs for ids in batches]
        with ThreadPoolExecutor(4) as pool:

            def call(i):
                ids = batches[i % 8]
                if i % 3 == 0:  # without labels: logits, whatever others do meanwhile
                    return model(input_ids=ids).logits.shape[-1]
                return model(input_ids=ids, labels=ids).logprobs

            found = list(pool.map(call, range(64)))
    for i, got in enumerate(found):
        if i % 3 == 0:
            assert got == 28
        else:
            torch.testing.assert_close(got, want[i % 8])
    assert "forward" not in vars(model.lm_head)


def test_data_parallel_is_refused():
    """nn.DataParallel calls this method of each module to copy it for another device."""
    model = qwen()
    with patch_lm_head(model), pytest.raises(RuntimeError, match="DataParallel cannot replicate"):
        model._replicate_for_data_parallel()
    model._replicate_for_data_parallel()


def test_labels_by_position():
    model = qwen()
    ids = torch.randint(2, 28, (2, 6))
    at = list(inspect.signature(model.forward).parameters).index("labels")
    with patch_lm_head(model):
        want = model(input_ids=ids, labels=ids)
        got = model(ids, *(None,) * (at - 1), ids)
        torch.testing.assert_close(got.logprobs, want.logprobs)
        assert got.logits is None
        with pytest.raises(TypeError, match="labels"):
            model(ids, *(None,) * (at - 1), ids, labels=ids)


class LoHaLinear(nn.Module):
    """As PEFT's LoHa, LoKr, IA3, OFT and VeRA look from outside: a base layer, and no lora_A."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return 2 * self.base_layer(x)


def test_adapters_on_the_head_that_are_no_lora_are_refused():
    model = qwen()
    model.lm_head = LoHaLinear(model.lm_head)
    ids = torch.randint(2, 28, (2, 6))
    with patch_lm_head(model), pytest.raises(ValueError, match="a LoHaLinear, want plain LoRA"):
        model(input_ids=ids, labels=ids)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) - super().forward(x).mean(-1, keepdim=True)


def test_architectures_that_are_not_understood_raise():
    ids, labels = batch()

    def refuses(model, match):
        with pytest.raises(ValueError, match=match):
            patch_lm_head(model)
            model(input_ids=ids, labels=labels)

    odd = tiny("Llama")
    odd.lm_head = Odd(32, V, bias=False)
    refuses(odd, "Odd, does not compute")

    class Squares(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits + out.logits.square()
            return out

    refuses(Squares(tiny("Llama").config), "any other transform is not supported")

    class Blind(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return self.model(input_ids)

    refuses(Blind(tiny("Llama").config), "never calls its output head")

    class Twice(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            self.lm_head(self.model(input_ids).last_hidden_state)
            return super().forward(input_ids, **kwargs)

    refuses(Twice(tiny("Llama").config), "more than once")
    refuses(transformers.LlamaModel(tiny("Llama").config), "no linear output head")
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    refuses(transformers.T5ForConditionalGeneration(t5), "causal")
    refuses(nn.Linear(3, 3), "causal")


def test_calls_without_labels_generation_and_removal():
    model = qwen()
    ids = torch.randint(2, 28, (2, 5))
    own = model(input_ids=ids).logits
    written = model.generate(ids, do_sample=False, max_new_tokens=4)
    signature = str(inspect.signature(model.forward))
    handle = patch_lm_head(model)
    assert torch.equal(model(input_ids=ids).logits, own)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), written)
    assert str(inspect.signature(model.forward)) == signature
    with pytest.raises(ValueError, match="patched already"):
        patch_lm_head(model)
    copied = copy.deepcopy(model)  # the copy scores with its own weights
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    zero = copied(input_ids=ids, labels=ids)
    torch.testing.assert_close(zero.loss.item(), torch.tensor(28.0).log().item())
    assert model(input_ids=ids, labels=ids).loss != zero.loss
    handle.remove()
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert model(input_ids=ids, labels=ids).logits is not None


def test_the_head_is_itself_again_after_an_exception():
    model = qwen()
    ids = torch.randint(2, 28, (2, 5))
    with patch_lm_head(model), pytest.raises(ValueError, match="labels"):
        model(input_ids=ids, labels=ids, logits_to_keep=2)
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=ids).logits.shape == (2, 5, 28)


def test_shift_labels_denominator_and_no_label_at_all():
    model = qwen()
    ids = torch.randint(2, 28, (2, 6))
    with patch_lm_head(model):
        out = model(input_ids=ids, labels=ids)
        shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
        same = model(input_ids=ids, shift_labels=shifted, num_items_in_batch=20)
        torch.testing.assert_close(same.logprobs[:, :-1], out.logprobs[:, 1:])
        torch.testing.assert_close(same.loss, out.loss * 10 / 20)
        none = model(input_ids=ids, labels=torch.full_like(ids, -100))
        none.loss.backward()
    assert none.loss == 0 and not none.logprobs.any()
    assert not model.lm_head.weight.grad.any()


def test_half_precision_and_autocast_keep_fp32_statistics():
    model = qwen().to(torch.bfloat16)
    ids = torch.randint(2, 28, (2, 6))
    with patch_lm_head(model):
        out = model(input_ids=ids, labels=ids)
    assert out.logprobs.dtype == torch.float32
    want, _ = plain(model, ids, ids)
    torch.testing.assert_close(out.logprobs[:, 1:], want, rtol=0, atol=2e-2)
    model = qwen()
    with patch_lm_head(model), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
        want, _ = plain(model, ids, ids)
    torch.testing.assert_close(out.logprobs[:, 1:], want, rtol=0, atol=2e-2)


def test_torch_compile():
    model = qwen()
    ids = torch.randint(2, 28, (2, 6))
    with patch_lm_head(model):
        want = model(input_ids=ids, labels=ids)
        got = torch.compile(model, backend="eager")(input_ids=ids, labels=ids)
        torch.testing.assert_close(got.logprobs, want.logprobs)
        got.loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.gpu
def test_on_a_gpu_at_a_real_vocabulary():
    model = qwen(vocab_size=151_936, tie_word_embeddings=True).cuda().to(torch.bfloat16)
    ids = torch.randint(2, 151_936, (4, 512), device="cuda")
    with torch.no_grad():
        want, entropy = plain(model, ids, ids)
    logits_bytes = ids.numel() * 151_936 * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with patch_lm_head(model):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
    assert torch.cuda.max_memory_allocated() - before < logits_bytes
    torch.testing.assert_close(out.logprobs[:, 1:], want, rtol=0, atol=5e-2)
    torch.testing.assert_close(out.entropy[:, 1:], entropy, rtol=0, atol=5e-2)


# --- LoRA ---------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """The part of peft's lora.Linear that matters, for machines without peft."""

    disable_adapters = merged = False

    def __init__(self, base, rank=3, bias=False):
        super().__init__()
        self.base_layer = base
        self.active_adapters = ["default"]
        self.scaling = {"default": 0.5}
        self.lora_variant = {}
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=bias)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        a, b = self.lora_A["default"], self.lora_B["default"]
        return out + b(a(self.lora_dropout["default"](x))) * self.scaling["default"]


def check_lora(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    ids, labels = torch.randint(2, 28, (2, 6)), torch.randint(2, 28, (2, 6))
    want, entropy = plain(model, ids, labels)
    (want.sum() + entropy.sum()).backward()
    grads = gradients(model)
    assert grads
    with patch_lm_head(model):
        out = model(input_ids=ids, labels=labels)
        torch.testing.assert_close(out.logprobs[:, 1:], want, rtol=1e-4, atol=1e-5)
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert_same(gradients(model), grads)


@pytest.mark.parametrize("bias", [False, True])
def test_lora_on_the_head(bias):
    model = qwen()
    model.lm_head = LoraLinear(model.lm_head, bias=bias)
    check_lora(model)
    model.lm_head.disable_adapters = True
    ids = torch.randint(2, 28, (2, 6))
    want, _ = plain(model, ids, ids)
    with patch_lm_head(model):
        got = model(input_ids=ids, labels=ids).logprobs[:, 1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_lora_variants_on_the_head_raise():
    model = qwen()
    model.lm_head = LoraLinear(model.lm_head)
    model.lm_head.lora_variant = {"default": object()}
    ids = torch.randint(2, 28, (2, 6))
    with patch_lm_head(model), pytest.raises(ValueError, match="LoRA variant"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], "modules_to_save"])
def test_peft(targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    if targets == "modules_to_save":
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    else:
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(qwen(), config).eval()
    if targets == "modules_to_save":  # the trained copy, not the frozen original, is the head
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        ids = torch.randint(2, 28, (2, 6))
        want, _ = plain(model, ids, ids)
        with patch_lm_head(model):
            got = model(input_ids=ids, labels=ids).logprobs[:, 1:]
            with model.disable_adapter():
                off = model(input_ids=ids, labels=ids).logprobs[:, 1:]
        with model.disable_adapter():
            want_off, _ = plain(model, ids, ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(off, want_off, rtol=1e-4, atol=1e-5)
    else:
        check_lora(model)


# --- FSDP2 --------------------------------------------------------------------------------------


def fsdp_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check_sharded(rank, separate_head=True)
        check_sharded(rank, separate_head=False)
    finally:
        torch.distributed.destroy_process_group()


def check_sharded(rank, *, separate_head):
    from torch.distributed.fsdp import fully_shard

    ids = torch.randint(2, 28, (2, 6), generator=torch.Generator().manual_seed(rank))
    whole, sharded = qwen(), qwen()
    for layer in sharded.model.layers:
        fully_shard(layer)
    if separate_head:
        fully_shard(sharded.lm_head)
    fully_shard(sharded)
    patch_lm_head(sharded)
    # In the second pass rank 1 has no label: the other's backward must not wait for it.
    for labels in (ids, ids if rank == 0 else torch.full_like(ids, -100)):
        out = sharded(input_ids=ids, labels=labels)
        logprobs, entropy = plain(whole, ids, labels)
        torch.testing.assert_close(out.logprobs[:, 1:], logprobs, rtol=1e-4, atol=1e-5)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        (logprobs.sum() + entropy.sum()).backward()
    for p, q in zip(whole.parameters(), sharded.parameters()):
        torch.distributed.all_reduce(p.grad)
        torch.testing.assert_close(q.grad.full_tensor(), p.grad / 2, rtol=1e-4, atol=1e-5)


def test_fsdp2_sharded_head_on_two_ranks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [context.Process(target=fsdp_rank, args=(rank, port)) for rank in range(2)]
    assert wait(started(ranks), 120) == [0, 0]
