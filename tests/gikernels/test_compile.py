"""Under torch.compile numbers and lengths change from step to step: at most one more compilation.

A schedule for a coefficient, a token count as denominator and batches of any length are the normal
case of training. torch.compile takes the first call's as constants and, where the second differs,
compiles once again for all to come; what asks more of it hits its limit of recompilations and, with
fullgraph=True, ends the run.
"""

import pytest
import torch
import torch._dynamo.testing

import gikernels as gk

D, V = 6, 11


def tokens(n):
    return torch.randn(n), torch.randn(n), torch.randn(n), torch.arange(n) % 4 > 0


def head(n):
    return torch.randn(n, D, requires_grad=True), torch.randn(V, D), torch.arange(n) % V


def kept(n):
    """A head and two kept tokens a row, the target among them, but for an empty row."""
    x, w, _ = head(n)
    ends = (torch.arange(n + 1) - 1).clamp(min=0) * 2
    tokens_kept = torch.arange(2 * n - 2) % V
    return x, w, torch.cat([tokens_kept[:1], tokens_kept[::2]]), ends, tokens_kept


def padded(s):
    """(S, T) log-probs, reference, values, scores (S) and mask."""
    mask = torch.arange(4) < torch.arange(s)[:, None] % 4 + 1
    return torch.randn(s, 4), torch.randn(s, 4), torch.randn(s, 4), torch.randn(s), mask


def packed(s):
    """linear_experience's: sequences of three tokens."""
    n = 3 * s
    return (*head(n), torch.arange(0, n + 1, 3), torch.randn(n), torch.randn(n), torch.randn(s))


def ids(n):
    return torch.arange(n) % 3


class Case:
    """A call of one public function on tensors of a length, with all its float arguments."""

    def __init__(self, make, call, **floats):
        self.make, self.call, self.floats = make, call, floats  # name -> a value that is allowed

    def numbers(self, step):
        """Values that differ from step to step and have the signs of those given."""
        return {k: v * (1 - 0.017 * step) for k, v in self.floats.items()}


