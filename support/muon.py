"""The optimiser Muon, for parameters of any shape: PyTorch's own takes matrices only, and computes in bfloat16.

A file of its own, since nothing here is about segmentation.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised: equally long in every direction, even where gradients are small.

    By Jordan et al. (2024), with Nesterov momentum; the steps' length matches AdamW's (Liu et al. 2025). A parameter
    (out, ...) counts as a matrix with `out` rows, a vector as one column; Jordan leaves vectors and the last layer to
    AdamW. PyTorch's own Muon takes matrices only, and computes in bfloat16, which most CPUs merely emulate.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step against the gradients. `closure` is part of PyTorch's interface, and not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # the loss does not depend on it
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"])
                matrix = orthogonalize(direction.reshape(len(direction), -1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(matrix.view_as(parameter), alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Keep the singular vectors of a matrix (R, C), but bring all but its tiniest singular values to 0.7 to 1.2.

    Five Newton-Schulz iterations X <- a X + b (X X') X + c (X X')^2 X, with Jordan's coefficients. All factors are
    polynomials in the small X X', so they are multiplied first, and the large X once, at the end.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)  # now no singular value is above 1
    gram = matrix @ matrix.T  # X X', (R, R)
    identity = product = torch.eye(len(gram), device=gram.device)
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix
