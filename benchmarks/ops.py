"""Times landmark attention beside torch's cuDNN, flash and FlexAttention on one NVIDIA GPU.

    python benchmarks/ops.py --out benchmarks/results/ops.json --plot benchmarks/results/ops.png

Every peer gets the same bfloat16 tensors, in the same run. A forward pass keeps what its backward
pass needs, as in training. Landmark attention is compared with the chunked implementation in
float32 before a case is timed; where they lie apart, the command ends with exit code 1 and the case
has no figures. Operations are counted as for dense causal attention, whoever does them;
``of_roofline`` counts what each has to do by ``landmark.ops.cost``. ``first_seconds`` is the first
forward and backward pass of the case in this process, compilation included as far as no earlier
case and no cache on disk (``TRITON_CACHE_DIR``, ``TORCHINDUCTOR_CACHE_DIR``) spared it. Rows are
written after every case; ``tables.py`` makes the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from cases import CASES, DENSE, MAKERS, PASSES, PEERS, Case, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from landmark import landmark_attention
from landmark.ops.choice import refusal
from landmark.ops.cost import backward_cost, forward_cost
from landmark.versions import made_with

SEED = 0
DEVICE = "cuda"
ALL_BLOCKS = "landmark, all blocks"
RESULTS = ("output", "gradient of query", "gradient of key", "gradient of value")
# A result sums products with a factor (weights, gradients of scores) that was rounded to bfloat16,
# and is rounded itself: two relative errors of at most 2**-8. Gradients are made from a rounded
# output on top of that: twice as much.
TOLERANCE = 4 * 2**-8
# A median is of so many runs at least; of a reason so many characters are kept.
FEWEST = 5
LONGEST_REASON = 300

Attend = Callable[..., Tensor]


class Peer(NamedTuple):
    """An implementation of attention that is timed on a case, or the reason why it cannot be.

    Attributes:
        name: one of ``PEERS``, or ``ALL_BLOCKS``.
        make: makes the function that is timed.
        block_size: block size of landmark attention; ``None`` for dense attention.
        top_k: ``top_k`` of landmark attention.
        refused: reason why it cannot compute the case; ``None`` if it may try.
    """

    name: str
    make: Callable[[], Attend]
    block_size: int | None = None
    top_k: int | None = None
    refused: str | None = None


def peers(case: Case, query: Tensor) -> list[Peer]:
    """Returns the peers of a case, cuDNN first; ``query`` (B, H, T, D) says dtype and device."""
    top_k = {"landmark": case.top_k}
    if case.top_k is not None:
        top_k[ALL_BLOCKS] = None
    return [
        Peer("cudnn", partial(sdpa, case, SDPBackend.CUDNN_ATTENTION)),
        Peer("flash", partial(sdpa, case, SDPBackend.FLASH_ATTENTION)),
        Peer("flex", partial(flex, case, query.device)),
        *(
            Peer(
                name,
                partial(landmark, case, k),
                case.block_size,
                k,
                refusal(query, case.block_size, k),
            )
            for name, k in top_k.items()
        ),
    ]


def sdpa(case: Case, backend: SDPBackend) -> Attend:
    """Returns torch's attention on one backend, which runs or raises.

    Torch gives cuDNN no causal mask that is aligned to the last key: fewer queries than keys see
    all keys there.
    """
    mask: dict[str, Any] = {"is_causal": True}
    if unmasked(case, backend):
        mask = {}
    elif case.queries != case.keys:
        mask = {"attn_mask": causal_lower_right(case.queries, case.keys)}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, key, value, enable_gqa=case.heads != case.groups, **mask
            )

    return attend


def unmasked(case: Case, backend: SDPBackend) -> bool:
    """Whether a backend computes a case without its mask, a little more than it has to."""
    return backend == SDPBackend.CUDNN_ATTENTION and case.queries != case.keys


def flex(case: Case, device: torch.device) -> Attend:
    """Returns FlexAttention compiled for this case alone, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (case.keys - case.queries) >= key

    torch.compiler.reset()  # past its limit of compilations a function would run uncompiled
    mask = create_block_mask(causal, None, None, case.queries, case.keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, block_mask=mask, enable_gqa=case.heads != case.groups)


