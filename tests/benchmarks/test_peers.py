"""The benchmark compares like with like: every implementation gives the same value and the same gradients."""

import dataclasses

import pytest
import torch

from tests.benchmarks.cases import LossCase, errors, expected, forward_backward, make_inputs
from tests.benchmarks.peers import PEERS

TOLERANCE = 5e-6  # of float32 sums over a few hundred words


def loss_and_inputs(name: str, case: LossCase):
    peer = PEERS[name]
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    inputs = make_inputs(case)
    return forward_backward(peer, case, inputs)(), inputs


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.compiled])
def test_an_implementation_gives_the_reference_value_and_gradients(name, beta):
    case = LossCase(tokens=48, vocab=300, beta=beta, student_hidden=16, teacher_hidden=24, kd_weight=0.7, ce_weight=0.3)
    loss, inputs = loss_and_inputs(name, case)
    found = errors(inputs, loss, expected(case, inputs, block=7))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.compiled])
def test_rows_that_are_not_supervised_get_no_gradient(name):
    case = LossCase(tokens=12, vocab=40, student_hidden=8, teacher_hidden=8)
    _, inputs = loss_and_inputs(name, case)
    assert torch.count_nonzero(inputs.student_hidden.grad[::2]) == 0
    assert torch.count_nonzero(inputs.student_hidden.grad[1::2]) > 0


def test_a_swapped_beta_would_be_seen():
    case = LossCase(tokens=48, vocab=300, beta=0.9, student_hidden=16, teacher_hidden=24, kd_weight=0.7, ce_weight=0.3)
    inputs = make_inputs(case)
    straight, swapped = expected(case, inputs), expected(dataclasses.replace(case, beta=0.1), inputs)
    assert abs(straight.loss - swapped.loss) / straight.loss > 50 * TOLERANCE
