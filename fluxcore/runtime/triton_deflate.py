"""Rows of a picture compressed for a PNG file by the GPU: frequent values get short codes.

Owns a DEFLATE stream of literals alone, one dynamic block for each strip of rows. What a
photograph leaves behind its filter has no repetitions, so that all there is to win lies in the
codes; for pictures with large even areas ``app.engine.png`` does better. Code lengths are not
Huffman's, whose tree is made one node after the other: logarithms are rounded as far down as there
is room for, and what room is left goes where it fits. For residues of photographs that costs less
than 1 % of the file, for very smooth pictures 2 %, and for counts that are made for it more.

Source: RFC 1951, 3.2.7 (dynamic codes) and 3.2.2 (codes from their lengths); RFC 1950, 9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcore.runtime.triton_kernels import launch

PART = 2048
"""Bytes that one program counts, or writes."""
SYMBOLS = 512
"""Literals and the end of a block, which is 256, up to a power of two."""
WORD_BITS = 32
LEAST_SPARE = 64 * 1024
"""Bytes of a stream beyond those of the rows, for codes and for what none can shorten."""
LONGEST = tl.constexpr(15)
"""Bits of a code."""
ROOM = tl.constexpr(2**15)
"""What all codes share: one of so many bits takes ``ROOM >> bits`` of it."""
END = tl.constexpr(256)
HALVINGS = tl.constexpr(12)
HEADER = tl.constexpr(17 + 19 * 3 + 258 * 4)
"""Bits before a block's first code: numbers, lengths of the lengths' codes, lengths."""
LENGTHS_AT = tl.constexpr(17 + 19 * 3)
NUMBERS = tl.constexpr(2 << 1 | 15 << 13)
"""Dynamic codes; 257 of literals, one of distances, 19 of lengths."""


def deflate_lines(lines: Tensor, strip_rows: int) -> tuple[Tensor, Tensor]:
    """Rows as one DEFLATE stream, in memory for any but the worst; waits for nothing.

    Shapes: lines [height, 1 + 3 width] uint8 -> stream [bytes] uint8, told [3] int64: the stream's
    bits, which are its own only where they fit into it; the sum of all bytes; and the sum of
    those times how many there are from each on. The last two make the rows' Adler-32.

    Args:
        strip_rows: rows that share their codes.
    """
    lines = lines.contiguous()
    total, of_strip = lines.numel(), lines.shape[1] * strip_rows
    grid = (triton.cdiv(total, of_strip), triton.cdiv(of_strip, PART))
    counts = torch.zeros(grid[0], SYMBOLS, dtype=torch.int32, device=lines.device)
    told = torch.zeros(3, dtype=torch.int64, device=lines.device)
    launch(_count, grid, lines, counts, told, of_strip, total, PART, SYMBOLS, num_warps=8)
    codes = torch.empty_like(counts)
    launch(_give_codes, grid[:1], counts, codes, SYMBOLS, num_warps=1)
    sizes = torch.empty(grid, dtype=torch.int32, device=lines.device)
    launch(_measure, grid, lines, codes, sizes, of_strip, total, PART, SYMBOLS, num_warps=8)
    ends = sizes.flatten().cumsum(0)  # [parts of all strips] int64
    told[0] = ends[-1]
    # One word more, where a code that begins in the last one may reach; what does so is too long.
    words = (total + max(LEAST_SPARE, total // 32)) * 8 // WORD_BITS
    stream = torch.zeros(words + 1, dtype=torch.int32, device=lines.device)
    launch(
        _write,
        grid,
        lines,
        codes,
        sizes,
        ends,
        stream,
        of_strip,
        total,
        words,
        PART,
        SYMBOLS,
        num_warps=8,
    )
    return stream[:words].view(torch.uint8), told


@triton.jit
def _part(lines, of_strip, total, PART: tl.constexpr):
    """The bytes of this program, where they are, and which of them there are."""
    within = tl.program_id(1) * PART + tl.arange(0, PART)
    at = tl.program_id(0) * of_strip + within
    inside = (within < of_strip) & (at < total)
    return tl.load(lines + at, mask=inside, other=0).to(tl.int32), at, inside


@triton.jit
def _count(lines, counts, told, of_strip, total, PART: tl.constexpr, SYMBOLS: tl.constexpr):
    values, at, inside = _part(lines, of_strip, total, PART)
    # What is outside is counted where nobody looks.
    found = tl.histogram(tl.where(inside, values, SYMBOLS - 1), SYMBOLS)
    symbol = tl.arange(0, SYMBOLS)
    place = counts + tl.program_id(0) * SYMBOLS + symbol
    tl.atomic_add(place, found, mask=(symbol < END) & (found > 0), sem="relaxed")
    wide = values.to(tl.int64)
    tl.atomic_add(told + 1, tl.sum(wide, 0), sem="relaxed")
    tl.atomic_add(told + 2, tl.sum(wide * (total - at), 0), sem="relaxed")


@triton.jit
def _rounded(ideal, used, spared):
    """Lengths, each by so much shorter than ideal, rounded up; 0 of what does not occur."""
    whole = tl.ceil(ideal - spared).to(tl.int32)
    return tl.where(used, tl.minimum(tl.maximum(whole, 1), LONGEST), 0)


@triton.jit
def _room_taken(lengths, used):
    return tl.sum(tl.where(used, ROOM >> lengths, 0), 0)


@triton.jit
def _lengths(counts, used):
    """How long each symbol's code is; together they fill the room, as decoders demand."""
    total = tl.sum(counts, 0).to(tl.float32)
    ideal = tl.log2(total) - tl.log2(tl.maximum(counts, 1).to(tl.float32))
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _room_taken(_rounded(ideal, used, middle), used) <= ROOM
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    lengths = _rounded(ideal, used, low)
    left = ROOM - _room_taken(lengths, used)
    # The rarest symbol's share divides what is left, so that each round takes some.
    while left > 0:
        for level in range(2, LONGEST + 1):
            here = used & (lengths == level)
            number = tl.cumsum(here.to(tl.int32), 0)
            shortened = here & (number <= left // (ROOM >> level))
            left -= tl.sum(shortened.to(tl.int32), 0) * (ROOM >> level)
            lengths -= shortened.to(tl.int32)
    return lengths


@triton.jit
def _give_codes(counts, codes, SYMBOLS: tl.constexpr):
    """Each symbol's code and length as ``code << 4 | length``, first bit lowest."""
    symbol = tl.arange(0, SYMBOLS)
    place = tl.program_id(0) * SYMBOLS + symbol
    count = tl.load(counts + place)
    count = tl.where(symbol == END, 1, count)
    used = count > 0
    lengths = _lengths(count, used)
    code = tl.zeros((SYMBOLS,), tl.int32)
    following = 0
    for level in range(1, LONGEST + 1):
        here = used & (lengths == level)
        number = tl.cumsum(here.to(tl.int32), 0)
        code = tl.where(here, following + number - 1, code)
        following = (following + tl.sum(here.to(tl.int32), 0)) * 2
    turned = tl.zeros((SYMBOLS,), tl.int32)
    for bit in range(LONGEST):
        turned = turned * 2 + ((code >> bit) & 1)
    tl.store(codes + place, ((turned >> (LONGEST - lengths)) << 4) | lengths)


@triton.jit
def _measure(lines, codes, sizes, of_strip, total, PART: tl.constexpr, SYMBOLS: tl.constexpr):
    """Bits of each part: the first has the block's header, too, and the last its end."""
    strip, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    values, _, inside = _part(lines, of_strip, total, PART)
    table = codes + strip * SYMBOLS
    bits = tl.sum(tl.load(table + values, mask=inside, other=0) & 15, 0)
    bits += tl.where(part == 0, HEADER, 0)
    bits += tl.where(part == parts - 1, tl.load(table + END) & 15, 0)
    tl.store(sizes + strip * parts + part, bits)


@triton.jit
def _put(stream, at, bits, mask, words):
    """Some bits into a stream of zeros, lowest first."""
    word = at >> 5
    wide = bits.to(tl.int64) << (at & 31)
    fits = mask & (word < words)
    low, high = wide.to(tl.int32), (wide >> 32).to(tl.int32)
    tl.atomic_or(stream + word, low, mask=fits, sem="relaxed")
    tl.atomic_or(stream + word + 1, high, mask=fits & (high != 0), sem="relaxed")


@triton.jit
def _put_header(stream, begin, table, is_last, words, SYMBOLS: tl.constexpr):
    """Which codes a block has. Lengths are told in codes of four bits each, which are 0 to 15."""
    number = tl.arange(0, 32)
    # 16, 17 and 18, which stand for repeated lengths, are not used; all others take 4 bits.
    first = tl.where(number == 0, NUMBERS | is_last.to(tl.int32), 4)
    at = begin + tl.where(number == 0, 0, 14 + 3 * number)
    _put(stream, at, first, (number == 0) | ((number > 3) & (number < 20)), words)
    symbol = tl.arange(0, SYMBOLS)
    length = tl.load(table + symbol) & 15
    turned = ((length & 1) << 3) | ((length & 2) << 1) | ((length & 4) >> 1) | (length >> 3)
    _put(stream, begin + LENGTHS_AT + 4 * symbol, turned, symbol <= END, words)


@triton.jit
def _write(
    lines,
    codes,
    sizes,
    ends,
    stream,
    of_strip,
    total,
    words,
    PART: tl.constexpr,
    SYMBOLS: tl.constexpr,
):
    strip, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    table, place = codes + strip * SYMBOLS, strip * parts + part
    begin = tl.load(ends + place) - tl.load(sizes + place)
    if part == 0:
        _put_header(stream, begin, table, strip == tl.num_programs(0) - 1, words, SYMBOLS)
        begin += HEADER
    values, _, inside = _part(lines, of_strip, total, PART)
    found = tl.load(table + values, mask=inside, other=0)
    length = found & 15
    upto = begin + tl.cumsum(length, 0)
    _put(stream, upto - length, found >> 4, inside, words)
    if part == parts - 1:
        end = tl.load(table + END)
        _put(stream, begin + tl.sum(length, 0), end >> 4, True, words)
