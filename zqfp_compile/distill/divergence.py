"""How far one model's predictions are from another's."""

from __future__ import annotations

import torch

# Logits at once.
_BLOCK = 1 << 22


@torch.no_grad()
def divergence(teacher: torch.Tensor, student: torch.Tensor, *, gradient: bool = False) -> float:
    """Return the sum over positions of KL(teacher || student), nats.

    Args:
        teacher: Logits [..., V], any float type; float32 for a gradient.
        student: Logits of the same shape.
        gradient: Overwrite ``teacher`` with the gradient by ``student``, so that it takes no more memory.
    """
    total = 0.0
    goals, found = teacher.view(-1, teacher.shape[-1]), student.reshape(-1, student.shape[-1])
    step = max(1, _BLOCK // teacher.shape[-1])
    for start in range(0, len(goals), step):
        block = goals[start : start + step]
        log_p = torch.log_softmax(block.float(), dim=-1)
        log_q = torch.log_softmax(found[start : start + step].float(), dim=-1)
        p = log_p.exp()
        total += float((p * (log_p - log_q)).sum(dtype=torch.float64))
        if gradient:
            torch.sub(log_q.exp_(), p, out=block)
    return total
