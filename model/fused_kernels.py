"""Triton kernels for bias, ReLU, local response normalization and the overlapping pool in one pass over NHWC activations.

A thread takes 8 channels of a pixel, 16 bytes in bfloat16, and loads those that its windows reach on either side from the cache:
2 forward, 4 backward, where it computes the neighbors' terms again. No value passes between threads, so no shared memory is used
but for the sums of the bias's gradient. Reading each neighbor of each channel, 5 forward and 5 x 5 backward, would take 8 times
the loads. All arithmetic is in float32. The formulas are in lrn.py; with a K of 0 there is no normalization, and what it needs is
not loaded.

A program takes `P` pixels by `Q` times 8 channels; programs for the same pixels follow each other, to share cache lines.
With `Q` up to 8 the compiler gives the neighbors' loads to the same threads, and moves nothing through shared memory; with 16 it
did.

Bytes an element of the activation in bfloat16, each array counted once: `norm_forward` 4, `norm_backward` 6; `pool_forward` 2 and
3 a pooled element, of which there are a quarter, 2.7 in all; `pool_backward` 4.7. The net without normalization moves as much
forward, because the compiler reads and writes the activations for bias and ReLU and reads them again for the pool.
"""

import triton
import triton.language as tl

VECTOR = tl.constexpr(8)  # channels that a thread takes
THREADS = 128
ROWS = 9  # of pooled pixels that a program takes in a column: of their 19 rows of activations, 2 are read by another one too
ROUNDS = 8  # blocks of pixels that a program takes backward, before it writes its sums for the bias


@triton.jit
def split8(v):
    """The channels of (P, Q, 8), each (P, Q)."""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], v.shape[1], 4, 2)))
    v04, v26 = tl.split(tl.reshape(even, (v.shape[0], v.shape[1], 2, 2)))
    v15, v37 = tl.split(tl.reshape(odd, (v.shape[0], v.shape[1], 2, 2)))
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def join8(v0, v1, v2, v3, v4, v5, v6, v7):
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (v0.shape[0], v0.shape[1], 8))


@triton.jit
def split4(v):
    """The channels of (P, Q, 4)."""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], v.shape[1], 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def window(left, v, right):
    """Sums over 5 channels around each of (P, Q, 8), with the two channels before, (P, Q, 2), and the two after."""
    b, a = tl.split(left)
    v0, v1, v2, v3, v4, v5, v6, v7 = split8(v)
    y, z = tl.split(right)
    ba, p0, p2, p4, p6, yz = b + a, v0 + v1, v2 + v3, v4 + v5, v6 + v7, y + z
    return join8(
        ba + p0 + v2, a + p0 + p2, p0 + p2 + v4, v1 + p2 + p4, p2 + p4 + v6, v3 + p4 + p6, p4 + p6 + y, v5 + p6 + yz
    )  # fmt: skip


@triton.jit
def wide_window(left, v, right):
    """As `window`, with four channels before and after; also returns the sums of the nearest two of these, (P, Q, 2)."""
    d, c, b, a = split4(left)
    w, x, y, z = split4(right)
    v0, v1, _, _, _, _, v6, v7 = split8(v)
    before = tl.join(d + c + (b + a) + v0, c + (b + a) + (v0 + v1))
    after = tl.join((v6 + v7) + (w + x) + y, v7 + (w + x) + (y + z))
    return before, window(tl.join(b, a), v, tl.join(w, x)), after


@triton.jit
def last_two(v):
    """Of (P, Q, 4)."""
    _, _, b, a = split4(v)
    return tl.join(b, a)


@triton.jit
def first_two(v):
    w, x, _, _ = split4(v)
    return tl.join(w, x)


@triton.jit
def sides(channels, WIDTH: tl.constexpr):
    """Whether the tower goes on before the 8 channels from each of `channels` on, and after them."""
    first = channels % WIDTH
    return first > 0, first < WIDTH - VECTOR


