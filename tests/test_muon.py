"""The optimiser Muon, against PyTorch's own and the singular value decomposition."""

import pytest
import torch
from torch import nn

from support.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=["wide", "tall"])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    """The oracle is PyTorch's singular value decomposition."""
    torch.manual_seed(0)
    u, values, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.1, 5, len(values))
    levelled = u.T @ orthogonalize(u * values @ v) @ v.T
    assert 0.8 < levelled.diagonal().min() <= levelled.diagonal().max() < 1.1
    assert (levelled - levelled.diagonal().diag()).abs().max() < 1e-3


def test_orthogonalize_in_bfloat16_levels_nearly_as_well():
    torch.manual_seed(0)
    matrix = torch.randn(70, 150)
    exact, rounded = (orthogonalize(matrix, dtype) for dtype in (torch.float32, torch.bfloat16))
    values = torch.linalg.svdvals(rounded)
    assert 0.8 < values.min() <= values.max() < 1.25
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.999


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_orthogonalize_bears_a_gradient_of_any_size(scale):
    torch.manual_seed(0)
    assert orthogonalize(scale * torch.randn(70, 90), torch.bfloat16).norm().isfinite()


def test_muon_steps_as_pytorchs_own_does_on_the_flattened_kernel():
    """PyTorch's computes in bfloat16 and levels less well: hence the tolerances."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(32, 16, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    start = matrix.detach().clone()
    ours = Muon([kernel], lr=0.01, weight_decay=0.5)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1)
        ours.step()
        theirs.step()
    moved = (kernel.detach().flatten(1) - start).flatten()
    expected = (matrix.detach() - start).flatten()
    assert torch.cosine_similarity(moved, expected, 0) > 0.998
    assert 0.9 < moved.norm() / expected.norm() < 1.15


def test_muon_steps_alike_however_the_weights_lie_in_memory():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(start.clone(memory_format=memory_format))
        kernel.grad = gradient.clone(memory_format=memory_format)
        Muon([kernel], lr=0.1).step()
        ends.append(kernel.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_muon_moves_a_vector_as_far_whatever_its_gradients_scale(scale):
    vector = nn.Parameter(torch.zeros(100))
    vector.grad = scale * torch.linspace(-1, 1, 100)
    Muon([vector], lr=0.01, weight_decay=0.0).step()
    assert 0.99 < vector.detach().square().mean().sqrt() / (0.2 * 0.01) < 1.01
    assert torch.equal(vector.sign(), -vector.grad.sign())


def test_muon_leaves_a_parameter_without_gradient_alone():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    used.sum().backward()
    Muon([used, unused], lr=0.1).step()
    assert unused.eq(1).all()
    assert not used.eq(1).any()
