"""Muon for CPUs that would emulate the bfloat16 in which PyTorch's own orthogonalizes."""

from collections.abc import Callable

import torch
from torch import Tensor


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """float32 [M, N] -> nearly the nearest matrix with orthonormal rows or columns, [M, N].

    Newton and Schulz's iteration with Jordan's quintic (https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, in float32; the state is alike."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step with the parameters' gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[parameter], parameter.grad
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = orthogonal(
                    grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"]
                )
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * lr * max(parameter.shape) ** 0.5)
