import math

import pytest
import torch

from shared.objectives.supervised import SUPERVISED, supervised_loss


def test_nll_by_hand():
    logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss = SUPERVISED["nll"](logp)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(2), math.log(4)]))
    assert logp.grad.tolist() == [-1.0, -1.0]


def test_dft_by_hand():
    logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss = SUPERVISED["dft"](logp)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.5 * math.log(2), 0.25 * math.log(4)]))
    torch.testing.assert_close(logp.grad, torch.tensor([-0.5, -0.25]))  # the weight p has no gradient of its own


def test_unknown_name_lists_the_known():
    assert supervised_loss("dft") is SUPERVISED["dft"]
    with pytest.raises(ValueError, match="nll, dft"):
        supervised_loss("focal")
