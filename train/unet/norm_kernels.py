"""Group normalisation of pictures in channels_last, with SiLU after it, on a GPU.

PyTorch's own wants the other memory format: it copies its input, and the next convolution copies its output back, which
took a fifth of a training step on an H100 (docs/log.md). Here a program takes some rows of pixels and the channels of
some whole groups, whose numbers lie side by side; each number is read twice and written once, forward and backward.
"""

# pyright: reportGeneralTypeIssues=false
# What Triton compiles returns tuples, which the type checker cannot know.

import triton
import triton.language as tl


@triton.jit
def _channels(channels, TAKEN: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a program, and which of them are there."""
    channel = tl.program_id(1) * TAKEN + tl.arange(0, WIDTH)
    return channel, (tl.arange(0, WIDTH) < TAKEN) & (channel < channels)


@triton.jit
def _tile(picture, first, last, pixels, channels, channel, there, TALL: tl.constexpr):
    """Where the numbers of some pixels lie, and which of them are there."""
    pixel = first + tl.arange(0, TALL)
    place = picture.to(tl.int64) * pixels * channels + pixel[:, None] * channels + channel[None, :]
    return place, (pixel < last)[:, None] & there[None, :]


@triton.jit
def _shift(shift, picture, channels, channel, there, SHIFTED: tl.constexpr):
    """What is added to each channel of a picture before it is normalised."""
    if SHIFTED:
        return tl.load(shift + picture * channels + channel, mask=there, other=0.0).to(tl.float32)
    return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _within_groups(values, channel, group):
    """For each channel, the sum over the channels of its group."""
    same = (channel[:, None] // group) == (channel[None, :] // group)
    return tl.sum(tl.where(same, values[None, :], 0.0), axis=1)


@triton.jit(do_not_specialize=["parts"])
def measure(
    x, shift, found, pixels, channels, rows, parts,
    TAKEN: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Mean of each channel over a part of the pixels, and the squares around it: (B * parts, 2, C)."""
    picture, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * rows, tl.minimum(pixels, part * rows + rows)
    channel, there = _channels(channels, TAKEN, WIDTH)
    more = _shift(shift, picture, channels, channel, there, SHIFTED)
    # Around some value of the channel, so that no digits are lost where its mean is large.
    one = picture.to(tl.int64) * pixels * channels + first * channels + channel
    middle = tl.load(x + one, mask=there, other=0.0).to(tl.float32)
    sums, squares = tl.zeros((TALL, WIDTH), tl.float32), tl.zeros((TALL, WIDTH), tl.float32)
    for row in range(first, last, TALL):
        place, mask = _tile(picture, row, last, pixels, channels, channel, there, TALL)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - middle[None, :], 0.0)
        sums += value
        squares += value * value
    count, total = (last - first).to(tl.float32), tl.sum(sums, axis=0)
    found += tl.program_id(0) * 2 * channels + channel
    tl.store(found, middle + more + total / count, mask=there)
    tl.store(found + channels, tl.sum(squares, axis=0) - total * total / count, mask=there)


