"""What a step computes, and the memory that computing takes beside the runtime's own. Pure.

[Note: operations] A token costs 2 operations for each parameter it is multiplied with, forward, and twice
that backward; every unit is recomputed in backward, which is a second forward: 8 in all (6 without).
Attention adds 4 x length x width a layer forward, for scores and for values, and four times that in all.
Nothing is taken off for a causal mask. Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery
et al. 2022, arXiv 2204.02311, appendix B.

[Note: temporaries] An estimate: torch's own, which no lease counts. A unit's backward keeps about
10 x hidden + 4 x intermediate elements a token (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1,
with attention that never writes its scores, and a gated MLP). The whole batch has four tensors of the
hidden width between two units. Where the loss is not computed in chunks of tokens, logits of the whole batch
exist at once (`units.logits_nbytes`). Where units were cut into parts, autograd keeps what lies between the
parts of every layer from forward to backward, for the whole batch: of a gated MLP both projections and the
activation.
"""

from __future__ import annotations

from ..units import logits_nbytes
from .model import ModelFacts

__all__ = ["step_flops", "temporaries_nbytes"]

# Forward, its recomputation, and a backward of twice the work.
_FORWARDS = 4


def step_flops(model: ModelFacts, batch: int, length: int) -> tuple[int, int]:
    """Return the operations of a step: those with parameters, and those of attention."""
    tokens = batch * length
    products = 2 * _FORWARDS * model.multiplied_numel * tokens
    attention = 4 * _FORWARDS * model.num_layers * model.attention_width * length * tokens
    return products, attention


def temporaries_nbytes(
    model: ModelFacts, batch: int, rows: int, length: int, itemsize: int, *, full_logits: bool
) -> int:
    """Return the device bytes of activations and logits; see [Note: temporaries].

    Args:
        rows: of a micro-batch.
        itemsize: bytes of an element in the compute dtype.
        full_logits: the logits of the whole batch exist at once.
    """
    tokens = batch * length
    between = tokens * (4 * model.hidden_size + model.between_width) * itemsize
    inside = rows * length * (10 * model.hidden_size + 4 * model.intermediate_size) * itemsize
    logits = logits_nbytes(tokens, model.vocab_size, itemsize) if full_logits else 0
    return between + max(inside, logits)