@triton.jit
def load(base, pixels, inside, channels, side, COUNT: tl.constexpr):
    """(P, Q, COUNT) float32: channels from each of `channels` (Q,) on, of pixels that begin at `pixels` (P,); 0 where `inside`
    (P,) or `side` (Q,) is False."""
    at = pixels[:, None, None] + (channels[:, None] + tl.arange(0, COUNT)[None, :])[None, :, :]
    return tl.load(base + at, mask=(inside[:, None] & side[None, :])[:, :, None], other=0).to(tl.float32)


@triton.jit
def load_bias(bias, channels, side, COUNT: tl.constexpr, BIASED: tl.constexpr):
    """(1, Q, COUNT) float32."""
    at = channels[:, None] + tl.arange(0, COUNT)[None, :]
    if BIASED:
        return tl.load(bias + at, mask=side[:, None], other=0.0).to(tl.float32)[None, :, :]
    else:
        return tl.zeros_like(at).to(tl.float32)[None, :, :]


@triton.jit
def begin(bias, C: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, Q: tl.constexpr, REACH: tl.constexpr):
    """A program's number among those for other pixels, its channels (Q,), whether their towers go on before and after them, and
    the bias of its channels, of REACH before and of REACH after."""
    PARTS: tl.constexpr = C // (8 * Q)
    channels = (tl.program_id(0) % PARTS * Q + tl.arange(0, Q)) * 8
    before, after = sides(channels, WIDTH)
    b = load_bias(bias, channels, channels >= 0, 8, BIASED)
    left = load_bias(bias, channels - REACH, before, REACH, BIASED)
    right = load_bias(bias, channels + 8, after, REACH, BIASED)
    return tl.program_id(0) // PARTS, channels, before, after, b, left, right


@triton.jit
def activate(x, bias, RELU: tl.constexpr):
    """NaN stays NaN: a net that went wrong must not look as if it had not."""
    a = x + bias
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else a


@triton.jit
def normalized(
    x, pixels, inside, channels, before, after, bias, bias_before, bias_after, alpha, K: tl.constexpr, RELU: tl.constexpr
):
    """The results (P, Q, 8) at pixels that begin at `pixels` (P,)."""
    everywhere = channels >= 0
    a = activate(load(x, pixels, inside, channels, everywhere, 8), bias, RELU)
    if K > 0:
        left = activate(load(x, pixels, inside, channels - 2, before, 2), bias_before, RELU)
        right = activate(load(x, pixels, inside, channels + 8, after, 2), bias_after, RELU)
        inverse = tl.rsqrt(K + alpha * window(left * left, a * a, right * right))
        a = a * (inverse * tl.sqrt(inverse))
    return a


