"""vocab_group= and DTensor heads on gloo ranks, against the whole head: values and gradients.

Four processes run every check once; a test reads what they said of its check. Groups of two and of
three ranks have parts of different sizes, one of them empty.
"""

import importlib
import os
import sys
import traceback

import pytest
import torch

import gikernels
from bench.ops import memory
from bench.ops import split as split_bench
from gikernels import Support
from tests.forkserver import context, started

WORLD = 4
D, V, N = 12, 97, 19
# Rows of each rank's part, in rank order.
PARTS = {"two": [60, 37], "three": [50, 0, 47]}


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    lengths = torch.tensor([(0, 4, V - 2)[i % 3] for i in range(N)])
    ids = torch.cat([torch.randperm(V, generator=g)[:k] for k in lengths.tolist()])
    support = Support(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), ids)
    targets = torch.randint(V, (N,), generator=g)
    some = lengths > 0
    targets[some] = ids[support.offsets[:-1][some]]
    targets[4] = -100
    return {
        "hidden": normal(N, D), "weight": normal(V, D) / 2, "bias": normal(V),
        "ref": (normal(N, 7), normal(V, 7)), "temperature": normal(N).abs() + 0.5,
        "targets": targets, "support": support,
        "old": normal(N).float() - 4, "ref_logprobs": normal(N).float() - 4,
        "advantages": normal(N).float(), "mask": targets >= 0,
    }  # fmt: skip


def upstream(stats):
    g = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(N, generator=g)).sum() for x in stats if x is not None)


def part_of(p, name, rank):
    start = sum(PARTS[name][:rank])
    rows = slice(start, start + PARTS[name][rank])
    mine = {"weight": p["weight"][rows], "bias": p["bias"][rows]}
    return p | mine | {"ref": (p["ref"][0], p["ref"][1][rows])}, rows


OPTIONS = {
    "plain": (),
    "bias_ref": ("bias", "ref"),
    "support": ("support", "temperature"),
    "most": ("bias", "ref", "support", "temperature"),
}


def statistics(p, options, **extra):
    leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    given = {k: p[k] for k in options if k != "bias"}
    if "bias" in options:
        given |= {"bias": leaves[2], "softcap": 5.0, "logit_scale": 0.8}
    stats = gikernels.linear_logprobs(*leaves[:2], p["targets"], **given, **extra)
    count = 2 + ("bias" in options)
    return stats, torch.autograd.grad(upstream(stats), leaves[:count])


def close(got, want, tol=2e-6):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            size = b.detach().abs().max().item() if b.numel() else 0
            torch.testing.assert_close(a, b, rtol=tol, atol=tol * (size + 1))


def check_statistics(groups, rank):
    """Each option, on two and on three ranks: every rank the same, dW its own rows."""
    p = problem()
    for name, group in groups.items():
        if group is None:
            continue
        for options in OPTIONS.values():
            mine, rows = part_of(p, name, torch.distributed.get_rank(group))
            whole, (dx, *of_vocabulary) = statistics(p, options)
            got, gradients = statistics(mine, options, vocab_group=group)
            close(got, whole)
            close(gradients, [dx, *(x[rows] for x in of_vocabulary)], 5e-6)


def check_16_bits(groups, rank):
    """Errors against float64 at most twice those of the whole head."""
    p = problem(torch.bfloat16)
    exact = {
        k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in p.items()
    }
    exact["ref"] = tuple(x.double() for x in p["ref"])
    group = groups["three"]
    if group is None:
        return
    mine, rows = part_of(p, "three", rank)
    got, gradients = statistics(mine, OPTIONS["most"], vocab_group=group)
    whole, all_gradients = statistics(p, OPTIONS["most"])
    truth, true_gradients = statistics(exact, OPTIONS["most"])
    cut = [slice(None), rows, rows]
    for a, b, want in (
        *zip(got, whole, truth),
        *((a, b[c], w[c]) for a, b, w, c in zip(gradients, all_gradients, true_gradients, cut)),
    ):
        bound = 2 * (b.double() - want).abs().max() if b.numel() else torch.zeros(())
        assert a.numel() == 0 or (a.double() - want).abs().max() <= bound + 4e-3 * want.abs().max()


LOSSES = {
    "plain": {},
    "k1_entropy": {"kl_coef": 0.1, "kl_estimator": "k1", "entropy_coef": 0.1},
    "k2_softcap": {"kl_coef": 0.2, "kl_estimator": "k2", "softcap": 5.0, "dual_clip": 2.0},
    "k3_support": {"kl_coef": 0.2, "entropy_coef": 0.1, "support": True},
}


def policy_loss(p, options, **extra):
    leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    options = dict(options)
    if options.pop("support", False):
        extra["support"] = p["support"]
    loss, metrics = gikernels.linear_policy_loss(
        *leaves[:2], p["targets"].clamp(min=0), p["old"], p["advantages"], mask=p["mask"],
        denom=20.0, ref_logprobs=p["ref_logprobs"], temperature=p["temperature"], bias=leaves[2],
        **options, **extra,
    )  # fmt: skip
    return [loss, *metrics.values()], torch.autograd.grad(loss, leaves)


