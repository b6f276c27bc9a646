"""Small integers as one little-endian bit stream in 32-bit words: the GPTQ layout, for any width.

32 codes of b bits fill exactly b words, so a stream never straddles two such rows: for b = 2, 4, 8 this is the
familiar "32 / b codes a word", for b = 3 the contiguous 96-bit layout of GPTQ (three words, two codes straddling).
The words are int32 as storage of uint32; nothing here depends on their sign.
"""

import torch
from torch import Tensor

CODES_A_ROW = 32
WORD = 32


def pack(codes_nm: Tensor, bits: int) -> Tensor:
    """Pack codes along the first axis: (n, m) integers in [0, 2**bits) -> (ceil(n / 32) * bits, m) int32.

    The last row of 32 is filled up with zeros. Raises ValueError if a code does not fit its bits.
    """
    if codes_nm.numel() and (int(codes_nm.min()) < 0 or int(codes_nm.max()) >= 1 << bits):
        low, high = int(codes_nm.min()), int(codes_nm.max())
        raise ValueError(f"codes span {low}..{high}, which does not fit {bits} bits")
    n, m = codes_nm.shape
    n_rows = -(-n // CODES_A_ROW)
    words = torch.zeros(n_rows, bits, m, dtype=torch.int64, device=codes_nm.device)
    for j in range(CODES_A_ROW):
        column = codes_nm[j::CODES_A_ROW].to(torch.int64)
        k = column.shape[0]
        word, offset = divmod(j * bits, WORD)
        words[:k, word] |= column << offset
        if offset + bits > WORD:
            words[:k, word + 1] |= column >> (WORD - offset)
    words &= (1 << WORD) - 1
    return _as_int32(words).reshape(n_rows * bits, m)


def _as_int32(words: Tensor) -> Tensor:
    """Keep the low 32 bits: values from 2**31 up become the negative int32 with the same bits."""
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def unpack(words_km: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: (ceil(n / 32) * bits, m) int32 -> (n, m) int32."""
    m = words_km.shape[1]
    if WORD % bits == 0:  # all codes of a word at once: a native model does this at every forward
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words_km.device)
        return ((words_km[:, None] >> shifts[:, None]) & ((1 << bits) - 1)).reshape(-1, m)[:n]
    rows = words_km.reshape(-1, bits, m)
    codes = torch.empty(rows.shape[0], CODES_A_ROW, m, dtype=torch.int32, device=words_km.device)
    for j in range(CODES_A_ROW):
        word, offset = divmod(j * bits, WORD)
        # An arithmetic shift smears the sign into the bits above; the mask keeps only bits below them.
        low = (rows[:, word] >> offset) & ((1 << min(bits, WORD - offset)) - 1)
        spill = offset + bits - WORD
        if spill > 0:
            low = low | ((rows[:, word + 1] & ((1 << spill) - 1)) << (bits - spill))
        codes[:, j] = low
    return codes.reshape(-1, m)[:n]


def words_for(n: int, bits: int) -> int:
    """32-bit words that n packed numbers take."""
    return -(-n // CODES_A_ROW) * bits
