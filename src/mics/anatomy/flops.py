"""FLOPs of a model and what share of a GPU's peak they use (MFU), defined once.

``mics train``, its dry run, ``mics plan`` and ``mics bench dilated`` all count here.

Model FLOPs are those of the matrix products in one forward and one backward pass, 2 m n k each, as
a trace of the model sees them. A lookup in an embedding is no product, and an expert counts for the
rows that are sent to it. Attention counts as fused kernels compute it (FlashAttention, Dao et al.,
2022): a causal mask halves it, because the scores it hides are not computed, and its backward pass
is five products for the forward pass' two, because the scores are computed again. What activation
checkpointing computes again counts in hardware FLOPs (HFU) and not in model FLOPs (MFU).

Other programs print 6 N + 12 L h s FLOPs per token (PaLM, Chowdhery et al., 2022, appendix B). That
formula counts causal attention in full, the backward pass of attention as four products, and norms
and biases as if they were multiplied.
"""

from __future__ import annotations

from mics.anatomy.trace import Trace


def model_flops(made: Trace) -> int:
    """FLOPs of the model in one micro-step of one GPU, forward and backward."""
    return made.flops("forward") + made.flops("backward")


def hardware_flops(made: Trace, *, checkpointing: bool) -> int:
    """FLOPs that a GPU computes in one micro-step; checkpointing computes blocks' forward again."""
    return model_flops(made) + (made.recomputed_flops if checkpointing else 0)


def block_forward_flops(made: Trace, block: int = 0) -> int:
    """FLOPs of the forward pass of one block in one micro-step."""
    segments = [s for s in made.segments if s.unit == block and s.direction == "forward"]
    return sum(operator.flops for segment in segments for operator in segment.operators)


def utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """The share of a GPU's peak that its FLOPs use: MFU of model FLOPs, HFU of hardware FLOPs.

    Args:
        flops: what one GPU computes in a step.
        seconds: what the step takes.
        peak_flops: FLOPs per second of the GPU in the dtype of its products.
    """
    return flops / seconds / peak_flops
