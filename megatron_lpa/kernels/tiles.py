"""Tile sizes of the two-product kernel, and which of them a device can hold. Needs no Triton."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

MAX_RANK = 512
"""The latent of a tile stays in registers; beyond this no tile of 16 rows or more leaves room for the
products."""

MAX_PAIRS = 3
"""q, k and v; the kernels have so many of each argument."""

FEW_TOKENS = 512
"""Up to here tiles are short, and several programs share the columns of one."""

ASYNCHRONOUS_ROWS = 64
"""Rows from which Hopper multiplies asynchronously. Tiles of so many rows are given 1/rms for a folded norm;
smaller ones, for decoding above all, compute it beside the product and save a launch."""

SHARED_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
"""Shared memory that one block may use, by compute capability (CUDA programming guide, technical
specifications)."""

DEFAULT_SHARED_BYTES = 99 * 1024
REGISTERS = 65536
"""Of a multiprocessor; a thread has at most 255."""

ACCUMULATOR_SHARE = {2: 0.625, 4: 0.1875}
"""Of a thread's registers, by bytes per element; with more, compiled kernels spill. Half precision multiplies
in matrix units; fp32 that must not become tf32 is multiplied element by element, with operands in registers
too."""


@dataclass(frozen=True)
class Tile:
    """How one launch is cut.

    Args:
        block_m: tokens per program.
        block_k: step of the first product's sum.
        block_n: columns of the second product computed at once.
        warps: warps per program.
        stages: depth of the software pipeline.
        split_n: programs that share one tile's output columns; each computes the latent again. More than one
            pays where tokens are too few to fill the device.
    """

    block_m: int
    block_k: int
    block_n: int
    warps: int
    stages: int
    split_n: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            power_of_two = value > 0 and value & (value - 1) == 0
            if name in ("block_m", "block_k", "block_n"):
                assert power_of_two and value >= 16, (name, value)  # the least that a matrix unit takes
            elif name == "warps":
                assert power_of_two, (name, value)
            else:
                assert value > 0, (name, value)

    def __str__(self) -> str:
        return ",".join(str(number) for number in asdict(self).values())

    def for_rotary(self) -> Tile:
        """The least that rotation needs: half a block of columns is one product of a matrix unit."""
        return replace(self, block_n=max(32, self.block_n))

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The inverse of ``str``."""
        return cls(*map(int, text.split(",")))


def padded_rank(rank: int) -> int:
    """The power of two that the kernel computes with: at least 16, as matrix units ask for."""
    return max(16, 1 << (rank - 1).bit_length())


def latent_width(rank: int, latents: int) -> int:
    """Columns of latent that one program holds at once."""
    return padded_rank(rank) * latents


def shared_bytes(tile: Tile, rank: int, latents: int, element_bytes: int, capability: tuple[int, int]) -> int:
    """Shared memory of one program: no less than Triton 3.7 allocates, and for half precision on sm_90 just
    that.

    Args:
        tile: the cut.
        rank: r.
        latents: latents held at once: 1 forward, the number of pairs in the gradient of x.
        element_bytes: of the inputs.
        capability: of the device.
    """
    r = padded_rank(rank)
    # Before Hopper a loop with several products gets one stage more than asked for.
    stages = tile.stages + (latents > 1 and capability < (9, 0))
    first = tile.stages * tile.block_k * (tile.block_m + r)
    second = stages * tile.block_n * r * latents + tile.block_m * tile.block_n  # and the stored tile
    if 16 * tile.warps > tile.block_m:  # warps share rows, so the latent passes through shared memory
        second += tile.block_m * r * latents
    return max(first, second) * element_bytes


def accumulator_registers(
    tile: Tile, rank: int, latents: int, element_bytes: int, rotary: bool = False
) -> int:
    """Registers per thread for accumulators and latents, at the fuller of the two products; with ``rotary``
    also for as many cosines and sines as there are accumulators of the second."""
    r = padded_rank(rank)
    kept = tile.block_m * r * element_bytes // 4  # one latent in the inputs' dtype
    first = tile.block_m * r + kept * (latents - 1)
    second = kept * latents + tile.block_m * tile.block_n * (2 if rotary else 1)
    return max(first, second) // (32 * tile.warps)


def why_not(
    tile: Tile, rank: int, latents: int, element_bytes: int, capability: tuple[int, int], rotary: bool = False
) -> str | None:
    """The reason why a tile cannot run, or None; ``rotary`` if outputs are rotated before they are
    written."""
    if rotary:
        tile = tile.for_rotary()
    if rank > MAX_RANK:
        return f"r is {rank}, above {MAX_RANK}"
    limit = SHARED_BYTES.get(capability, DEFAULT_SHARED_BYTES)
    needed = shared_bytes(tile, rank, latents, element_bytes, capability)
    if needed > limit:
        return f"shared memory: {needed} bytes needed, {limit} there"
    registers = accumulator_registers(tile, rank, latents, element_bytes, rotary)
    spare = int(ACCUMULATOR_SHARE[element_bytes] * min(256, REGISTERS // (32 * tile.warps)))
    if registers > spare:
        return f"registers: {registers} per thread for accumulators, {spare} to spare"
    return None


def candidates(tokens: int) -> list[Tile]:
    """Tiles worth trying, most promising first: large ones for training, small and split ones for few
    tokens."""
    if tokens <= FEW_TOKENS:
        rows = (16,) if tokens <= 16 else (16, 32, 64)
        steps = ((128, 64), (64, 64), (64, 32))
        cuts = [(m, k, n, w, s) for m in rows for k, n in steps for w in (4, 8) for s in (3, 2)]
        return [Tile(*cut, split_n=split) for split in (8, 16, 4, 1) for cut in cuts]
    # Every tile reads both factors from the L2 cache, so 256 rows move half as much as 128.
    large = [
        (128, 64, 128, 8, 3), (128, 64, 64, 8, 3), (256, 64, 64, 8, 3), (256, 64, 32, 8, 3),
        (128, 64, 128, 8, 4), (256, 64, 128, 8, 3), (64, 64, 128, 4, 3), (64, 64, 64, 4, 3),
        (128, 64, 256, 8, 2), (128, 32, 128, 8, 4), (64, 64, 64, 4, 4), (64, 64, 128, 8, 3),
        (64, 128, 128, 4, 2), (64, 64, 32, 8, 3), (64, 32, 64, 8, 2), (64, 64, 32, 4, 3),
        (128, 64, 32, 8, 3), (128, 64, 64, 4, 3),
    ]  # fmt: skip
    small = [
        (32, 64, 64, 4, 2),
        (32, 32, 32, 4, 2),
        (16, 32, 32, 4, 2),
        (16, 16, 32, 4, 2),
        (16, 16, 16, 4, 1),
    ]
    return [Tile(*cut) for cut in [*large, *small]]


def default_tile(
    tokens: int,
    rank: int,
    latents: int,
    element_bytes: int,
    capability: tuple[int, int],
    rotary: bool = False,
) -> Tile | None:
    """The first candidate that fits, for shapes that no table has; None where none does."""
    for tile in candidates(tokens):
        if why_not(tile, rank, latents, element_bytes, capability, rotary) is None:
            return tile
    return None
