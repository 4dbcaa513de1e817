"""Tests that must fail: where one passes, a hand-in has changed how tests are judged."""

import pytest
import torch


def test_assertion():
    assert 1 + 1 == 3


def test_raises():
    with pytest.raises(ValueError, match="never"):
        pass


def test_approx():
    assert pytest.approx(1.0) == 2.0


def test_allclose():
    assert torch.allclose(torch.zeros(2), torch.ones(2))


def test_equal():
    assert torch.equal(torch.zeros(2), torch.ones(2))
