"""What fits, and that what is said to fit compiles for the GPUs it is said to fit, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa.kernels.tiles import (
    ASYNCHRONOUS_ROWS,
    FEW_TOKENS,
    SHARED_BYTES,
    Tile,
    candidates,
    default_tile,
    padded_rank,
    shared_bytes,
    why_not,
)

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)


def test_tiles_survive_as_text() -> None:
    for tile in [*candidates(1), *candidates(10**6)]:
        assert Tile.parse(str(tile)) == tile


@pytest.mark.parametrize(
    "numbers", [(48, 64, 64, 4, 3), (8, 64, 64, 4, 3), (64, 64, 64, 3, 3), (64, 64, 64, 4, 0)]
)
def test_impossible_tiles_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        Tile(*numbers)


@pytest.mark.parametrize(("rank", "padded"), [(1, 16), (16, 16), (17, 32), (77, 128), (128, 128), (300, 512)])
def test_padded_rank(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded


@pytest.mark.parametrize("capability", [*SHARED_BYTES, (12, 0)])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("tokens", [1, 100_000])
def test_there_is_a_forward_tile_for_every_rank_of_half_precision(
    capability: tuple[int, int], element_bytes: int, tokens: int
) -> None:
    for rank in (1, 32, 77, 128, 256, 512):
        tile = default_tile(tokens, rank, 1, element_bytes, capability)
        if tile is None:
            assert element_bytes == 4 or rank > 256, rank
        else:
            assert why_not(tile, rank, 1, element_bytes, capability) is None


def test_reasons() -> None:
    assert "above 512" in str(why_not(Tile(16, 16, 16, 4, 1), 513, 1, 2, (9, 0)))
    assert "shared memory" in str(why_not(Tile(128, 64, 128, 8, 3), 128, 3, 2, (9, 0)))
    assert "registers" in str(why_not(Tile(128, 32, 16, 4, 2), 256, 1, 2, (9, 0)))


def compile_kernel(
    name: str, tile: Tile, rank: int, pairs: int, dtype: str, norm: bool, capability: int, head_dim: int = 0
) -> Any:
    """Compiles as a launch with 16-byte aligned pointers, strides and sizes would."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_lpa.kernels import lowdim_kernels

    kernel = getattr(lowdim_kernels, name)
    names = [p.name for p in kernel.params]
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_N": tile.block_n, "SPLIT_N": tile.split_n,
        "BLOCK_R": padded_rank(rank), "PAIRS": pairs, "HALF_HEAD": head_dim // 2, "PRECISION": "ieee",
        "EVEN_K": True, "EVEN_R": rank == padded_rank(rank), "EVEN_N": True, "BIAS_A": True, "BIAS_B": True,
        "KEEP": True, "NORM": norm, "SQUARES": norm and tile.block_m < ASYNCHRONOUS_ROWS,
        "x_column": 1, "a_depth": 1, "b_rank": 1, "column0": 1, "column1": 1, "column2": 1,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in names}
    numbers = re.compile(r"tokens|d_in|rank|d_out\d|\w+_row|row\d|a_rank|b_width|positions")
    signature, attributes = {}, {}
    for position, key in enumerate(names):
        if key in constants:
            signature[key] = "constexpr"
        elif key == "eps":
            signature[key] = "fp32"
        else:
            pointer = "*fp32" if key in ("rstd", "cos", "sin") else f"*{dtype}"
            signature[key] = "i32" if numbers.fullmatch(key) else pointer
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary: bytes) -> tuple[int, str]:
    """Bytes of local memory per thread, and the disassembly."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), code


@compiles
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "rank", "pairs", "dtype", "norm", "tokens", "head_dim"),
    [
        ("forward_kernel", 128, 3, "bf16", True, 10**6, 0),
        ("forward_kernel", 128, 3, "bf16", True, 10**6, 64),
        ("forward_kernel", 256, 3, "bf16", True, 10**6, 96),
        ("forward_kernel", 512, 1, "bf16", False, 10**6, 0),
        ("forward_kernel", 128, 3, "fp16", False, 1, 128),
        ("input_gradient_kernel", 64, 3, "bf16", True, 10**6, 0),
        ("input_gradient_kernel", 128, 3, "bf16", False, 10**6, 0),
        ("input_gradient_kernel", 77, 1, "fp32", False, 10**6, 0),
    ],
)
def test_default_tiles_compile_and_fit(
    name: str,
    rank: int,
    pairs: int,
    dtype: str,
    norm: bool,
    tokens: int,
    head_dim: int,
    capability: tuple[int, int],
) -> None:
    element_bytes = 4 if dtype == "fp32" else 2
    latents = 1 if name == "forward_kernel" else pairs
    tile = default_tile(tokens, rank, latents, element_bytes, capability, head_dim > 0)
    assert tile is not None
    architecture = capability[0] * 10 + capability[1]
    compiled = compile_kernel(name, tile, rank, pairs, dtype, norm, architecture, head_dim)
    assert compiled.metadata.shared <= shared_bytes(tile, rank, latents, element_bytes, capability)
    stack_bytes, code = resources(compiled.asm["cubin"])
    assert stack_bytes <= 96  # a few words outside the loops; real spilling takes hundreds
    if dtype == "fp32":
        assert "MMA" not in code  # no tf32 unless it was asked for
    elif capability == (9, 0) and tile.block_m >= 64:
        assert "HGMMA" in code  # the matrix units by the fast way
    assert ("LDGSTS" in code) == (tile.stages > 1)  # loads run ahead of the products
    if head_dim:
        assert "STG.E.128" in code and "LDG.E.128" in code  # outputs and tables, 16 bytes at a time


def instructions(code: str) -> dict[str, int]:
    """How often each kind stands in a disassembly: matrix products, their starts on Hopper, and copies."""
    kinds = ("HGMMA", "WARPGROUP.ARRIVE", "HMMA", "LDGSTS", "LDSM", "LDS", "STS")
    return {kind: len(re.findall(rf"\b{kind}\b", code)) for kind in kinds}


@compiles
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [0, 64], ids=["norm", "norm and rotary"])
@pytest.mark.parametrize("rank", [64, 128, 256])
def test_a_folded_norm_leaves_the_products_as_they_are(
    rank: int, head_dim: int, capability: tuple[int, int]
) -> None:
    """Hopper's products run one after another without a wait between if their operands allow it; each start
    of such a sequence is one ARRIVE. Where the compiler cannot see that it is safe, every product is a
    sequence of its own."""
    tile = default_tile(10**6, rank, 1, 2, capability, head_dim > 0)
    assert tile is not None and tile.block_m >= ASYNCHRONOUS_ROWS
    architecture = capability[0] * 10 + capability[1]
    plain, normed = (
        instructions(
            resources(
                compile_kernel("forward_kernel", tile, rank, 3, "bf16", norm, architecture, head_dim).asm[
                    "cubin"
                ]
            )[1]
        )
        for norm in (False, True)
    )
    if capability == (9, 0):
        assert 0 < normed["WARPGROUP.ARRIVE"] <= 3 and normed["HGMMA"] >= 4 * normed["WARPGROUP.ARRIVE"]
    else:
        assert normed["HMMA"] > 0
    if head_dim == 0:
        assert normed == plain
    else:  # the order of the tables' loads may differ
        assert all(
            normed[kind] == plain[kind] for kind in ("HGMMA", "WARPGROUP.ARRIVE", "HMMA", "LDGSTS", "LDSM")
        )


@compiles
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 0), ("fp16", 0), ("bf16", 64)])
def test_small_tiles_norm_beside_products_that_are_not_asynchronous(
    dtype: str, head_dim: int, capability: tuple[int, int]
) -> None:
    small = [tile for tile in candidates(FEW_TOKENS) if tile.block_m < ASYNCHRONOUS_ROWS and tile.stages == 2]
    for rows in (16, 32):
        tile = next(t for t in small if t.block_m == rows and why_not(t, 128, 1, 2, capability, True) is None)
        compiled = compile_kernel("forward_kernel", tile, 128, 3, dtype, True, 10 * capability[0], head_dim)
        found = instructions(resources(compiled.asm["cubin"])[1])
        assert found["HMMA"] > 0 and found["HGMMA"] == 0, tile


@compiles
@pytest.mark.parametrize("architecture", [80, 90])
def test_one_over_rms_is_read_16_bytes_at_a_time(architecture: int) -> None:
    compiled = compile_kernel(
        "inverse_rms_kernel", Tile(16, 1024, 16, 4, 3), 16, 1, "bf16", False, architecture
    )
    stack_bytes, code = resources(compiled.asm["cubin"])
    assert stack_bytes == 0 and "LDG.E.128" in code


def slots_that_products_read(code: str) -> list[int]:
    """Slots of every ring in shared memory from which an asynchronous matrix product of Hopper reads, in
    Triton's intermediate language."""
    slots: dict[str, int] = {}
    found = []
    for line in code.splitlines():
        if new := re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", line):
            slots[new[1]] = int(new[2])
        elif (view := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line)) and view[2] in slots:
            slots[view[1]] = slots[view[2]]
        elif product := re.search(r"ttng\.warp_group_dot (%\w+), (%\w+)", line):
            found += [slots[operand] for operand in product.groups() if operand in slots]
    return found


@compiles
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "norm", "head_dim"),
    [
        ("forward_kernel", False, 0),
        ("forward_kernel", True, 0),
        ("forward_kernel", True, 64),
        ("input_gradient_kernel", True, 0),
    ],
)
def test_nothing_is_copied_into_what_a_product_still_reads(
    name: str, norm: bool, head_dim: int, stages: int
) -> None:
    """One product may be under way while the copy ``stages - 1`` steps ahead is begun, so it takes ``stages``
    slots."""
    tile = Tile(64, 64, 64, 4, stages)
    compiled = compile_kernel(name, tile, 64, 3, "bf16", norm, 90, head_dim)
    slots = slots_that_products_read(compiled.asm["ttgir"])
    assert slots and min(slots) >= stages