def landmark(case: Case, top_k: int | None) -> Attend:
    """Returns the fused kernels."""
    return partial(landmark_attention, block_size=case.block_size, top_k=top_k, impl="triton")


def measure(case: Case, milliseconds: float, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Returns a row for each peer.

    They are timed after all of them have run once and landmark attention was found right.

    Raises:
        SystemExit: landmark attention differs from the chunked implementation.
    """
    leaves = [each.requires_grad_() for each in MAKERS[case.tensors](case, DEVICE, SEED)]
    grad = normal(case, DEVICE, SEED + 1)[0]
    close = near_ties(case, *leaves[:2])
    grad[:1, : close.shape[1]].masked_fill_(close[..., None], 0)
    asked = peers(case, leaves[0])
    begun = [begin(case, peer, leaves, grad, close) for peer in asked]
    rows: list[dict[str, Any]] = []
    for peer, (attend, found) in zip(asked, begun, strict=True):
        row = {**settings(case, peer, milliseconds), **found}
        if attend is not None:
            step = partial(both_passes, attend, leaves, grad)
            row["peak_bytes"] = peak_bytes(step)
            row["forward_ms"] = median(partial(attend, *leaves), milliseconds)
            row["forward_backward_ms"] = median(step, milliseconds)
            row |= judge(case, peer, row, rows[0] if rows else row, ceilings)
        rows.append(row)
    return rows


def settings(case: Case, peer: Peer, milliseconds: float) -> dict[str, Any]:
    """Returns what a row was asked for."""
    own = {"block_size": peer.block_size, "top_k": peer.top_k}
    shape = {name: value for name, value in case._asdict().items() if name not in ("name", *own)}
    hidden = (
        "nothing"
        if peer.name == "cudnn" and unmasked(case, SDPBackend.CUDNN_ATTENTION)
        else "later keys"
    )
    made = {"hidden": hidden, "dtype": "bfloat16", "seed": SEED, "milliseconds": milliseconds}
    return {"case": case.name, "peer": peer.name, **shape, **own, **made}


def begin(
    case: Case, peer: Peer, leaves: list[Tensor], grad: Tensor, close: Tensor
) -> tuple[Attend | None, dict[str, Any]]:
    """Runs a peer once.

    Returns:
        The function to be timed, ``None`` if the peer cannot compute the case; and the fields of
        its row that are known by now.

    Raises:
        SystemExit: landmark attention differs from the chunked implementation.
    """
    if peer.refused is not None:
        return None, {"refused": peer.refused}
    ours = peer.block_size is not None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            attend = peer.make()
            results, seconds = first_call(partial(both_passes, attend, leaves, grad))
        except Exception as error:  # whatever a peer fails with, its row says it
            if ours or "CUDA error" in str(error):
                raise
            return None, {
                "refused": " ".join(" ".join([str(error), *reasons(told)]).split())[:LONGEST_REASON]
            }
    found: dict[str, Any] = {"first_seconds": seconds, "warnings": reasons(told)}
    if ours:
        found["errors"] = errors(results, exact(peer, leaves, grad), close)
        found |= {"near_ties": int(close.sum()), "checked": close.numel()}
        if not all(error <= TOLERANCE for error in found["errors"].values()):
            raise SystemExit(
                f"{case.name}, {peer.name}: expected errors of at most {TOLERANCE}, got "
                f"{found['errors']}"
            )
    return attend, found


def reasons(told: list[warnings.WarningMessage]) -> list[str]:
    """Returns the first line of each warning, but for those of backends that nobody asked for."""
    found = [str(each.message).partition("\n")[0].partition(" (Triggered")[0] for each in told]
    return list(
        dict.fromkeys(
            each for each in found if "disabled" not in each and "not used because" not in each
        )
    )


def both_passes(attend: Attend, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the output and the three gradients."""
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def exact(peer: Peer, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Returns what is right for the first row and first key/value head, in float32."""
    group_size = leaves[0].shape[1] // leaves[1].shape[1]
    parts = [
        each.detach()[:1, :heads].float()
        for each, heads in zip(leaves, (group_size, 1, 1), strict=True)
    ]
    chunked = partial(
        landmark_attention, block_size=peer.block_size, top_k=peer.top_k, impl="chunked"
    )
    return both_passes(
        chunked, [each.requires_grad_() for each in parts], grad[:1, :group_size].float()
    )


def errors(
    results: tuple[Tensor, ...], expected: tuple[Tensor, ...], close: Tensor
) -> dict[str, float]:
    """Returns the norm of each difference over the norm of what is right, where that is known.

    Outputs of queries whose choice is ``close`` are left out; their gradients are 0.
    """
    found = {}
    for name, ours, right in zip(RESULTS, results, expected, strict=True):
        difference = ours[:1, : right.shape[1]].float() - right
        if name == "output":
            difference = difference.masked_fill(close[..., None], 0)
        found[name] = (difference.norm() / right.norm()).item()
    return found


@torch.no_grad()
def near_ties(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Returns which queries (1, H / G, T) select blocks by less than a rounding.

    They are of the first row and key/value head. For them the scores of the last block selected and
    of the next one are closer than twice what the order of the additions in a product can change:
    D roundings of ``|query| |key|``.
    """
    query = query[:1, : case.heads // case.groups].float()
    size = case.block_size
    close = torch.zeros(query.shape[:3], dtype=torch.bool, device=query.device)
    landmark_keys = key[0, 0, size - 1 :: size].float()
    if case.top_k is None or len(landmark_keys) <= case.top_k:
        return close
    rounding = 2 * case.dim * 2**-24 * landmark_keys.norm(dim=-1).max() * query.norm(dim=-1)
    own = torch.arange(case.keys - case.queries, case.keys, device=query.device) // size
    step = max(1, 2**26 // (query.shape[1] * len(landmark_keys)))
    for begin in range(0, case.queries, step):
        part = slice(begin, begin + step)
        scores = query[:, :, part] @ landmark_keys.T
        scores = scores.masked_fill(
            torch.arange(len(landmark_keys), device=own.device) >= own[part, None], -torch.inf
        )
        best = scores.topk(case.top_k + 1, dim=-1).values
        close[:, :, part] = best[..., -2] - best[..., -1] < rounding[:, :, part]
    return close


def first_call(step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], float]:
    """Returns the results of a step and the seconds that it took."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    results = step()
    torch.cuda.synchronize()
    return results, time.perf_counter() - start


def peak_bytes(step: Callable[[], Any]) -> int:
    """Returns the most bytes allocated during a step beyond those allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median(run: Callable[[], Any], milliseconds: float) -> float:
    """Returns the median of a run's milliseconds, over so many in all, or over ``FEWEST`` runs."""
    from triton.testing import do_bench

    found: float = do_bench(run, warmup=milliseconds, rep=milliseconds, return_mode="median")
    if FEWEST * found > milliseconds:
        found = do_bench(run, warmup=0, rep=(FEWEST + 1) * found, return_mode="median")
    return found


def judge(
    case: Case, peer: Peer, row: dict[str, Any], cudnn: dict[str, Any], ceilings: dict[str, float]
) -> dict[str, Any]:
    """Returns rates, ratios to cuDNN (``None`` where that was refused) and roofline shares."""
    found: dict[str, Any] = {}
    for name, backward in zip(PASSES, (False, True), strict=True):
        spent = row[f"{name}_ms"]
        theirs = cudnn.get(f"{name}_ms")
        found[f"{name}_tflops"] = case.flops(backward) / spent / 1e9
        found[f"{name}_to_cudnn"] = None if theirs is None else theirs / spent
        found[f"{name}_of_roofline"] = 1e3 * least_seconds(case, peer, backward, ceilings) / spent
    return found


def least_seconds(case: Case, peer: Peer, backward: bool, ceilings: dict[str, float]) -> float:
    """Returns the seconds below which the machine cannot compute a case."""
    shape = {
        "rows": case.rows,
        "heads": case.heads,
        "groups": case.groups,
        "queries": case.queries,
        "keys": case.keys,
        "dim": case.dim,
    }
    # Dense attention is landmark attention inside one unfinished block.
    block_size = case.keys + 1 if peer.block_size is None else peer.block_size
    costs = [forward_cost(**shape, block_size=block_size, top_k=peer.top_k)]
    if backward:
        costs.append(backward_cost(**shape, block_size=block_size, top_k=peer.top_k))
    return sum(
        max(cost.flops / ceilings["flops"], cost.bytes / ceilings["bytes"]) for cost in costs
    )


def measure_ceilings(milliseconds: float) -> dict[str, float]:
    """Returns what the machine does in a second.

    ``flops`` are operations of a product 8192^3, ``bytes`` those that a copy reads and writes.
    """
    square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    source = torch.zeros(2**30, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "flops": 2 * 8192**3 / median(lambda: square @ square, milliseconds) * 1e3,
        "bytes": 2 * source.numel() / median(lambda: target.copy_(source), milliseconds) * 1e3,
    }


def line(row: dict[str, Any]) -> str:
    """Returns a row as it is printed."""
    start = f"{row['case']:<22}{row['peer']:<22}"
    if "refused" in row:
        return f"{start}refused: {row['refused']}"
    for name in PASSES:
        ratio = row[f"{name}_to_cudnn"]
        start += f"{row[f'{name}_ms']:9.3f} ms{row[f'{name}_tflops']:6.0f} TFLOP/s"
        start += f"{'' if ratio is None else f'{ratio:.2f}':>6}{row[f'{name}_of_roofline']:6.0%}  "
    return f"{start}{row['peak_bytes'] / 2**20:8.0f} MiB{row['first_seconds']:7.1f} s"


def heading() -> str:
    """Returns the line above the rows."""
    columns = "".join(f"{title + ', / cuDNN, of roofline':<39}" for title in PASSES.values())
    return f"{'case':<22}{'peer':<22}{columns}{'peak':>12}{'first':>9}"


def plot(all_rows: list[dict[str, Any]], device: str | None, path: Path) -> None:
    """Draws TFLOP/s over the length of the dense cases of head dim 128, a line for each peer.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from landmark.eval.plots import save, subplots

    shown = {case.name for case in DENSE if case.dim == 128}
    figure, all_axes = subplots(2, (11.0, 4.5))
    for axes, (name, title) in zip(all_axes, PASSES.items(), strict=True):
        for peer, label in PEERS.items():
            rows = [row for row in all_rows if (row["peer"], row["case"] in shown) == (peer, True)]
            rows = sorted(
                (row for row in rows if "refused" not in row), key=lambda row: row["keys"]
            )
            axes.plot(
                [row["keys"] for row in rows],
                [row[f"{name}_tflops"] for row in rows],
                marker="o",
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set(
            xlabel="keys",
            ylabel="TFLOP/s, counted as dense",
            title=f"{title}, {device}",
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the rows; replaced")
    parser.add_argument("--cases", default=",".join(CASES), help="names of cases, with commas")
    parser.add_argument("--plot", type=Path, help="PNG file for TFLOP/s over length")
    parser.add_argument(
        "--milliseconds",
        type=float,
        default=60.0,
        help="of warming up and of measuring, for each figure",
    )
    options = parser.parse_args()
    names = options.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(
            f"--cases: expected some of {', '.join(CASES)}, got {', '.join(unknown)}; name others"
        )
    if not torch.cuda.is_available() or torch.version.cuda is None:
        parser.error("expected an NVIDIA GPU, got none; run it on a machine that has one")
    made = {
        **made_with("cuda", "torch", "triton", "transformers"),
        "cudnn": torch.backends.cudnn.version(),
    }
    ceilings = measure_ceilings(options.milliseconds)
    results: dict[str, Any] = {"ceilings": ceilings, "rows": []}
    if set(names) != set(CASES):
        results |= record.part(options.cases, list(CASES))
    print(json.dumps({"versions": made, "ceilings": ceilings}), heading(), sep="\n", flush=True)
    for name in names:
        rows = measure(CASES[name], options.milliseconds, ceilings)
        results["rows"] += rows
        record.write(options.out, made, results)
        print("\n".join(map(line, rows)), flush=True)
    if options.plot:
        plot(results["rows"], made["device"], options.plot)


if __name__ == "__main__":
    main()
