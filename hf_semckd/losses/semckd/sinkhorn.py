"""Association weights under a bound on what each teacher layer gives in all."""

from __future__ import annotations

import torch
from torch import Tensor

# Cosines over 0.02 differ by up to 50: divided by 64, they can be balanced at once.
SINKHORN_STAGES = 7

SINKHORN_ROUNDS = 5


def sinkhorn_weights(scores: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Return softmax over t of scores, with the total weight of each teacher layer bounded.

    Layers that are like all others (the first of a CNN, say) would else teach every student layer. Here a teacher
    layer weighs at most max(1, S / T) in all, summed over student layers; a layer that no student layer resembles
    still gets nothing. These are the weights of the largest sum_st w_st * scores_st plus their entropy under that
    bound, found by scaling rows and columns in turn: first for scores divided by 64, which takes few rounds, then by
    32, and so on. Rows add up to 1; columns keep the bound as closely as the rounds have come.

    Args:
        scores: (B, S, T).
        rounds: How often rows and columns are scaled at every stage; twice as often at the last.

    Returns:
        (B, S, T).

    Source: Chizat et al., "Scaling algorithms for unbalanced optimal transport problems", 2018.
    """
    bound = max(1.0, scores.shape[1] / scores.shape[2])
    held = torch.zeros_like(scores[:, :1])
    for halvings in reversed(range(SINKHORN_STAGES)):
        drawn = scores / 2**halvings
        for _ in range(rounds if halvings else 2 * rounds):
            taken = torch.softmax(drawn + held, dim=-1).sum(1, keepdim=True)
            # The bound lowers scores and never raises them: a layer that gets nothing (log 0) stays at 0.
            held = torch.sub(held, taken.div_(bound).log_()).clamp_(max=0.0)
        if halvings:
            held = 2 * held
    return torch.softmax(scores + held, dim=-1)
