"""Every option of linear_policy_loss against the same thing composed of smaller operations.

A second copy of a loss drifts: here the fused one is held to linear_logprobs, the public losses and
kl_penalty's estimators, values and gradients, to rounding, option by option.
"""

import pytest
import torch

import gikernels as gk
from gikernels import reference

needs_triton = pytest.mark.skipif(not gk.backends()["triton"], reason="no triton")

N, D, V = 37, 24, 250
TENSORS = {  # by name: what True stands for
    "ref_logprobs": lambda now: now + 0.3 * torch.randn(N),
    "kl_coef": lambda now: torch.rand(N),
    "temperature": lambda now: torch.rand(N) + 0.5,
    "bias": lambda now: torch.randn(V),
    "denom": lambda now: torch.tensor(9.0) * torch.randint(3, 9, (N,)),
}

# One line an option: alone, then with what it might get in the way of.
TABLE = [
    {},
    {"clip_low": 0.05, "clip_high": 0.4},
    {"dual_clip": 1.1},
    {"loss": "cispo"},
    {"loss": "cispo", "cap_low": 0.8, "cap_high": 1.2},
    {"denom": True},
    {"denom": 64.0 * 9},
    {"ref_logprobs": True, "kl_coef": 0.2, "kl_estimator": "k1"},
    {"ref_logprobs": True, "kl_coef": 0.2, "kl_estimator": "k2"},
    {"ref_logprobs": True, "kl_coef": 0.2, "kl_estimator": "k3"},
    {"ref_logprobs": True, "kl_coef": True},
    {"entropy_coef": 0.1},
    {"temperature": 0.7},
    {"temperature": True},
    {"bias": True},
    {"softcap": 4.0, "logit_scale": 1.5},
    {"loss": "cispo", "denom": True, "ref_logprobs": True, "kl_coef": True, "entropy_coef": 0.1},
    {"denom": True, "dual_clip": 1.1, "ref_logprobs": True, "kl_coef": 0.3, "entropy_coef": 0.1}
    | {"temperature": True, "bias": True, "softcap": 4.0},
]
OF_LOSS = {
    "ppo": (gk.ppo_loss, ("clip_low", "clip_high", "dual_clip")),
    "cispo": (gk.cispo_loss, ("cap_low", "cap_high")),
}
OF_HEAD = ("temperature", "bias", "softcap", "logit_scale")


def composed(hidden, weight, targets, old, advantages, *, mask, denom, loss="ppo", **rest):
    head = {name: rest.pop(name) for name in OF_HEAD if name in rest}
    targets = targets.masked_fill(~mask, -100)
    stats = gk.linear_logprobs(hidden, weight, targets, **head, backend="reference")
    f, names = OF_LOSS[loss]
    knobs = {name: rest[name] for name in names if name in rest}
    out, metrics = f(stats.logprobs, old, advantages, mask, denom=denom, **knobs)
    metrics = {"policy": out, **metrics}
    metrics["entropy"] = reference.token_sum(stats.entropy, mask, denom)
    out = out - rest.get("entropy_coef", 0) * metrics["entropy"]
    if "ref_logprobs" in rest:
        d = stats.logprobs - rest["ref_logprobs"]
        kl = reference.kl_estimate(d, rest.get("kl_estimator", "k3"))
        metrics["kl"] = reference.token_sum(kl, mask, denom)
        out = out + reference.token_sum(rest["kl_coef"] * kl, mask, denom)
    return gk.LossOut(out, metrics)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("options", TABLE, ids=lambda o: "-".join(o) or "plain")
def test_equals_the_composed_form(backend, options, device):
    hidden, weight = torch.randn(N, D), torch.randn(V, D) / 3
    targets, mask = torch.randint(V, (N,)), torch.rand(N) < 0.8
    now = reference.linear_logprobs(hidden, weight, targets).logprobs
    rows = (targets, now + 0.3 * torch.randn(N), torch.randn(N))
    given = {k: TENSORS[k](now) if x is True else x for k, x in options.items()}
    given = {"denom": 30.0, "mask": mask} | given

    def here(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    given = {k: here(x) for k, x in given.items()}
    leaves = {"hidden": hidden, "weight": weight}
    leaves |= {"bias": given.pop("bias")} if "bias" in given else {}
    found = []
    for f, more in ((gk.linear_policy_loss, {"backend": backend}), (composed, {})):
        own = {k: here(x).clone().requires_grad_() for k, x in leaves.items()}
        rest = given | more | ({"bias": own["bias"]} if "bias" in own else {})
        with gk.workspace(20_000):
            out = f(own["hidden"], own["weight"], *map(here, rows), **rest)
        gradients = torch.autograd.grad(out.loss, list(own.values()))
        found.append({"loss": out.loss, **out.metrics, **dict(zip(own, gradients))})
    fused, apart = found
    assert fused.keys() == apart.keys()
    for name, x in apart.items():
        scale = x.abs().max().clamp(min=0.1)
        assert (fused[name] - x).abs().max() <= 2e-5 * scale, name
    assert any(g.abs().max() > 0 for g in gradients)