def check_policy_loss(groups, rank):
    p = problem()
    for name, group in groups.items():
        if group is None:
            continue
        for options in LOSSES.values():
            mine, rows = part_of(p, name, torch.distributed.get_rank(group))
            whole, (dx, dw, db) = policy_loss(p, options)
            got, gradients = policy_loss(mine, options, vocab_group=group)
            close(got, whole, 1e-5)
            close(gradients, [dx, dw[rows], db[rows]], 1e-5)


def check_dtensor(groups, rank):
    """Shard(0), uneven, is taken by itself; hidden sharded over the sequence is gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    p = problem()
    whole, (dx, dw, db) = statistics(p, OPTIONS["most"])
    names = ("weight", "bias")
    for placement in (Shard(0), Replicate()):
        weight, bias = (distribute_tensor(p[k], mesh, [placement]).requires_grad_() for k in names)
        ref = (p["ref"][0], distribute_tensor(p["ref"][1], mesh, [placement]))
        hidden = distribute_tensor(p["hidden"], mesh, [Shard(0)]).requires_grad_()
        got = gikernels.linear_logprobs(
            hidden.redistribute(placements=[Replicate()]), weight, p["targets"], p["temperature"],
            bias=bias, ref=ref, softcap=5.0, logit_scale=0.8, support=p["support"],
        )  # fmt: skip
        close(got, whole)
        gradients = torch.autograd.grad(upstream(got), [hidden, weight, bias])
        assert [g.placements for g in gradients] == [(Shard(0),), (placement,), (placement,)]
        close([g.full_tensor() for g in gradients], [dx, dw, db], 5e-6)
    loss, gradients = policy_loss(p, LOSSES["k1_entropy"])
    sharded = {k: distribute_tensor(p[k], mesh, [Shard(0)]) for k in names}
    got, parts = policy_loss(p | sharded, LOSSES["k1_entropy"])
    close(got, loss, 1e-5)
    close([g.full_tensor() for g in parts[1:]], gradients[1:], 1e-5)


def check_other_placements_raise(groups, rank):
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    p = problem()
    mesh, two = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2))
    plain = (p["hidden"], p["targets"])
    other = torch.distributed.new_group(list(range(WORLD)))

    def head(weight, **others):
        gikernels.linear_logprobs(plain[0], weight, plain[1], **others)

    sharded = distribute_tensor(p["weight"], mesh, [Shard(0)])
    for call, named in (
        (lambda: head(distribute_tensor(p["weight"], mesh, [Shard(1)])), r"weight.*Shard\(dim=1\)"),
        (lambda: head(DTensor.from_local(p["weight"], mesh, [Partial()])), "weight.*Partial"),
        (lambda: head(distribute_tensor(p["weight"], two, [Shard(0), Replicate()])), "weight.*one"),
        (lambda: head(p["weight"], bias=distribute_tensor(p["bias"], mesh, [Shard(0)])), "bias"),
        (lambda: head(sharded, bias=distribute_tensor(p["bias"], mesh, [Replicate()])), "bias"),
        (lambda: head(sharded, vocab_group=other), "vocab_group"),
        (lambda: head(p["weight"], vocab_group="tp"), "vocab_group"),
        (
            lambda: gikernels.linear_logprobs(
                distribute_tensor(p["hidden"], mesh, [Shard(0)]), sharded, p["targets"]
            ),
            "hidden.*redistribute",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            call()


def check_fsdp_and_tensor_parallel(groups, rank):
    """FSDP2 over one dimension of a 2 x 2 mesh, the vocabulary over the other."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False)

        def forward(self, x, targets):
            hidden = self.body(x).tanh()
            return gikernels.linear_logprobs(hidden, self.head.weight, targets)

    def split(name, module, mesh):
        weight = distribute_tensor(module.weight.detach(), mesh, [Shard(0)])
        module.weight = torch.nn.Parameter(weight)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, model = Model(), Model()
    distribute_module(model.head, mesh["tp"], split)
    fully_shard(model, mesh=mesh["dp"])
    p = problem()
    rows = slice(0, 10) if mesh["dp"].get_local_rank() == 0 else slice(10, N)
    got = model(p["hidden"][rows], p["targets"][rows])
    want = whole(p["hidden"], p["targets"])
    close([x[rows] for x in want[:2]], got[:2])
    (got.logprobs.sum() + got.entropy.sum()).backward()
    (want.logprobs.sum() + want.entropy.sum()).backward()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        close([a.grad.full_tensor()], [b.grad / 2], 5e-6)  # FSDP's mean over two


def check_verls_fused_head(groups, rank):
    """Its signature under tensor parallelism: a part of the head, a group, labels of the whole."""
    from tests.integrations import test_verl

    if not test_verl.REAL:
        sys.modules.update(test_verl.stand_in())
    verl = importlib.import_module("gikernels.integrations.verl")
    p, group = problem(), groups["two"]
    if group is None:
        return
    mine, rows = part_of(p, "two", rank)
    hidden, weight, part = (
        x.clone().requires_grad_() for x in (p["hidden"], p["weight"], mine["weight"])
    )
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    labels = p["targets"].clamp(min=0)
    want = logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    got = verl.linear_cross_entropy(hidden, part, labels, 0.7, "none", group)
    close(got, want)
    dx, dw = torch.autograd.grad(upstream(want), [hidden, weight])
    close(torch.autograd.grad(upstream(got), [hidden, part]), [dx, dw[rows]], 5e-6)