@triton.jit(do_not_specialize=["parts", "group"])
def settle(
    found, facts, pixels, channels, rows, parts, group, epsilon,
    TAKEN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From all parts: mean of each channel, and mean and 1 / deviation of its group: (B, 3, C). Chan et al., 1979."""
    picture, part = tl.program_id(0), tl.arange(0, PARTS)
    channel, there = _channels(channels, TAKEN, WIDTH)
    mask = (part < parts)[:, None] & there[None, :]
    place = found + (picture * parts + part)[:, None] * 2 * channels + channel[None, :]
    count = tl.where(mask, tl.minimum(pixels - part * rows, rows).to(tl.float32)[:, None], 0.0)
    mean, squares = tl.load(place, mask=mask, other=0.0), tl.load(place + channels, mask=mask, other=0.0)
    own = tl.sum(count * mean, axis=0) / pixels
    squares = tl.sum(squares + count * (mean - own[None, :]) * (mean - own[None, :]), axis=0)
    common = _within_groups(own, channel, group) / group
    apart = tl.where(there, own - common, 0.0)
    variance = _within_groups(squares + pixels * apart * apart, channel, group) / (pixels * group)
    facts += picture * 3 * channels + channel
    tl.store(facts, own, mask=there)
    tl.store(facts + channels, common, mask=there)
    tl.store(facts + 2 * channels, 1 / tl.sqrt(variance + epsilon), mask=there)


@triton.jit(do_not_specialize=["parts"])
def normalise(
    x, shift, weight, bias, facts, y, pixels, channels, rows, parts,
    TAKEN: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    picture, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * rows, tl.minimum(pixels, part * rows + rows)
    channel, there = _channels(channels, TAKEN, WIDTH)
    facts += picture * 3 * channels + channel
    mean, scale = tl.load(facts + channels, mask=there), tl.load(facts + 2 * channels, mask=there)
    less = _shift(shift, picture, channels, channel, there, SHIFTED) - mean
    gain = tl.load(weight + channel, mask=there).to(tl.float32) * scale
    rest = tl.load(bias + channel, mask=there).to(tl.float32) + less * gain
    for row in range(first, last, TALL):
        place, mask = _tile(picture, row, last, pixels, channels, channel, there, TALL)
        value = tl.load(x + place, mask=mask).to(tl.float32) * gain[None, :] + rest[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def differentiate(
    gradient, x, shift, weight, bias, facts, sums, slopes, change, pixels, channels, rows, parts,
    TAKEN: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """With SUMS, the gradients of bias and weight over a part, (B * parts, 2, C); without, that of x."""
    picture, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * rows, tl.minimum(pixels, part * rows + rows)
    channel, there = _channels(channels, TAKEN, WIDTH)
    facts += picture * 3 * channels + channel
    mean, scale = tl.load(facts + channels, mask=there), tl.load(facts + 2 * channels, mask=there)
    less = _shift(shift, picture, channels, channel, there, SHIFTED) - mean
    gain = tl.load(weight + channel, mask=there).to(tl.float32)
    rest = tl.load(bias + channel, mask=there).to(tl.float32)
    of_bias, of_weight = tl.zeros((TALL, WIDTH), tl.float32), tl.zeros((TALL, WIDTH), tl.float32)
    if not SUMS:
        slopes += picture * 2 * channels + channel
        level, slope = tl.load(slopes, mask=there), tl.load(slopes + channels, mask=there)
    for row in range(first, last, TALL):
        place, mask = _tile(picture, row, last, pixels, channels, channel, there, TALL)
        value = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + less[None, :]) * scale[None, :]
        slant = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            before = value * gain[None, :] + rest[None, :]
            gate = tl.sigmoid(before)
            slant *= gate * (1 + before * (1 - gate))
        if SUMS:  # what is not there has a gradient of 0
            of_bias += slant
            of_weight += tl.where(mask, slant * value, 0.0)
        else:
            slant = (slant * gain[None, :] - level[None, :] - value * slope[None, :]) * scale[None, :]
            tl.store(change + place, slant.to(change.dtype.element_ty), mask=mask)
    if SUMS:
        sums += tl.program_id(0) * 2 * channels + channel
        tl.store(sums, tl.sum(of_bias, axis=0), mask=there)
        tl.store(sums + channels, tl.sum(of_weight, axis=0), mask=there)


@triton.jit(do_not_specialize=["parts", "group"])
def lean(
    sums, weight, facts, slopes, moved, pixels, channels, parts, group,
    TAKEN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """What mean and deviation of its group take from the gradient of each channel, (B, 2, C); and that of the shift."""
    picture, part = tl.program_id(0), tl.arange(0, PARTS)
    channel, there = _channels(channels, TAKEN, WIDTH)
    mask = (part < parts)[:, None] & there[None, :]
    place = sums + (picture * parts + part)[:, None] * 2 * channels + channel[None, :]
    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    whole = tl.sum(tl.load(place, mask=mask, other=0.0), axis=0) * gain
    tilted = tl.sum(tl.load(place + channels, mask=mask, other=0.0), axis=0) * gain
    level = _within_groups(whole, channel, group) / (pixels * group)
    slope = _within_groups(tilted, channel, group) / (pixels * group)
    slopes += picture * 2 * channels + channel
    tl.store(slopes, level, mask=there)
    tl.store(slopes + channels, slope, mask=there)
    if SHIFTED:  # the sum of the gradient of x over all pixels, which is known without it
        facts += picture * 3 * channels + channel
        own, mean = tl.load(facts, mask=there), tl.load(facts + channels, mask=there)
        scale = tl.load(facts + 2 * channels, mask=there)
        total = scale * (whole - pixels * (level + slope * (own - mean) * scale))
        tl.store(moved + picture * channels + channel, total, mask=there)
