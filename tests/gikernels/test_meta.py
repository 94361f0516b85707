"""meta_ascent: where it goes, that it comes back, and what it leaves behind."""

import math
import os

import pytest
import torch
from torch import nn

import gikernels as gk
from tests.forkserver import context, started, wait


def model(dtype=torch.float64):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    return net, torch.randn(5, 3, dtype=dtype)


@pytest.mark.parametrize("normalise", [False, True])
def test_goes_and_comes_back(normalise):
    net, x = model()
    net(x).square().mean().backward()
    before = {n: (p.detach().clone(), p.grad.clone(), p.data_ptr()) for n, p in
              net.named_parameters()}  # fmt: skip
    norm = torch.cat([g.flatten() for _, g, _ in before.values()]).norm() if normalise else 1
    with gk.meta_ascent(net.parameters(), 0.3, normalise=normalise):  # a generator
        for name, p in net.named_parameters():
            theta, grad, _ = before[name]
            assert p.grad is None
            assert torch.allclose(p, theta + 0.3 * grad / norm, rtol=1e-12)
        loss = net(x).sum()
        loss.backward()
        inside = [p.grad.clone() for p in net.parameters()]
    for (name, p), grad in zip(net.named_parameters(), inside):
        theta, _, pointer = before[name]
        assert torch.equal(p, theta) and p.data_ptr() == pointer
        assert torch.equal(p.grad, grad)


def test_an_exception_restores():
    net, x = model(torch.float32)
    net(x).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyError), gk.meta_ascent(net.parameters(), 1.0):
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


def test_a_tied_parameter_moves_once_and_others_stay():
    tied, free, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    (tied.sum() + 2 * free.sum()).backward()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with gk.meta_ascent([tied, free, tied, unused, frozen], 0.5):
        assert torch.equal(tied, torch.full((2,), 1.5))
        assert torch.equal(free, torch.full((2,), 2.0))
        assert torch.equal(unused, torch.ones(2)) and torch.equal(frozen, torch.ones(2))
        (unused.sum() * 3).backward()
    assert torch.equal(unused.grad, torch.full((2,), 3.0)) and tied.grad is None


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_zero_moves_nothing_and_tiny_is_not_zero(size):
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), size)
    with gk.meta_ascent([p], 0.5, normalise=True):
        assert torch.allclose(p, torch.full((4,), 0.25 if size else 0.0))
    assert torch.equal(p, torch.zeros(4))


def test_bits_come_back_and_the_grads_given_are_left_alone():
    p = nn.Parameter(torch.tensor([math.nan, -0.0, math.inf, 1e-45]))
    given = torch.ones(4)
    p.grad = given
    bits = p.detach().view(torch.int32).clone()
    with gk.meta_ascent([p], 2.0):
        pass
    assert torch.equal(p.detach().view(torch.int32), bits)
    assert torch.equal(given, torch.ones(4))
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with gk.meta_ascent([half, p], 0.5):
        assert torch.equal(half, torch.full_like(half, 1.5))


def test_nothing_to_move():
    with gk.meta_ascent([], 1.0, normalise=True):
        pass


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("params", lambda: gk.meta_ascent(torch.zeros(3), 0.1)),
        ("params", lambda: gk.meta_ascent([1.0], 0.1)),
        ("lr", lambda: gk.meta_ascent([], math.nan)),
        ("lr", lambda: gk.meta_ascent([], "small")),
    ],
)
def test_refuses(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


def sharded_worker(rank, world, path, results):
    """Half of a model on each rank steps as the whole model does on one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    net, x = model(torch.float32)
    whole = [p.detach().clone() for p in net.parameters()]
    net(x).square().mean().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    norm = torch.cat([g.flatten() for g in grads]).norm()
    fully_shard(net)
    net(x).square().mean().backward()
    with gk.meta_ascent(net.parameters(), 0.3, normalise=True):
        inside = [p.full_tensor() for p in net.parameters()]
        net(x).sum().backward()
    after = [p.full_tensor() for p in net.parameters()]
    moved = all(
        torch.allclose(p, w + 0.3 * g / norm, atol=1e-6) for p, w, g in zip(inside, whole, grads)
    )
    restored = all(torch.equal(a, b) for a, b in zip(after, whole))
    kept = all(p.grad is not None for p in net.parameters())
    results.put((rank, moved, restored, kept))
    dist.destroy_process_group()


def test_sharded_parameters_share_one_norm(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    results = context.Queue()
    workers = [
        context.Process(target=sharded_worker, args=(rank, 2, tmp_path / "store", results))
        for rank in range(2)
    ]
    assert wait(started(workers), 120) == [0, 0]
    found = sorted(results.get(timeout=5) for _ in workers)
    assert found == [(0, True, True, True), (1, True, True, True)]
