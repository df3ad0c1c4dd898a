"""Association weights under a bound on what each teacher layer gives in all."""

import torch
from torch import Tensor

# Cosines over 0.02 differ by up to 50: divided by 64, they can be balanced at once.
SINKHORN_STAGES = 7
SINKHORN_ROUNDS = 5


def sinkhorn_weights(scores: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Return softmax over t of scores (B, S, T), with the total weight of each teacher layer at most max(1, S / T).

    Layers that are like all others (the first of a CNN, say) would else teach every student layer; a layer that no
    student layer resembles still gets nothing. These are the weights of the largest sum_st w_st * scores_st plus their
    entropy under that bound, found by scaling rows and columns in turn, `rounds` times at every stage and twice as
    often at the last: first for scores divided by 64, which takes few rounds, then by 32, and so on. Rows add up to 1;
    columns keep the bound as closely as the rounds have come.

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