def check_compiled(groups, rank):
    """In one graph; the log-probabilities, and the loss with a support."""
    p, group = problem(), groups["three"]
    if group is None:
        return
    mine, _ = part_of(p, "three", rank)

    def f(hidden):
        out = gikernels.linear_logprobs(hidden, mine["weight"], p["targets"], vocab_group=group)
        return out.logprobs.sum() + 2 * out.entropy.sum()

    def loss(hidden):
        return gikernels.linear_policy_loss(
            hidden, mine["weight"], p["targets"].clamp(min=0), p["old"], p["advantages"],
            mask=p["mask"], denom=20.0, support=p["support"], entropy_coef=0.1, vocab_group=group,
        ).loss  # fmt: skip

    hidden = p["hidden"].requires_grad_()
    for eager in (f, loss):
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        want = torch.autograd.grad(eager(hidden), hidden)
        close(torch.autograd.grad(compiled(hidden), hidden), want)


def check_opcheck(groups, rank):
    p, group = problem(), groups["two"]
    if group is None:
        return
    mine, _ = part_of(p, "two", rank)
    leaves = [mine[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    torch.library.opcheck(
        torch.ops.gikernels.linear_logprobs_parts,
        (
            *leaves[:2], p["targets"], 1.0, p["temperature"], leaves[2], 5.0, 0.8, *mine["ref"],
            -100, *p["support"], group.group_name, "reference",
        ),
    )  # fmt: skip


def check_who_communicates(groups, rank):
    """Nobody without a group; with one: sizes, statistics, dhidden."""
    made = []
    names = [
        n for n in dir(torch.distributed) if n.startswith(("all_", "broadcast", "reduce", "gather"))
    ]
    kept = {n: getattr(torch.distributed, n) for n in names}
    for n, f in kept.items():
        if callable(f):
            setattr(torch.distributed, n, lambda *a, n=n, f=f, **k: made.append(n) or f(*a, **k))
    try:
        p = problem()
        statistics(p, OPTIONS["most"])
        policy_loss(p, LOSSES["k3_support"])
        assert not made
        if groups["two"] is not None:
            statistics(part_of(p, "two", rank)[0], OPTIONS["most"], vocab_group=groups["two"])
            assert made == ["all_gather"] * 2 + ["all_reduce"]
    finally:
        for n, f in kept.items():
            setattr(torch.distributed, n, f)


def check_other_rows_raise(groups, rank):
    """As those of data-parallel ranks, whose weight FSDP has sharded."""
    p, group = problem(), groups["two"]
    if group is None:
        return
    mine, _ = part_of(p, "two", rank)
    for targets, hidden in (
        (p["targets"].flip(0), p["hidden"]),
        (p["targets"][:9], p["hidden"][:9]),
    ):
        q = mine | {"targets": targets, "hidden": hidden} if rank else mine
        with pytest.raises(ValueError, match=r"vocab_group: .*forward"):
            statistics(q, (), vocab_group=group)


def check_memory(groups, rank):
    """Forward and backward take each of two ranks at most 0.6 of what the whole takes one."""
    if groups["two"] is None:
        return

    def extra_memory(vocab, **extra):
        run = split_bench.step(1024, 256, vocab, **extra)
        return memory.counted(run)

    split = extra_memory(32768 // 2, vocab_group=groups["two"])
    if rank == 0:
        whole = extra_memory(32768)
        assert 0.4 * whole < split <= 0.6 * whole, (split, whole)


def check_targets_are_global(groups, rank):
    p, group = problem(), groups["two"]
    if group is None:
        return
    mine, _ = part_of(p, "two", rank)
    p["targets"][0] = V
    with pytest.raises(ValueError, match=f"targets: .*< {V}"):
        statistics(mine | {"targets": p["targets"]}, (), vocab_group=group)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


def as_rank(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    groups = {}
    for name, sizes in PARTS.items():
        group = torch.distributed.new_group(list(range(len(sizes))))
        groups[name] = group if rank < len(sizes) else None
    for name, check in CHECKS.items():
        said = ""
        try:
            check(groups, rank)
        except BaseException:
            said = traceback.format_exc()
        with open(f"{folder}/{name}.{rank}", "w") as file:
            file.write(said)
        if said:
            os._exit(1)  # the others may be waiting for this rank
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What ranks said of a check; one that failed ends them all."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [context.Process(target=as_rank, args=(r, str(folder))) for r in range(WORLD)]
    for process in started(ranks):
        process.join(400)
        process.kill()
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_ranks(name, reports):
    files = [reports / f"{name}.{rank}" for rank in range(WORLD)]
    said = [file.read_text() for file in files if file.exists()]
    assert not any(said), "\n".join(said)
    assert len(said) == WORLD, "another check failed before, and ended the ranks"
