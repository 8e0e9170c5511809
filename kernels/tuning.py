"""Every number that was chosen for speed, in one static table: how rows are cut into chunks, how kernels are launched.

Nothing is tuned at run time: ranks would choose differently, and the first step would pay for it.
"""

from collections.abc import Iterator
from typing import NamedTuple

ROW_MULTIPLE = 128  # a GEMM wastes nothing on rows that fill its tiles
COLUMN_MULTIPLE = 64  # the stride of logits, so that every row starts at a multiple of 16 bytes
# On CPU a product is at full speed from 512 rows, and larger buffers cost fresh pages.
CPU_ROWS = 512
CPU_CHUNK_BYTES = 64 << 20
UPCAST_ELEMENTS = 1 << 22  # of a bf16 operand on CPU, converted at a time
TORCH_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # logits that plain PyTorch works on at a time
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


def chunk_bounds(
    num_rows: int, bytes_per_row: int, workspace_bytes: int, device_type: str
) -> Iterator[tuple[int, int]]:
    """Cut rows into the fewest nearly equal chunks whose logits fit the workspace."""
    fitting = rows_per_chunk(bytes_per_row, workspace_bytes, device_type)
    num_chunks = max(1, -(-num_rows // fitting))
    size = max(1, -(-num_rows // num_chunks))
    if size > ROW_MULTIPLE:
        size = min(fitting, -(-size // ROW_MULTIPLE) * ROW_MULTIPLE)
    for start in range(0, num_rows, size):
        yield start, min(num_rows, start + size)
