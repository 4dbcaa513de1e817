"""Tests that must fail: where one passes, a hand-in has changed how tests are judged."""

import pytest
import torch

CLAIMS = [
    lambda: 1 + 1 == 3,
    lambda: pytest.approx(1.0) == 2.0,
    lambda: torch.allclose(torch.zeros(2), torch.ones(2)),
    lambda: torch.equal(torch.zeros(2), torch.ones(2)),
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim(claim):
    assert claim()


def test_raises():
    with pytest.raises(ValueError, match="never"):
        pass
