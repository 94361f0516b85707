"""AdamW with moments of 8 bits and masters of 16: torch's steps within their precision."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.trainer import children, tiny
from trainer import parallel
from trainer.config import Trainer
from trainer.models import loading
from trainer.runs.adam import LeanAdamW, stochastic
from trainer.runs.optim import Optimizer
from trainer.runs.state import filled, flat


def steps(trainer, dtype=torch.float32, count=60, resume_at=None, lr=3e-3):
    """A regression, whose gradients differ in size by thousands; its weights and its losses."""
    torch.manual_seed(0)
    start, target = torch.randn(7, 600), torch.randn(7, 600)
    size = 10 ** torch.linspace(-3, 0, 600)
    p = torch.nn.Parameter(start.to(dtype))

    def fresh():
        options = {"weight_decay": 0.1, "name": "p", "trainer": trainer}
        return Optimizer([(lr, [p])], grad_clip=1e9, **options)

    optimizer, losses = fresh(), []
    for step in range(count):
        if step == resume_at:
            kept = {name: x.clone() for name, x in flat(optimizer.state_dict()).items()}
            optimizer = fresh()
            optimizer.load_state_dict(filled(optimizer.state_dict(), kept))
        loss = (size * (p.float() - target)).square().sum() / 2
        loss.backward()
        optimizer.step(step)
        losses.append(float(loss))
    return p.detach(), losses


def test_eight_bits_go_where_float32_goes():
    want, losses = steps(None)
    found, theirs = steps(Trainer(optimizer="adamw8bit"))
    moved = (want - steps(None, count=0)[0]).norm()
    assert (found - want).norm() < 0.1 * moved
    assert theirs[-1] == pytest.approx(losses[-1], rel=0.005)
    assert losses[-1] < 0.9 * losses[0]


def test_without_codes_it_is_torchs():
    """The arithmetic itself: float32 moments, which bfloat16 masters have."""
    p, q = (torch.nn.Parameter(torch.arange(12.0).view(3, 4) / 7) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = LeanAdamW([{"params": [p], **options}], (0.9, 0.95), 1e-8, False, "p")
    theirs = torch.optim.AdamW([{"params": [q], **options}], betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        for x in (p, q):
            x.grad = torch.sin(torch.arange(12.0).view(3, 4) + step)
        ours.step(), theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_bfloat16_masters_add_up_what_nearest_rounding_drops():
    """Steps of a hundredth of what a bfloat16 number can say."""
    trainer = Trainer(masters="bfloat16")
    want, _ = steps(None, count=300, lr=3e-5)
    start, _ = steps(None, count=0)
    found, _ = steps(trainer, torch.bfloat16, count=300, lr=3e-5)
    assert found.dtype == torch.bfloat16
    along = ((found.float() - start) * (want - start)).sum() / (want - start).square().sum()
    assert 0.9 < along < 1.1
    plain = start.bfloat16()
    for _ in range(300):
        plain = (plain.float() + (want - start) / 300).bfloat16()
    kept = ((plain.float() - start) * (want - start)).sum() / (want - start).square().sum()
    assert kept < 0.1


def test_stochastic_rounding_is_right_on_average_and_to_a_neighbour():
    x = torch.linspace(-3, 3, 4001)
    draws = torch.Generator().manual_seed(0)
    many = torch.stack([stochastic(x, draws) for _ in range(400)]).float()
    ulp = 2.0 ** (x.abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((many - x).abs() < ulp).all()
    assert ((many.mean(0) - x).abs() < 0.15 * ulp).all()


@pytest.mark.parametrize(
    "trainer, dtype",
    [
        (Trainer(optimizer="adamw8bit"), torch.float32),
        (Trainer(optimizer="adamw8bit", masters="bfloat16"), torch.bfloat16),
    ],
)
def test_a_resumed_run_has_the_same_bits(trainer, dtype):
    want, _ = steps(trainer, dtype)
    assert torch.equal(want, steps(trainer, dtype, resume_at=30)[0])


def sharded(output):
    """A weight of uneven shards, updated on two ranks."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole, grads = torch.randn(5, 300), torch.randn(4, 5, 300)
    p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = Optimizer([(0.01, [p])], trainer=Trainer(optimizer="adamw8bit"))
    alone = torch.nn.Parameter(whole.clone())
    other = Optimizer([(0.01, [alone])], trainer=Trainer(optimizer="adamw8bit"))
    for step, grad in enumerate(grads):
        p.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step(step)
        alone.grad = grad / parallel.world_size()  # it is summed over ranks
        other.step(step)
    torch.testing.assert_close(parallel.whole(p.detach()), alone.detach())
    state = flat(optimizer.state_dict())
    mine = flat(other.state_dict())
    for name in ("0/exp_avg", "0/exp_avg_sq_scale"):
        torch.testing.assert_close(parallel.whole(state[name]), mine[name])


def test_codes_and_scales_are_sharded_as_the_weights_are(tmp_path):
    assert children.run_ranks(2, sharded, tmp_path) == [0, 0]


def test_what_is_trained_may_wait_in_the_cpus_memory(base):
    """In bfloat16, as on a GPU: a step there is the same step."""
    found = []
    for where in ("adamw", "offload"):
        config = tiny.config("unused", "model.dtype=bfloat16", f"trainer.optimizer={where}")
        policy = loading.load_policy(str(base.model("sft")), config, trained=True)
        optimizer = Optimizer.of(
            config.sft, [(1e-2, policy.parameters())], _guard(), "p", config.trainer
        )
        for step in range(2):
            for p in policy.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step(step)
        found.append([parallel.whole(p.detach()) for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def _guard():
    from trainer.runs.faults import Guard

    return Guard(1)
