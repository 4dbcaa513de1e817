"""The optimiser Muon, for parameters of any shape and in any precision."""

from collections.abc import Iterable

import torch
from torch import Tensor

# a, b and c of three Newton-Schulz iterations, found by a search for those that bring the singular
# values together fastest.
COEFFICIENTS = ((7.7110, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.5940, 0.4107))


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised: equally long in every direction.

    By Jordan et al. (2024), with Nesterov momentum; the steps' length matches AdamW's (Liu et al.
    2025). A parameter (out, ...) counts as a matrix with `out` rows, a vector as one column; Jordan
    leaves vectors and the last layer to AdamW. PyTorch's own Muon takes matrices only, and computes
    in bfloat16, which most CPUs merely emulate: here `precision` says in what the large products
    are computed.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step against the gradients; `closure` is PyTorch's, and not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # the loss does not depend on it
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"])
                # In the order of the axes in memory, nothing has to be copied.
                order = sorted(range(direction.ndim), key=direction.stride, reverse=True)
                direction = direction.permute(order)
                matrix = orthogonalize(direction.reshape(len(direction), -1), self.precision)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 * group["lr"] * max(matrix.shape) ** 0.5
                parameter.permute(order).sub_(matrix.reshape(direction.shape), alpha=length)


def orthogonalize(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Bring all but the tiniest singular values of a matrix (R, C) near 1; keep its vectors.

    Newton-Schulz iterations X <- a X + b (X X') X + c (X X')^2 X. All factors are polynomials in
    the small X X', so they are multiplied first, and the large X once, at the end. They need
    singular values of at most 1; the root of the norm of (X X')^2 is a closer bound of X X' than
    the norm of X is of X. It is X X' that is divided, not the large X.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T, precision).T
    if len(matrix) == 1:
        return matrix / (matrix.norm() + 1e-7)
    if len(matrix) < 64:
        precision = torch.float32  # products this small gain nothing
    matrix = matrix.to(precision)
    gram = times(matrix, matrix.T, precision)  # X X', (R, R)
    size = gram.trace() + 1e-14
    gram /= size
    square = times(gram, gram, precision)
    bound = square.norm().sqrt() + 1e-12
    factor = factors(gram / bound, square / bound**2, precision)
    return times(factor / (size * bound).sqrt(), matrix, precision)


def factors(gram: Tensor, square: Tensor, precision: torch.dtype, steps=COEFFICIENTS) -> Tensor:
    """Return the product of all iterations' factors a I + b X X' + c (X X')^2."""
    (a, b, c), *others = steps
    factor = b * gram + c * square
    factor.diagonal().add_(a)
    if not others:
        return factor
    gram = times(times(factor, gram, precision), factor, precision)
    square = times(gram, gram, precision)
    return times(factors(gram, square, precision, others), factor, precision)


def times(a: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """Return a @ b in float32, computed in `precision`."""
    return (a.to(precision) @ b.to(precision)).float()