HEAD = dict(temperature=1.3, softcap=7.0, logit_scale=0.9)
CASES = {
    "linear_logprobs": Case(head, gk.linear_logprobs, **HEAD),
    "linear_logprobs, ref": Case(
        head, lambda x, w, y, **k: gk.linear_logprobs(x, w, y, ref=(x * 2, w), **k), **HEAD
    ),
    "logprobs": Case(
        lambda n: (torch.randn(n, V, requires_grad=True), torch.arange(n) % V),
        lambda z, y, **k: gk.logprobs(z, y, ref_logits=z * 2, **k),
        **HEAD,
    ),
    "linear_policy_loss": Case(
        lambda n: (*head(n), *tokens(n)),
        lambda x, w, y, old, a, ref, mask, **k: (
            gk.linear_policy_loss(x, w, y, old, a, ref_logprobs=ref, mask=mask, **k).loss
        ),
        **HEAD,
        denom=31.0,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
        kl_coef=0.1,
        entropy_coef=0.01,
        cap_low=0.1,
        cap_high=4.0,
    ),
    "linear_gather_logprobs": Case(
        lambda n: (*head(n)[:2], torch.arange(2 * n).view(n, 2) % V),
        gk.linear_gather_logprobs,
        **HEAD,
    ),
    "linear_divergence": Case(
        lambda n: (*head(n), torch.arange(n) % 4 > 0),
        lambda x, w, y, mask, **k: (
            gk.linear_divergence(x, w, (x * 2, w), kind="jsd", mask=mask, **k).loss
        ),
        **HEAD,
        denom=31.0,
        mix=0.4,
    ),
    "linear_logprobs, support": Case(
        kept,
        lambda x, w, y, *support, **k: gk.linear_logprobs(
            x, w, y, support=gk.Support(*support), ref=(x * 2, w), **k
        ),
        **HEAD,
    ),
    "logprobs, support": Case(
        lambda n: (torch.randn(n, V, requires_grad=True), *kept(n)[2:]),
        lambda z, y, *support, **k: gk.logprobs(z, y, support=gk.Support(*support), **k),
        **HEAD,
    ),
    "linear_policy_loss, support": Case(
        lambda n: (*kept(n), *tokens(n)),
        lambda x, w, y, ends, ids, old, a, ref, mask, **k: (
            gk.linear_policy_loss(
                x, w, y, old, a, ref_logprobs=ref, mask=mask, support=gk.Support(ends, ids), **k
            ).loss
        ),
        **HEAD,
        denom=31.0,
        clip_low=0.2,
        clip_high=0.3,
        kl_coef=0.1,
        entropy_coef=0.01,
    ),
    "kl_penalty": Case(tokens, lambda a, b, c, m, coef: gk.kl_penalty(a, b, coef), coef=0.2),
    "gae": Case(
        padded, lambda r, _, v, s, m, **k: gk.gae(r, v, m, last_values=s, **k), gamma=0.99, lam=0.9
    ),
    "experience": Case(
        padded,
        lambda a, b, v, s, m, **k: gk.experience(
            a, b, v, s, m, norm="group", group_ids=ids(s.shape[0]), num_groups=3, **k
        ),
        kl_coef=0.2,
        gamma=0.99,
        lam=0.9,
        eps=1e-6,
    ),
    "linear_experience": Case(
        packed,
        lambda *a, **k: gk.linear_experience(*a, **k),
        **HEAD,
        kl_coef=0.2,
        gamma=0.9,
        lam=0.9,
        eps=1e-6,
    ),
    "normalize_advantages": Case(
        padded,
        lambda a, b, v, s, m, **k: gk.normalize_advantages(a, m, torch.ones(1, 3), **k),
        eps=1e-6,
    ),
    "group_stats": Case(tokens, lambda a, b, c, m: gk.group_stats(a, ids(a.shape[0]), 3)),
    "group_advantages": Case(
        tokens, lambda a, b, c, m, **k: gk.group_advantages(a, ids(a.shape[0]), 3, **k), eps=1e-4
    ),
    "partition": Case(tokens, lambda a, b, c, m: gk.partition(a, 2)),
    "soft_groups": Case(tokens, lambda a, b, c, m: gk.soft_groups(torch.stack([a, b], 1), c)),
    "group_weights": Case(
        tokens,
        lambda a, b, c, m, beta, low, high: gk.group_weights(
            torch.stack([a, b], 1).softmax(-1), c, beta, clamp=(low, high)
        ),
        beta=0.3,
        low=0.5,
        high=4.0,
    ),
    "ppo_loss": Case(
        tokens,
        lambda a, b, c, m, **k: gk.ppo_loss(a, b, c, m, **k).loss,
        denom=9.0,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
    ),
    "cispo_loss": Case(
        tokens,
        lambda a, b, c, m, **k: gk.cispo_loss(a, b, c, m, **k).loss,
        denom=9.0,
        cap_low=0.1,
        cap_high=4.0,
    ),
    "gspo_loss": Case(
        padded,
        lambda a, b, v, s, m, **k: gk.gspo_loss(a, b, s, m, **k).loss,
        denom=9.0,
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "value_loss": Case(
        tokens, lambda a, b, c, m, **k: gk.value_loss(a, b, c, m, **k).loss, denom=9.0, clip=0.2
    ),
    "preference_loss": Case(
        tokens,
        lambda a, b, c, m, **k: gk.preference_loss(a, b, **k),
        margin=0.3,
        label_smoothing=0.1,
    ),
    "difference_objective": Case(
        tokens, lambda a, b, c, m: gk.difference_objective(torch.stack([a, b, c], 1))
    ),
}


def flat(out):
    """The tensors of a result, in order."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out if part is not None for t in flat(part)]


def step_of(case):
    def step(inputs, numbers):
        return case.call(*inputs, **numbers)

    return step


def agree(compiled, eager, inputs, numbers):
    """Results, and the gradient of the first input where it has one."""
    learns = inputs[0].requires_grad
    found = []
    for f in (compiled, eager):
        out = flat(f(inputs, numbers))
        grads = []
        if learns:
            loss = sum(t.float().sum() for t in out if t.requires_grad)
            grads = torch.autograd.grad(loss, inputs[0])
        found.append([*out, *grads])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def compiled(case, **options):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(step_of(case), fullgraph=True, backend=counter, **options), counter


@pytest.mark.parametrize("name", CASES)
def test_twenty_lengths_and_values_of_every_number(name):
    case = CASES[name]
    f, counter = compiled(case)
    for step in range(20):
        agree(f, step_of(case), case.make(12 + step), case.numbers(step))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", CASES)
def test_dynamic_from_the_first_call(name):
    """Numbers and lengths together; what is dynamic from the start is compiled once."""
    case = CASES[name]
    f, counter = compiled(case, dynamic=True)
    for step in range(3):
        agree(f, step_of(case), case.make(12 + step), case.numbers(step))
    assert counter.frame_count == 1


OPERATIONS = ["linear_logprobs, ref", "logprobs", "linear_policy_loss", "experience"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_mark_dynamic(name):
    """It raises where anything makes a constant of the length."""
    case = CASES[name]
    f, counter = compiled(case)
    for n in (12, 13):
        inputs = case.make(n)
        for x in (x for x in inputs if x.shape[0] == n):
            torch._dynamo.mark_dynamic(x, 0)
        agree(f, step_of(case), inputs, case.floats)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", CASES)
def test_export(name):
    """For any length, from one length."""
    case = CASES[name]

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return flat(case.call(*inputs, **case.floats))

    inputs = case.make(12)
    length = torch.export.Dim("length", min=2, max=1 << 20)
    dims = {12: length, 13: length + 1, 22: 2 * length - 2, 36: 3 * length}
    shapes = tuple({0: dims[x.shape[0]]} if x.shape[0] in dims else None for x in inputs)
    program = torch.export.export(Module(), inputs, dynamic_shapes=(shapes,))
    other = case.make(17)
    got, want = program.module()(*other), flat(case.call(*other, **case.floats))
    torch.testing.assert_close(got, want)
