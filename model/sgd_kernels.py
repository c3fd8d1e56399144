"""A Triton kernel for the update of SGD with the learning rate and momentum in memory, where a CUDA graph reads them anew.

Bytes a weight, in float32: 20, as torch's fused SGD: it reads weight, gradient and momentum, and writes the first and the last.
"""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def update(weight, grad, gathered, settings, decay, count, BLOCK: tl.constexpr):
    """`settings` are the learning rate and momentum. Grid: count / BLOCK."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    rate, momentum = tl.load(settings), tl.load(settings + 1)
    w = tl.load(weight + n, mask=inside)
    b = tl.load(gathered + n, mask=inside) * momentum + (tl.load(grad + n, mask=inside) + decay * w)
    tl.store(gathered + n, b, mask=inside)
    tl.store(weight + n, w - rate * b, mask=inside)