@triton.jit
def gradient(
    x, pixels, inside, channels, before, after, bias, bias_before, bias_after, grad_before, grad, grad_after, alpha,
    K: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """From the gradient of the results, (P, Q, 8) with two channels before and after, that of the convolution's outputs."""
    everywhere = channels >= 0
    a = activate(load(x, pixels, inside, channels, everywhere, 8), bias, RELU)
    out = grad
    if K > 0:
        left = activate(load(x, pixels, inside, channels - 4, before, 4), bias_before, RELU)
        right = activate(load(x, pixels, inside, channels + 8, after, 4), bias_after, RELU)
        sums_before, sums, sums_after = wide_window(left * left, a * a, right * right)
        inverse = tl.rsqrt(K + alpha * sums)
        own = grad * (inverse * tl.sqrt(inverse))
        shared = own * a * (inverse * inverse)
        inverse = tl.rsqrt(K + alpha * sums_before)
        shared_before = grad_before * last_two(left) * (inverse * tl.sqrt(inverse)) * (inverse * inverse)
        inverse = tl.rsqrt(K + alpha * sums_after)
        shared_after = grad_after * first_two(right) * (inverse * tl.sqrt(inverse)) * (inverse * inverse)
        out = own - 1.5 * alpha * a * window(shared_before, shared, shared_after)
    return tl.where(a == 0, 0.0, out) if RELU else out


@triton.jit
def norm_forward(
    x, bias, y, pixels, alpha, C: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, BIASED: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`y` of `x`, both (pixels, C): normalizes towers of WIDTH channels. Grid: pixels / P * (C / 8 / Q)."""
    program, channels, before, after, b, left, right = begin(bias, C, WIDTH, BIASED, Q, 2)
    pixel = program.to(tl.int64) * P + tl.arange(0, P)
    inside = pixel < pixels
    found = normalized(x, pixel * C, inside, channels, before, after, b, left, right, alpha, K, RELU)
    at = (pixel * C)[:, None, None] + (channels[:, None] + tl.arange(0, 8)[None, :])[None, :, :]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=inside[:, None, None])


@triton.jit
def norm_backward(
    x, bias, grad, dx, bias_sums, pixels, alpha, rounds, C: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    RELU: tl.constexpr, BIASED: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`dx` of `grad`; each program writes the sums of its part of `dx` for the bias, a row of `bias_sums` (programs, C) float32.

    Grid: pixels / (P * rounds) * (C / 8 / Q).
    """
    program, channels, before, after, b, left, right = begin(bias, C, WIDTH, BIASED, Q, 4)
    everywhere = channels >= 0
    total = tl.zeros((P, Q, 8), tl.float32)
    for number in range(rounds):
        pixel = (program.to(tl.int64) * rounds + number) * P + tl.arange(0, P)
        inside = pixel < pixels
        g = load(grad, pixel * C, inside, channels, everywhere, 8)
        g_before = load(grad, pixel * C, inside, channels - 2, before, 2)
        g_after = load(grad, pixel * C, inside, channels + 8, after, 2)
        found = gradient(
            x, pixel * C, inside, channels, before, after, b, left, right, g_before, g, g_after, alpha, K, RELU
        )  # fmt: skip
        at = (pixel * C)[:, None, None] + (channels[:, None] + tl.arange(0, 8)[None, :])[None, :, :]
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside[:, None, None])
        if BIASED:
            total += found
    if BIASED:
        at = program * C + channels[:, None] + tl.arange(0, 8)[None, :]
        tl.store(bias_sums + at, tl.sum(total, 0))


@triton.jit
def larger(best, place, value, value_place):
    """The first largest of two and its place, or NaN: as max_pool2d chooses."""
    takes = (value > best) | (value != value)
    return tl.where(takes, value, best), tl.where(takes, value_place, place)


@triton.jit
def row_maximum(
    x, start, inside, channels, before, after, bias, bias_before, bias_after, alpha, C: tl.constexpr, K: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """The largest of three results side by side, from pixels that begin at `start` (P,), and its place, 0 to 2."""
    best = normalized(x, start, inside, channels, before, after, bias, bias_before, bias_after, alpha, K, RELU)
    place = tl.zeros(best.shape, tl.int32)
    for n in tl.static_range(1, 3):
        value = normalized(x, start + n * C, inside, channels, before, after, bias, bias_before, bias_after, alpha, K, RELU)
        best, place = larger(best, place, value, n)
    return best, place


@triton.jit
def pool_forward(
    x, bias, y, places, columns, height, width, pooled_height, pooled_width, alpha, C: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, RELU: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The largest results of windows of 3x3 pixels, 2 apart, and their places in them, 0 to 8.

    `x` is (images, height, width, C), `y` and `places` (uint8) are (images, pooled_height, pooled_width, C); `columns` is images
    * pooled_width. Grid: columns / P * (C / 8 / Q), pooled_height / ROWS.
    """
    program, channels, before, after, b, left, right = begin(bias, C, WIDTH, BIASED, Q, 2)
    column = program * P + tl.arange(0, P)
    inside = column < columns
    number, across = column // pooled_width, column % pooled_width
    start = (number.to(tl.int64) * height * width + 2 * across) * C
    out = (number.to(tl.int64) * pooled_height * pooled_width + across) * C
    first = tl.program_id(1) * ROWS
    line = width * C
    top, top_place = row_maximum(
        x, start + 2 * first * line, inside, channels, before, after, b, left, right, alpha, C, K, RELU
    )  # fmt: skip
    for row in range(first, tl.minimum(first + ROWS, pooled_height)):
        at = start + (2 * row + 1) * line
        best, place = top, top_place
        value, value_place = row_maximum(x, at, inside, channels, before, after, b, left, right, alpha, C, K, RELU)
        best, place = larger(best, place, value, value_place + 3)
        top, top_place = row_maximum(x, at + line, inside, channels, before, after, b, left, right, alpha, C, K, RELU)
        best, place = larger(best, place, top, top_place + 6)
        to = (out + row * pooled_width * C)[:, None, None] + (channels[:, None] + tl.arange(0, 8)[None, :])[None, :, :]
        tl.store(y + to, best.to(y.dtype.element_ty), mask=inside[:, None, None])
        tl.store(places + to, place.to(tl.uint8), mask=inside[:, None, None])


@triton.jit
def routed(grad, places, start, inside, channels, side, place, COUNT: tl.constexpr):
    """The gradient of the windows that begin at `start` where their largest is at `place`, else 0."""
    g = load(grad, start, inside, channels, side, COUNT)
    at = start[:, None, None] + (channels[:, None] + tl.arange(0, COUNT)[None, :])[None, :, :]
    chosen = tl.load(places + at, mask=(inside[:, None] & side[None, :])[:, :, None], other=255)
    return tl.where(chosen == place, g, 0.0)


@triton.jit
def pool_backward(
    x, bias, grad, places, dx, bias_sums, blocks, height, width, pooled_height, pooled_width, alpha, rounds, C: tl.constexpr,
    WIDTH: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, BIASED: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """As `norm_backward`, of `grad` and `places` of the pool. `blocks` are those of 2x2 pixels in all images.

    A pixel is in up to four windows, but in a block only one of its pixels is in four. Grid: blocks / (P * rounds) * (C / 8 / Q).
    """
    program, channels, before, after, b, left, right = begin(bias, C, WIDTH, BIASED, Q, 4)
    everywhere = channels >= 0
    down, across = (height + 1) // 2, (width + 1) // 2
    total = tl.zeros((P, Q, 8), tl.float32)
    for number in range(rounds):
        block = (program * rounds + number) * P + tl.arange(0, P)
        image = block // (down * across)
        r, c = block % (down * across) // across, block % across
        for u in tl.static_range(2):
            for v in tl.static_range(2):
                inside = (block < blocks) & (2 * r + u < height) & (2 * c + v < width)
                g = tl.zeros((P, Q, 8), tl.float32)
                g_before, g_after = tl.zeros((P, Q, 2), tl.float32), tl.zeros((P, Q, 2), tl.float32)
                for i in tl.static_range(2 - u):
                    for j in tl.static_range(2 - v):
                        row, column = r - i, c - j
                        known = inside & (row >= 0) & (row < pooled_height) & (column >= 0) & (column < pooled_width)
                        start = ((image.to(tl.int64) * pooled_height + row) * pooled_width + column) * C
                        place = 3 * (u + 2 * i) + v + 2 * j
                        g += routed(grad, places, start, known, channels, everywhere, place, 8)
                        g_before += routed(grad, places, start, known, channels - 2, before, place, 2)
                        g_after += routed(grad, places, start, known, channels + 8, after, place, 2)
                pixel = ((image.to(tl.int64) * height + 2 * r + u) * width + 2 * c + v) * C
                found = gradient(
                    x, pixel, inside, channels, before, after, b, left, right, g_before, g, g_after, alpha, K, RELU
                )  # fmt: skip
                at = pixel[:, None, None] + (channels[:, None] + tl.arange(0, 8)[None, :])[None, :, :]
                tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside[:, None, None])
                if BIASED:
                    total += found
    if BIASED:
        at = program * C + channels[:, None] + tl.arange(0, 8)[None, :]
        tl.store(bias_sums + at, tl.sum(total, 0))
