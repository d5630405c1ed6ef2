"""The network: the untrained order, independent members, the chain, the gates, dropout."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from ranking.model import MMoE, RankerNet, RequestDropout, chain
from ranking.tasks import NO_PARENT


def net(trunk: Literal["shared", "mmoe"], members: int = 2, parents: tuple[int, ...] = (NO_PARENT, NO_PARENT)) -> RankerNet:
    return RankerNet(
        trunk=trunk,
        members=members,
        inputs=5,
        hidden=(8, 4),
        experts=3,
        base_logits=(-2.0, -1.0),
        parents=parents,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("trunk", ["shared", "mmoe"])
@pytest.mark.parametrize("parents", [(NO_PARENT, NO_PARENT), (NO_PARENT, 0)])
def test_an_untrained_net_orders_as_the_base(trunk: Literal["shared", "mmoe"], parents: tuple[int, ...]) -> None:
    base = torch.randn(50, generator=torch.Generator().manual_seed(1))
    logits = net(trunk, parents=parents)(base, torch.randn(50, 5))
    assert logits.shape == (2, 2, 50)
    for member in logits.reshape(4, 50):
        assert torch.equal(member.argsort(), base.argsort())
    torch.testing.assert_close(logits[0, 0], base - 2.0)


@pytest.mark.parametrize("trunk", ["shared", "mmoe"])
def test_members_do_not_see_each_other(trunk: Literal["shared", "mmoe"]) -> None:
    """The gradient of one member's output is zero in every other member's weights."""
    network = net(trunk, members=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    network(torch.randn(7), torch.randn(7, 5))[1].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        by_member = parameter.grad.reshape(3, -1).abs().sum(1)
        assert by_member[0] == by_member[2] == 0, name
        assert by_member[1] > 0, name


def test_the_chain_multiplies_probabilities() -> None:
    logits = torch.tensor([[[0.3, 30.0, -40.0], [-1.2, 25.0, -2.0], [2.0, 0.0, 1.0]]])
    found = torch.sigmoid(chain(logits, (NO_PARENT, 0, 1)))
    p = torch.sigmoid(logits)
    torch.testing.assert_close(found, p.cumprod(dim=1), rtol=1e-4, atol=1e-6)
    assert torch.isfinite(chain(logits, (NO_PARENT, 0, 1))).all()


def test_gates_start_even_and_are_per_task_after_training() -> None:
    trunk = MMoE(2, 3, 5, (4,), 4, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 5)
    assert trunk.gates(x).shape == (2, 3, 6, 4)
    torch.testing.assert_close(trunk.gates(x), torch.full((2, 3, 6, 4), 0.25))
    torch.nn.init.normal_(trunk.gate.weight)
    gates = trunk.gates(x)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3, 6))
    assert not torch.allclose(gates[:, 0], gates[:, 1])


def test_dropout_draws_one_mask_per_request_and_keeps_the_mean() -> None:
    index = torch.tensor([0, 0, 1])
    drop = RequestDropout(0.5, 2, index, torch.Generator().manual_seed(0))
    hidden = drop(torch.ones(1, 3, 4000))[0]
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])
    assert set(hidden.unique().tolist()) == {0.0, 2.0}
    assert float(hidden.mean()) == pytest.approx(1.0, abs=0.05)
