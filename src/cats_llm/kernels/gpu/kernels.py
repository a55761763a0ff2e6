"""The kernels, in Triton: the stages of a sparse MLP, a linear layer, and the element-wise step of prefill (README.md).

Shapes: n tokens, d hidden size, f neurons. Sizes, strides and the places in the workspace are compile-time constants: a
model has one or two MLP shapes, and constants make every access as wide as it can be.
"""

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    """Acc + a b, accumulated in float32, without tf32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation in float32. NaN stays NaN."""
    if ACTIVATION == "silu":
        y = tl.math.div_rn(x, 1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z), without the cancellation
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = tl.math.div_rn(x, 1.0 + tl.exp(-2.0 * z))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0.0, 0.0, x)
    return y


@triton.jit
def _at(workspace, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """A place in the workspace as a pointer to elements of a type."""
    return (workspace + OFFSET).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def _row_dots(
    x, w, rows, in_bounds, D: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dot products of rows of w (BLOCK_R of them, those in bounds) with every token, float32 (BLOCK_R, PAD)."""
    row_starts = rows.to(tl.int64)[:, None] * STRIDE
    token = tl.arange(0, PAD)
    if TOKENS == 1:
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((BLOCK_R, PAD), tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if D % BLOCK_K == 0:
            mask = in_bounds[:, None]
        else:
            mask = in_bounds[:, None] & (k < D)[None, :]
        # read once a token: what other kernels share should stay in the L2 cache instead
        wk = tl.load(w + row_starts + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if TOKENS == 1:
            if D % BLOCK_K == 0:
                xk = tl.load(x + k)
            else:
                xk = tl.load(x + k, mask=k < D, other=0.0)
            acc += wk.to(tl.float32) * xk.to(tl.float32)[None, :]
        else:
            inside = (token < TOKENS)[None, :] & (k < D)[:, None]
            xk = tl.load(x + token[None, :] * D + k[:, None], mask=inside, other=0.0)
            acc = _dot(wk, xk, acc)
    if TOKENS == 1:
        return tl.sum(acc, axis=1)[:, None]
    else:
        return acc


@triton.jit
def gate(
    x, w, bias, threshold, workspace,
    D: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_NEURON: tl.constexpr, ACTIVATION: tl.constexpr,
    ACTIVATIONS_AT: tl.constexpr, ACTIVE_AT: tl.constexpr, COUNTS_AT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stage 1: gate products of BLOCK_R neurons, activation, threshold, and the list of the block's active neurons."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype = x.dtype.element_ty
    block = tl.program_id(0)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_bounds = rows < F
    token = tl.arange(0, PAD)
    z = _row_dots(x, w, rows, in_bounds, D, STRIDE, TOKENS, PAD, BLOCK_R, BLOCK_K, STAGES)
    if HAS_BIAS:
        z += tl.load(bias + rows, mask=in_bounds, other=0.0).to(tl.float32)[:, None]
    # the threshold is compared on the activation in float32 of the gate rounded to the model's dtype
    a = _activate(z.to(dtype).to(tl.float32), ACTIVATION)
    if PER_NEURON:
        t = tl.load(threshold + rows, mask=in_bounds, other=0.0)[:, None]
    else:
        t = tl.load(threshold)
    # written so that NaN is kept
    a = tl.where(tl.abs(a) < t, 0.0, a).to(dtype)
    real = in_bounds[:, None] & (token < TOKENS)[None, :]
    tl.store(_at(workspace, ACTIVATIONS_AT, dtype) + token[None, :] * F + rows[:, None], a, mask=real)
    active = tl.max(((a != 0.0) & real).to(tl.int32), axis=1)
    place = tl.cumsum(active, axis=0) - active
    tl.store(_at(workspace, ACTIVE_AT, tl.int32) + block * BLOCK_R + place, rows, mask=active > 0)
    tl.store(_at(workspace, COUNTS_AT, tl.int32) + block, tl.sum(active, axis=0))


@triton.jit
def _share(
    workspace, ACTIVE_AT: tl.constexpr, COUNTS_AT: tl.constexpr, ORDER_AT: tl.constexpr, TOTAL_AT: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_BLOCKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    PROGRAMS: tl.constexpr, SHARE_PAD: tl.constexpr,
):  # fmt: skip
    """An equal share [first, last) of all active neurons, which this program writes into the common list."""
    program = tl.program_id(0)
    order = _at(workspace, ORDER_AT, tl.int32)
    active = _at(workspace, ACTIVE_AT, tl.int32)
    # ends of the gate blocks' shares of the common list, SPAN blocks a row
    block = tl.arange(0, SPANS * SPAN)
    counts = tl.load(_at(workspace, COUNTS_AT, tl.int32) + block, mask=block < GATE_BLOCKS, other=0)
    ends = tl.reshape(tl.cumsum(counts, axis=0), (SPANS, SPAN))
    total = tl.sum(counts, axis=0)
    if program == 0:
        tl.store(_at(workspace, TOTAL_AT, tl.int32), total)
    first = (program * total) // PROGRAMS
    last = ((program + 1) * total) // PROGRAMS
    # for every place in this program's share: the block it is in, by row of blocks first
    place = first + tl.arange(0, SHARE_PAD)
    span_ends = tl.max(ends, axis=1)
    passed = span_ends[None, :] <= place[:, None]
    span = tl.minimum(tl.sum(passed.to(tl.int32), axis=1), SPANS - 1)
    before = tl.max(tl.where(passed, span_ends[None, :], 0), axis=1)
    ends_there = tl.gather(ends, tl.broadcast_to(span[:, None], (SHARE_PAD, SPAN)), 0)
    passed = ends_there <= place[:, None]
    source = span * SPAN + tl.sum(passed.to(tl.int32), axis=1)
    before = tl.maximum(before, tl.max(tl.where(passed, ends_there, 0), axis=1))
    in_share = place < last
    neuron = tl.load(active + source * GATE_BLOCK + place - before, mask=in_share, other=0)
    tl.store(order + place, neuron, mask=in_share)
    tl.debug_barrier()  # what other threads wrote is read below
    return first, last


@triton.jit
def up(
    x, w, bias, workspace,
    D: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATIONS_AT: tl.constexpr, ACTIVE_AT: tl.constexpr, COUNTS_AT: tl.constexpr,
    ORDER_AT: tl.constexpr, TOTAL_AT: tl.constexpr, PRODUCTS_AT: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_BLOCKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    PROGRAMS: tl.constexpr, SHARE_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stage 2: the up products of an equal share of the active neurons, times their activations."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype = x.dtype.element_ty
    activations = _at(workspace, ACTIVATIONS_AT, dtype)
    order = _at(workspace, ORDER_AT, tl.int32)
    products = _at(workspace, PRODUCTS_AT, dtype)
    first, last = _share(
        workspace,
        ACTIVE_AT,
        COUNTS_AT,
        ORDER_AT,
        TOTAL_AT,
        GATE_BLOCK,
        GATE_BLOCKS,
        SPANS,
        SPAN,
        PROGRAMS,
        SHARE_PAD,
    )
    token = tl.arange(0, PAD)
    for start in range(first, last, BLOCK_R):
        position = start + tl.arange(0, BLOCK_R)
        in_bounds = position < last
        rows = tl.load(order + position, mask=in_bounds, other=0)
        z = _row_dots(x, w, rows, in_bounds, D, STRIDE, TOKENS, PAD, BLOCK_R, BLOCK_K, STAGES)
        if HAS_BIAS:
            z += tl.load(bias + rows, mask=in_bounds, other=0.0).to(tl.float32)[:, None]
        real = in_bounds[:, None] & (token < TOKENS)[None, :]
        a = tl.load(activations + token[None, :] * F + rows[:, None], mask=real, other=0.0).to(tl.float32)
        # a neuron that one token skips and another keeps cannot show its infinities to the one
        h = tl.where(a == 0.0, 0.0, a * z)
        tl.store(products + token[None, :] * F + position[:, None], h.to(dtype), mask=real)


@triton.jit
def down(
    w, workspace, y,
    D: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr,
    ORDER_AT: tl.constexpr, TOTAL_AT: tl.constexpr, PRODUCTS_AT: tl.constexpr, PARTIALS_AT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stage 3: a partial sum of BLOCK_K outputs, over an equal share of the active neurons' rows of W_down."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype = y.dtype.element_ty
    column_block = tl.program_id(0)
    split = tl.program_id(1)
    order = _at(workspace, ORDER_AT, tl.int32)
    products = _at(workspace, PRODUCTS_AT, dtype)
    partials = _at(workspace, PARTIALS_AT, tl.float32)
    total = tl.load(_at(workspace, TOTAL_AT, tl.int32))
    first = (split * total) // SPLITS
    last = ((split + 1) * total) // SPLITS
    k = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < D
    token = tl.arange(0, PAD)
    if TOKENS == 1:
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((PAD, BLOCK_K), tl.float32)
    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        position = start + tl.arange(0, BLOCK_R)
        in_bounds = position < last
        rows = tl.load(order + position, mask=in_bounds, other=0).to(tl.int64)
        if D % BLOCK_K == 0:
            wk = tl.load(w + rows[:, None] * STRIDE + k[None, :], mask=in_bounds[:, None], other=0.0)
        else:
            wk = tl.load(w + rows[:, None] * STRIDE + k[None, :], mask=in_bounds[:, None] & inside[None, :], other=0.0)
        if TOKENS == 1:
            h = tl.load(products + position, mask=in_bounds, other=0.0).to(tl.float32)
            acc += h[:, None] * wk.to(tl.float32)
        else:
            real = (token < TOKENS)[:, None] & in_bounds[None, :]
            h = tl.load(products + token[:, None] * F + position[None, :], mask=real, other=0.0)
            acc = _dot(h, wk, acc)
    if TOKENS == 1:
        acc = tl.sum(acc, axis=0)[None, :]
    out = token[:, None] * D + k[None, :]
    real = (token < TOKENS)[:, None] & inside[None, :]
    tl.store(partials + split * (TOKENS * D) + out, acc, mask=real)


@triton.jit
def reduce_partials(
    bias, y, workspace,
    D: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIALS_AT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Last stage: the sum of the partial outputs, always in the same order, rounded once."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < TOKENS * D
    if HAS_BIAS:
        # no kernel before this one writes it, so it comes while that one ends
        added = tl.load(bias + k % D, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    partials = _at(workspace, PARTIALS_AT, tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in tl.range(0, PARTS, BLOCK_R, num_stages=STAGES):
        part = start + tl.arange(0, BLOCK_R)
        mask = (part < PARTS)[:, None] & inside[None, :]
        acc += tl.load(partials + part[:, None] * (TOKENS * D) + k[None, :], mask=mask, other=0.0)
    result = tl.sum(acc, axis=0)
    if HAS_BIAS:
        result += added
    tl.store(y + k, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear(
    x, w, bias, y,
    D: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``y = x w^T + bias`` for F outputs, BLOCK_R of them a program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_bounds = rows < F
    token = tl.arange(0, PAD)
    z = _row_dots(x, w, rows, in_bounds, D, STRIDE, TOKENS, PAD, BLOCK_R, BLOCK_K, STAGES)
    if HAS_BIAS:
        z += tl.load(bias + rows, mask=in_bounds, other=0.0).to(tl.float32)[:, None]
    real = in_bounds[:, None] & (token < TOKENS)[None, :]
    tl.store(y + token[None, :] * F + rows[:, None], z.to(y.dtype.element_ty), mask=real)


@triton.jit
def up_down(
    x, w_up, w_down, b_up, workspace,
    D: tl.constexpr, D_PAD: tl.constexpr, F: tl.constexpr, UP_STRIDE: tl.constexpr, DOWN_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATIONS_AT: tl.constexpr, ACTIVE_AT: tl.constexpr, COUNTS_AT: tl.constexpr, ORDER_AT: tl.constexpr,
    TOTAL_AT: tl.constexpr, PARTIALS_AT: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_BLOCKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    PROGRAMS: tl.constexpr, SHARE_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stages 2 and 3 in one for one token: whole rows of both matrices for an equal share of the active neurons."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype = x.dtype.element_ty
    activations = _at(workspace, ACTIVATIONS_AT, dtype)
    order = _at(workspace, ORDER_AT, tl.int32)
    first, last = _share(
        workspace,
        ACTIVE_AT,
        COUNTS_AT,
        ORDER_AT,
        TOTAL_AT,
        GATE_BLOCK,
        GATE_BLOCKS,
        SPANS,
        SPAN,
        PROGRAMS,
        SHARE_PAD,
    )
    k = tl.arange(0, D_PAD)
    inside = k < D
    xk = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, D_PAD), tl.float32)
    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        position = start + tl.arange(0, BLOCK_R)
        in_bounds = position < last
        rows = tl.load(order + position, mask=in_bounds, other=0)
        a = tl.load(activations + rows, mask=in_bounds, other=0.0).to(tl.float32)
        if D == D_PAD:
            mask = in_bounds[:, None]
        else:
            mask = in_bounds[:, None] & inside[None, :]
        row_starts = rows.to(tl.int64)[:, None]
        up_rows = tl.load(w_up + row_starts * UP_STRIDE + k[None, :], mask=mask, other=0.0)
        down_rows = tl.load(w_down + row_starts * DOWN_STRIDE + k[None, :], mask=mask, other=0.0)
        z = tl.sum(up_rows.to(tl.float32) * xk[None, :], axis=1)
        if HAS_BIAS:
            z += tl.load(b_up + rows, mask=in_bounds, other=0.0).to(tl.float32)
        h = (a * z).to(dtype).to(tl.float32)
        acc += h[:, None] * down_rows.to(tl.float32)
    partials = _at(workspace, PARTIALS_AT, tl.float32) + tl.program_id(0) * D
    tl.store(partials + k, tl.sum(acc, axis=0), mask=inside)


@triton.jit
def act_and_mul(
    gate, up, threshold, h,
    F: tl.constexpr, GATE_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr,
    PER_NEURON: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Prefill, between the matrix products: ``h = CATS_t(act(gate)) * up``, rounded where PyTorch rounds."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < F
    dtype = h.dtype.element_ty
    a = _activate(tl.load(gate + row * GATE_STRIDE + k, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if PER_NEURON:
        t = tl.load(threshold + k, mask=inside, other=0.0)
    else:
        t = tl.load(threshold)
    a = tl.where(tl.abs(a) < t, 0.0, a).to(dtype).to(tl.float32)
    u = tl.load(up + row * UP_STRIDE + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * F + k, (a * u).to(dtype), mask=inside)
