"""Every number that was chosen for speed, in one static table: how rows are cut into chunks, how kernels are launched.

Nothing is tuned at run time: ranks would choose differently, and the first step would pay for it.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

ROW_MULTIPLE = 128  # a GEMM wastes nothing on rows that fill its tiles
COLUMN_MULTIPLE = 64  # the stride of logits, so that every row starts at a multiple of 16 bytes
# On CPU a product is at full speed from 512 rows, and larger buffers cost fresh pages.
CPU_ROWS = 512
CPU_CHUNK_BYTES = 64 << 20
UPCAST_ELEMENTS = 1 << 22  # of a bf16 operand on CPU, converted at a time
TORCH_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # logits that plain PyTorch works on at a time
LOAD_BYTES = 16  # of one thread's widest load
# Three programs of 8 warps fit the register file. Left alone, ptxas takes up to 97 for KL with biases, or spills 8 bytes; for
# losses of a token on sm_80 it takes 40, or 64 for CE-U with a bias, and spills 8 bytes where the vocabulary is odd.
MOST_REGISTERS = 80
GEMM_TILE = (128, 256)  # rows and columns of a product that an SM works on: what cuBLAS takes for large ones
# What a chunk more costs, in waves of dX over the hidden size: about 0.6 ms on an H200 at V = 128256, D = 4096, where 32 chunks
# of 8192 rows are published to take 53.0 ms and 2 chunks 35.1. It is traffic against arithmetic, both in proportion to V.
WAVES_PER_DW_PASS = 1e-4
SCRATCH_SHARE = 64  # one part in so many of the workspace is left to what is not logits


class Launch(NamedTuple):
    """How a row kernel runs."""

    block: int  # logits that a program holds at a time
    num_warps: int


# A program works on one row, 8 KiB of logits at a time: 32 bytes a thread, which every variant holds without spilling. Small
# vocabularies (up to the size, rounded up to a power of two) get smaller blocks and fewer warps.
_SMALL = ((128, Launch(128, 1)), (512, Launch(512, 2)), (1024, Launch(1024, 4)))
_LARGE = {2: Launch(4096, 8), 4: Launch(2048, 8)}


def launch(vocab_size: int, bytes_per_logit: int) -> Launch:
    """The launch of every row kernel, on every architecture that we compile for."""
    return next((chosen for limit, chosen in _SMALL if vocab_size <= limit), _LARGE[bytes_per_logit])


def padded(vocab_size: int) -> int:
    """The stride of a row of logits on a device."""
    return -(-vocab_size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def rows_that_fit(bytes_per_row: int, workspace_bytes: int) -> int:
    """How many rows of logits the workspace holds."""
    return (workspace_bytes - workspace_bytes // SCRATCH_SHARE) // max(1, bytes_per_row)


def rows_per_chunk(bytes_per_row: int, workspace_bytes: int, device_type: str) -> int:
    """How many rows of logits a chunk may have, at least one."""
    fitting = rows_that_fit(bytes_per_row, workspace_bytes)
    if device_type == "cpu":
        fitting = min(fitting, max(CPU_ROWS, CPU_CHUNK_BYTES // max(1, bytes_per_row)))
    if fitting > ROW_MULTIPLE:
        fitting -= fitting % ROW_MULTIPLE
    return max(1, fitting)


def keeps_dz(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    bytes_per_logit: int,
    workspace: int,
    device: str,
) -> bool:
    """Whether dW waits for the backward: all rows are one chunk, whose dZ takes no more room than dW in fp32 would.

    Not in fp16, where a large upstream gradient would leave the range of a hidden state.
    """
    stride = padded(vocab_size)
    one_chunk = 0 < num_rows <= rows_per_chunk(stride * bytes_per_logit, workspace, device)
    return one_chunk and dtype != torch.float16 and num_rows * stride * dtype.itemsize <= 4 * vocab_size * hidden_size


def chunk_bounds(
    num_rows: int,
    bytes_per_row: int,
    workspace_bytes: int,
    device_type: str,
    num_sms: int | None = None,  # of the GPU; None: not known
    hidden_size: int = 0,
) -> Iterator[tuple[int, int]]:
    """Cut rows into chunks whose logits fit the workspace: the fewest, nearly equal, or those that fill the GPU's SMs."""
    fitting = rows_per_chunk(bytes_per_row, workspace_bytes, device_type)
    if num_sms is not None and num_rows > fitting >= ROW_MULTIPLE:
        size = rows_by_waves(num_rows, fitting, num_sms, hidden_size)
    else:
        num_chunks = max(1, -(-num_rows // fitting))
        size = max(1, -(-num_rows // num_chunks))
        if size > ROW_MULTIPLE:
            size = min(fitting, -(-size // ROW_MULTIPLE) * ROW_MULTIPLE)
    for start in range(0, num_rows, size):
        yield start, min(num_rows, start + size)


@cache
def rows_by_waves(num_rows: int, fitting: int, num_sms: int, hidden_size: int) -> int:
    """The rows of a chunk, at most `fitting`, with which dX takes the fewest waves of tiles and dW the fewest passes.

    dX is the product whose last wave shows: its columns are the hidden size alone. Time is counted in waves of dX, and a
    chunk more costs what adding to the whole of dW once more costs.
    """

    def waves(rows: int) -> int:
        return -(-(-(-rows // GEMM_TILE[0]) * -(-hidden_size // GEMM_TILE[1])) // num_sms)

    def cost(rows: int) -> tuple[float, int]:
        whole, rest = divmod(num_rows, rows)
        num_chunks = whole + (rest > 0)
        return whole * waves(rows) + waves(rest) + num_chunks * hidden_size * WAVES_PER_DW_PASS, num_chunks

    return min(range(fitting - fitting % ROW_MULTIPLE, 0, -ROW_MULTIPLE), key=cost)
