"""Compiles all kernels for a GPU that need not be there, and prints their shared memory in bytes.

    python tests/ops/compile_kernels.py 86

Run in a process of its own, as Triton's interpreter is chosen when triton is imported.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from landmark.memory.kernel_limits import FUSED_BYTES, FUSED_TOP_K
from landmark.memory.storage.cached_pool import MOST_LRU_BLOCKS
from landmark.memory.triton import append, decode, page_in, prefill
from landmark.memory.triton.append import APPEND_WARPS
from landmark.memory.triton.arguments import LEAST_ROWS, MOST_ROWS, WARPS, landmark_stages
from landmark.memory.triton.decode import DECODE_STAGES, PARTS, PEAKS, attention_warps
from landmark.memory.triton.prefill import LANDMARK_TILE, select_rows
from landmark.ops.triton import configs
from landmark.ops.triton.backward import key_value_gradient_kernel, query_gradient_kernel
from landmark.ops.triton.forward import forward_kernel
from landmark.ops.triton.select import select_blocks_kernel

KERNELS = (forward_kernel, query_gradient_kernel, key_value_gradient_kernel)
BY_DESCRIPTOR = {
    "forward_kernel": ("p_key", "p_value"),
    "query_gradient_kernel": ("p_key", "p_value"),
}
ABSENT = (
    "p_start",
    "p_origin",
    "p_end",
    "p_selected",
    "p_listed",
    "p_counts",
    "p_tiles",
    "p_indptr",
)
PREFILL = (prefill.select_kernel, prefill.attend_shared_kernel, prefill.attend_selected_kernel)
PAGE_IN = (page_in.lru_lookup_kernel, page_in.page_in_kernel)
DECODE = (
    decode.score_kernel,
    decode.top_k_kernel,
    decode.decode_attention_kernel,
    append.append_kv_kernel,
)
IN_INT64 = {each: ("p_own", "p_first", "p_offset") for each in DECODE}
IN_INT64 |= dict.fromkeys(
    PAGE_IN, ("p_own", "p_window", "p_lru", "p_last_used", "p_stats", "p_pointer")
)
IN_INT32 = (
    *ABSENT,
    "p_own",
    "p_first",
    "p_distance",
    "p_shared",
    "p_offset",
    "p_done",
    "p_physical",
    "p_missing",
)
IN_FLOAT32 = (
    "p_score",
    "p_peak",
    "p_recent",
    "p_lse",
    "p_delta",
    "p_lse_grad",
    "p_cos",
    "p_sin",
    "p_partial",
    "p_gate",
)
PAGE_IN_TILES = configs.Tiles(LEAST_ROWS, LANDMARK_TILE, WARPS, 3)  # of which only the warps count
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOP_K = 64


def constants(kernel, tiles, dim, block_size, packed=False):
    padded = triton.next_power_of_2(block_size)
    width = min(padded, tiles.keys)
    shape = {
        "BLOCK": block_size,
        "DIM": dim,
        "PADDED": dim,
        "ROWS": tiles.rows,
        "WIDTH": width,
        "TMA": tiles.tma,
    }
    shape |= {"BLOCKS": max(1, tiles.keys // padded), "PIECES": triton.cdiv(block_size, width)}
    shape |= {"STARTS": packed, "SEGMENTS": packed, "TOP_K": 0, "KEPT": 0}
    if packed:
        shape |= {"TOP_K": TOP_K, "KEPT": TOP_K, "BLOCKS": 1}
    else:
        shape |= dict.fromkeys(ABSENT)
    if kernel is select_blocks_kernel:
        shape |= {"TOP_K": TOP_K, "KEPT": TOP_K, "LANDMARKS": tiles.keys}
        shape.pop("p_selected", None)
    return {name: each for name, each in shape.items() if name in kernel.arg_names}


def memory_constants(kernel, dtype, dim, block_size, rows):
    shape = {
        "BLOCK": block_size,
        "WIDTH": triton.next_power_of_2(block_size),
        "DIM": dim,
        "PADDED": dim,
    }
    top_k = FUSED_TOP_K if kernel is prefill.select_kernel else TOP_K
    shape |= {
        "ROTATED": dim,
        "INTERLEAVED": False,
        "ROWS": rows,
        "LANDMARKS": LANDMARK_TILE,
        "EQUAL": False,
        "KEEP_FIRST": True,
        "TOP_K": top_k,
        "PADDED_K": top_k,
        "N_RECENT": top_k,
    }
    shape |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32x3"}
    return {name: each for name, each in shape.items() if name in kernel.arg_names}


def variants(kernel, dtype):
    """Landmarks at exact positions are rotated, in float32; blocks may have been paged in."""
    if kernel in (decode.decode_attention_kernel, append.append_kv_kernel):
        return ("", " paged")
    return (
        ("", " rotated")
        if kernel in (prefill.select_kernel, decode.score_kernel) and dtype == "bf16"
        else ("",)
    )


def decode_constants(kernel, dtype, dim, block_size, variant):
    shape = {"SHARED": True, **memory_constants(kernel, dtype, dim, block_size, LEAST_ROWS)}
    shape |= {
        "TOP_K": FUSED_TOP_K,
        "PADDED_K": FUSED_TOP_K,
        "N_RECENT": FUSED_TOP_K,
        "STINGY": True,
        "PEAKS": PEAKS[1],
    }
    shape |= {
        "ITEMS": 2 * FUSED_TOP_K,
        "PAGED": variant == " paged",
        "INTERLEAVED": False,
        "KEEP_FIRST": True,
    }
    shape |= {"EQUAL": False, "QUERIES": LEAST_ROWS}
    if kernel is decode.score_kernel and dtype == "bf16" and not variant:
        shape |= {"PRECISION": "parts", "QUERIES": LEAST_ROWS // PARTS}
    return {name: each for name, each in shape.items() if name in kernel.arg_names}


def decode_tiles(kernel, dim, block_size, dtype, landmarks):
    stages = 3
    if kernel is decode.score_kernel:
        stages = landmark_stages(decode.CHUNK.value * dim * landmarks.itemsize)
    warps = WARPS
    if kernel is append.append_kv_kernel:
        warps = APPEND_WARPS
    if kernel is decode.decode_attention_kernel:
        warps = attention_warps(block_size * dim * dtype.itemsize)
        stages = DECODE_STAGES
    return configs.Tiles(LEAST_ROWS, LANDMARK_TILE, warps, stages)


def page_in_constants(kernel, dim, block_size, wanted, lru_size):
    shape = {"TOP_K": FUSED_TOP_K, "WIDTH": triton.next_power_of_2(block_size * dim)}
    shape["SIZE"] = (
        block_size * dim
        if kernel is page_in.page_in_kernel
        else triton.next_power_of_2(wanted + lru_size)
    )
    return {name: each for name, each in shape.items() if name in kernel.arg_names}


def shared_memory(kernel, tiles, dtype, dim, block_size, capability, fixed=None, landmarks=None):
    fixed = fixed or constants(kernel, tiles, dim, block_size)
    described = BY_DESCRIPTOR.get(kernel.__name__, ("p_query", "p_grad")) if tiles.tma else ()
    rows = tiles.rows if "p_query" in described else fixed.get("BLOCKS", 0) * fixed.get("WIDTH", 0)
    types = {}
    aligned = {}
    for index, name in enumerate(kernel.arg_names):
        types[name] = "i32"
        if name in fixed:
            types[name] = "constexpr"
        elif name in described:
            types[name] = f"tensordesc<{dtype}[1, 1, {rows}, {dim}]>"
        elif name.startswith("p_"):
            types[name] = (
                "*fp32" if name in IN_FLOAT32 else "*i32" if name in IN_INT32 else f"*{dtype}"
            )
            if landmarks and name == "p_landmark":
                types[name] = f"*{landmarks}"
            types[name] = (
                "*i64"
                if name in IN_INT64.get(kernel, ())
                else "*i1"
                if name == "p_valid"
                else types[name]
            )
        elif name in ("scale", "factor"):
            types[name] = "fp32"
        if types[name].startswith("*") or name.endswith(("_stride", "_batch", "_head", "_group")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    source = ASTSource(kernel, types, fixed, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options
    ).metadata.shared


def pipelined_memory(dtype, dim):
    from triton.experimental.gluon._runtime import GluonASTSource

    from landmark.ops.triton.hopper import LAYOUT, pipelined_kernel

    types = {}
    aligned = {}
    for index, name in enumerate(pipelined_kernel.arg_names):
        types[name] = "i32"
        if name == "STAGES":
            types[name] = "constexpr"
        elif name in ("key", "value", "landmark_key"):
            types[name] = f"tensordesc<{dtype}[1, 1, {configs.PIPELINED_BLOCK}, {dim}],{LAYOUT!r}>"
        elif name.startswith("p_"):
            types[name] = "*fp32" if name in IN_FLOAT32 else f"*{dtype}"
        elif name == "factor":
            types[name] = "fp32"
        if types[name].startswith("*") or name.startswith(
            ("out_", "query_batch", "query_head", "query_stride")
        ):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(pipelined_kernel, types, {"STAGES": configs.PIPELINED_STAGES}, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    ).metadata.shared


def main(capability):
    found = {}
    if capability == 90:
        for dtype in ("bf16", "fp16"):
            for dim in configs.PIPELINED_DIMS:
                found[f"pipelined_kernel {dtype} {dim}"] = pipelined_memory(dtype, dim)
    for dtype, exact in DTYPES.items():
        table = (
            configs.FLOAT32
            if dtype == "fp32"
            else configs.HOPPER
            if capability == 90
            else configs.SAFE
        )
        for dim, config in table.items():
            selecting = (select_blocks_kernel, configs.tiles_of_selection(exact, dim))
            for block_size in (64, 200) if dtype == "bf16" else (64,):
                for kernel, tiles in (*zip(KERNELS, config, strict=True), selecting):
                    name = f"{kernel.__name__} {dtype} {dim} {block_size}"
                    # It takes longest of all, so each variant is compiled for one block size.
                    packed = kernel is select_blocks_kernel and block_size == 200
                    fixed = constants(kernel, tiles, dim, block_size, packed)
                    found[name] = shared_memory(
                        kernel, tiles, dtype, dim, block_size, capability, fixed
                    )
            for kernel, tiles in zip(KERNELS, configs.with_top_k(config), strict=True):
                fixed = constants(kernel, tiles, dim, 64, packed=True)
                found[f"{kernel.__name__} {dtype} {dim} packed, top_k"] = shared_memory(
                    kernel, tiles, dtype, dim, 64, capability, fixed
                )
            for block_size in (64, 200):
                if triton.next_power_of_2(block_size) * dim * exact.itemsize > FUSED_BYTES:
                    continue
                for kernel in PREFILL:
                    whole = torch.empty(1, 1, 1, 1, MOST_ROWS, dim)
                    selects = kernel is prefill.select_kernel
                    rows = select_rows(whole) if selects else MOST_ROWS
                    fixed = memory_constants(kernel, dtype, dim, block_size, rows)
                    for variant in variants(kernel, dtype):
                        landmarks = "fp32" if variant else dtype
                        stages = (
                            landmark_stages(LANDMARK_TILE * dim * (DTYPES[landmarks].itemsize + 4))
                            if selects
                            else 3
                        )
                        tiles = configs.Tiles(rows, LANDMARK_TILE, WARPS, stages)
                        name = f"memory {kernel.__name__} {dtype} {dim} {block_size}{variant}"
                        found[name] = shared_memory(
                            kernel, tiles, dtype, dim, block_size, capability, fixed, landmarks
                        )
                for kernel in DECODE:
                    for variant in variants(kernel, dtype):
                        landmarks = "fp32" if variant == " rotated" else dtype
                        fixed = decode_constants(kernel, dtype, dim, block_size, variant)
                        tiles = decode_tiles(
                            kernel, dim, block_size, DTYPES[dtype], DTYPES[landmarks]
                        )
                        name = f"decode {kernel.__name__} {dtype} {dim} {block_size}{variant}"
                        found[name] = shared_memory(
                            kernel, tiles, dtype, dim, block_size, capability, fixed, landmarks
                        )
                copied = page_in_constants(page_in.page_in_kernel, dim, block_size, 0, 0)
                found[f"page_in page_in_kernel {dtype} {dim} {block_size}"] = shared_memory(
                    page_in.page_in_kernel,
                    PAGE_IN_TILES,
                    dtype,
                    dim,
                    block_size,
                    capability,
                    copied,
                )
    for wanted, lru_size in ((64, 128), (128, 128), (128, MOST_LRU_BLOCKS)):
        fixed = page_in_constants(page_in.lru_lookup_kernel, 0, 0, wanted, lru_size)
        name = f"page_in lru_lookup_kernel {wanted} {lru_size}"
        found[name] = shared_memory(
            page_in.lru_lookup_kernel, PAGE_IN_TILES, "bf16", 0, 0, capability, fixed
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
