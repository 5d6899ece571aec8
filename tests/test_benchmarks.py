"""What the benchmarks ask and say; the parts of them that need no GPU."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from landmark import landmark_attention
from landmark.eval.fillers import pydoc_text

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402
import record  # noqa: E402
import tables  # noqa: E402

spec = importlib.util.spec_from_file_location("benchmarks_ops", BENCHMARKS / "ops.py")
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
sys.path.remove(
    str(BENCHMARKS)
)  # or other tests would find this file where they look for tests/ops

SMALL = cases.Case("small", 1, 4, 2, 40, 100, 32, block_size=16)
SHAPES = [SMALL, cases.Case("square", 3, 2, 1, 17, 17, 8), cases.Case("single", 2, 2, 2, 1, 9, 8)]


def test_every_name_means_one_case():
    told = [*cases.DENSE, *cases.GROUPED, *cases.OFFSET, *cases.TOP_K]
    assert list(cases.CASES.values()) == told
    assert len({case._replace(name="") for case in told}) == len(told)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_operations_are_those_of_the_visible_pairs(case):
    first = case.keys - case.queries
    pairs = sum(key <= first + query for query in range(case.queries) for key in range(case.keys))
    forward = pairs * case.rows * case.heads * 4 * case.dim
    assert case.flops() == forward
    assert case.flops(backward=True) == forward + 2.5 * forward


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_roofline_of_dense_attention(case):
    """Bound by arithmetic it does the operations that all are counted by, bound by memory it reads
    and writes once.
    """
    dense = ops.Peer("cudnn", lambda: None)
    for backward in (False, True):
        by_flops = ops.least_seconds(case, dense, backward, {"flops": 1.0, "bytes": float("inf")})
        assert by_flops == case.flops(backward)
    elements = case.heads * case.queries * case.dim * 2 + case.groups * case.keys * case.dim * 2
    by_bytes = ops.least_seconds(case, dense, False, {"flops": float("inf"), "bytes": 1.0})
    assert by_bytes == case.rows * (2 * elements + 4 * case.heads * case.queries)


def test_roofline_of_landmark_attention_knows_its_blocks():
    ceilings = {"flops": 1.0, "bytes": float("inf")}
    every, few = (ops.Peer("landmark", lambda: None, 16, top_k) for top_k in (None, 2))
    assert ops.least_seconds(SMALL, few, False, ceilings) < ops.least_seconds(
        SMALL, every, False, ceilings
    )
    assert ops.least_seconds(SMALL, every, False, ceilings) < SMALL.flops()


@pytest.mark.parametrize("make", [cases.normal, cases.structured])
@pytest.mark.parametrize("case", [SMALL, SMALL._replace(keys=96, rows=2)])
def test_tensors_are_laid_out_as_transformers_hands_them(make, case):
    tensors = make(case, "cpu", 0)
    for each, heads, length in zip(tensors, (4, 2, 2), (40, case.keys, case.keys), strict=True):
        assert each.shape == (case.rows, heads, length, 32) and each.dtype == torch.bfloat16
        assert each.transpose(1, 2).is_contiguous() and each.isfinite().all()
    for each, again, other in zip(tensors, make(case, "cpu", 0), make(case, "cpu", 1), strict=True):
        assert torch.equal(each, again) and not torch.equal(each, other)


def chosen_blocks(make):
    """Which of the 8 best past blocks each query chooses, from where it has a choice: (T, N) of
    zeros and ones.
    """
    case = cases.Case("", 1, 1, 1, 2048, 2048, 64, block_size=16, top_k=8)
    query, key, _ = (each[0, 0].float() for each in make(case, "cpu", 0))
    scores = query @ key[15::16].T
    own = torch.arange(2048) // 16
    scores = scores.masked_fill(torch.arange(128) >= own[:, None], -torch.inf)
    return torch.zeros_like(scores).scatter(1, scores.topk(8).indices, 1.0)[8 * 16 :]


def test_structured_neighbours_choose_the_same_blocks():
    shared = {}
    for make in (cases.structured, cases.normal):
        chosen = chosen_blocks(make)
        shared[make] = [
            (chosen[distance:] * chosen[:-distance]).sum(dim=1) for distance in (1, 1024)
        ]
    near, far = shared[cases.structured]
    assert (near >= 6).float().mean() > 0.9
    assert far.mean() < 2
    assert shared[cases.normal][0].mean() < 3, (
        "the measure itself sees no agreement among random queries"
    )


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_who_is_asked(case):
    found = {
        peer.name: peer
        for peer in ops.peers(case, torch.empty(1, 1, 1, case.dim, dtype=torch.bfloat16))
    }
    assert list(found)[:4] == list(ops.PEERS)
    assert (ops.ALL_BLOCKS in found) == (case.top_k is not None)
    assert not any(found[name].refused for name in ("cudnn", "flash", "flex"))
    hidden = ops.settings(case, found["cudnn"], 1.0)["hidden"]
    assert hidden == ("later keys" if case.queries == case.keys else "nothing"), (
        "no lower-right mask for cuDNN"
    )
    assert found["landmark"].top_k == case.top_k and found["landmark"].refused, (
        "these tensors are not on a GPU"
    )


def test_recorded_tensors_are_those_of_the_bundled_model():
    case = cases.CASES["top8-32768-recorded"]._replace(keys=640, queries=600)
    query, key, value = cases.recorded(case, "cpu", 0)
    assert query.shape == (1, 6, 600, 64) and key.shape == value.shape == (1, 6, 640, 64)
    landmarks = key[:, :, 63::64].float()
    assert query.isfinite().all() and landmarks.std(dim=2).mean() > 0.1, (
        "each block has a landmark of its own"
    )


def test_near_ties_are_left_out():
    case = SMALL._replace(top_k=1, queries=100)
    query, key, _ = cases.normal(case, "cpu", 0)
    assert not ops.near_ties(case._replace(top_k=None), query, key).any()
    assert not ops.near_ties(case, query, key).any()
    key[:, :, 47] = key[:, :, 31]
    scores = query[0, :2].float() @ key[0, 0, 15::16].float().T
    tied = (
        scores.masked_fill(torch.arange(6) >= torch.arange(100)[:, None] // 16, -torch.inf).argmax(
            -1
        )
        == 1
    )
    late = torch.arange(100) >= 48  # both are past
    close = ops.near_ties(case, query, key)[0]
    assert torch.equal(close, tied & late) and close.any()


def begin(peer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    leaves = [each.requires_grad_() for each in cases.normal(SMALL, "cpu", 0)]
    close = torch.zeros(1, 2, SMALL.queries, dtype=torch.bool)
    return ops.begin(SMALL, peer, leaves, cases.normal(SMALL, "cpu", 1)[0], close)


def chunked(query, key, value):
    return landmark_attention(query, key, value, block_size=16, impl="chunked")


def test_right_results_are_let_through(monkeypatch):
    attend, found = begin(ops.Peer("landmark", lambda: chunked, 16), monkeypatch)
    assert attend is chunked
    assert set(found["errors"]) == set(ops.RESULTS) and all(
        0 < each < 0.01 for each in found["errors"].values()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *leaves: 1.02 * chunked(*leaves),
        lambda *leaves: torch.nan * chunked(*leaves),
        lambda query, key, value: chunked(query, key.detach() + 0 * key, value),
        lambda query, key, value: chunked(query, key, value.roll(1, dims=2)),
        partial(landmark_attention, block_size=16, top_k=2, impl="chunked"),
    ],
    ids=["scaled", "nan", "no gradient of key", "shifted values", "too few blocks"],
)
def test_wrong_results_end_the_command(wrong, monkeypatch):
    with pytest.raises(SystemExit, match="small, landmark: expected errors of at most"):
        begin(ops.Peer("landmark", lambda: wrong, 16), monkeypatch)


def test_a_peer_that_cannot_says_why(monkeypatch):
    def fails(query, key, value):
        ops.warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        ops.warnings.warn("head_dim should be even (Triggered internally at x.cpp)", stacklevel=1)
        ops.warnings.warn("cuDNN attention has been runtime disabled.", stacklevel=1)
        raise RuntimeError("No available kernel.\nAborting.")

    attend, found = begin(ops.Peer("flash", lambda: fails), monkeypatch)
    assert attend is None and found == {
        "refused": "No available kernel. Aborting. head_dim should be even"
    }
    assert begin(ops.Peer("cudnn", lambda: fails, refused="known"), monkeypatch) == (
        None,
        {"refused": "known"},
    )
    with pytest.raises(RuntimeError, match="No available"):
        begin(ops.Peer("landmark", lambda: fails, 16), monkeypatch)


def row(case, peer, forward, both, **ratios):
    shown = {"forward_tflops": forward, "forward_backward_tflops": both}
    return {"case": case, "peer": peer, "keys": 2048, **shown, **ratios}


RESULTS = {
    "versions": {"device": "a machine"},
    "ceilings": {"flops": 8e14, "bytes": 4e12},
    "rows": [
        row(
            "dense-2048", "cudnn", 500.4, 450.0, forward_to_cudnn=1.0, forward_backward_to_cudnn=1.0
        ),
        row(
            "dense-2048",
            "flash",
            300.6,
            250.0,
            forward_to_cudnn=0.6,
            forward_backward_to_cudnn=0.55,
        ),
        {"case": "dense-2048", "peer": "flex", "refused": "no"},
        row(
            "dense-2048",
            "landmark",
            400.0,
            349.7,
            forward_to_cudnn=0.799,
            forward_backward_to_cudnn=0.777,
        ),
        {"case": "offset-65536", "peer": "cudnn", "refused": "no"},
        row(
            "offset-65536",
            "landmark",
            20.0,
            10.0,
            forward_to_cudnn=None,
            forward_backward_to_cudnn=None,
        ),
        row(
            "offset-65536",
            ops.ALL_BLOCKS,
            7.0,
            7.0,
            forward_to_cudnn=None,
            forward_backward_to_cudnn=None,
        ),
    ],
}


def test_readme_table():
    columns = "cuDNN | flash | flex | landmark | landmark / cuDNN"
    assert tables.kernels_summary(RESULTS).splitlines() == [
        f"| TFLOP/s | forward: {columns} | forward + backward: {columns} |",
        "| --- " * 11 + "|",
        "| dense-2048 | 500 | 301 | refused | 400 | 0.80 | 450 | 250 | refused | 350 | 0.78 |",
        "| offset-65536 | refused |  |  | 20 |  | refused |  |  | 10 |  |",
    ]


def test_results_are_written_and_drawn(tmp_path):
    path = tmp_path / "new" / "ops.json"
    made = {"device": "a machine", "sources": None}
    figures = {name: value for name, value in RESULTS.items() if name != "versions"}
    record.write(path, made, figures)
    assert json.loads(path.read_text()) == {**RESULTS, "versions": made}
    pytest.importorskip("matplotlib")
    ops.plot(RESULTS["rows"], RESULTS["versions"]["device"], tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 10_000


def test_rates_and_ratios():
    case = SMALL
    peer = ops.Peer("flash", lambda: None)
    row = {"forward_ms": 2.0, "forward_backward_ms": 10.0}
    found = ops.judge(
        case, peer, row, {"forward_ms": 1.0}, {"flops": case.flops() * 1e3, "bytes": float("inf")}
    )
    assert found["forward_tflops"] == pytest.approx(case.flops() / 2e-3 / 1e12)
    assert found["forward_backward_tflops"] == pytest.approx(3.5 * case.flops() / 10e-3 / 1e12)
    assert found["forward_to_cudnn"] == 0.5 and found["forward_backward_to_cudnn"] is None
    assert found["forward_of_roofline"] == pytest.approx(0.5)
    assert found["forward_backward_of_roofline"] == pytest.approx(0.35)


def test_unknown_cases_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ops.py", "--out", "x.json", "--cases", "dense-2048,dense-9"])
    with pytest.raises(SystemExit) as ended:
        ops.main()
    assert ended.value.code == 2
    assert "got dense-9; name others" in capsys.readouterr().err


def test_both_models_of_the_training_step_take_one():
    spec = importlib.util.spec_from_file_location("benchmarks_step", BENCHMARKS / "step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    shape = {
        **step.LARGE,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    for make, tokens in ((step.stock_model, 128), (step.landmark_model, 126)):
        model = make(shape, "cpu", torch.float32)
        before = model.lm_head.weight.clone()
        step.stepper(model, tokens, compiled=False, backend=None)()
        assert not torch.equal(model.lm_head.weight, before)


def test_tuning_is_timed(tmp_path, monkeypatch, capfd):
    """By the command itself; several processes are started by accelerate."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tuning

    shape = {**tuning.SHAPES["135M"], "hidden_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    monkeypatch.setitem(tuning.SHAPES, "135M", shape)
    monkeypatch.setitem(tuning.VOCAB, "135M", 5000)
    words = f"--out {tmp_path}/a.json --shapes 135M --length 512 --batch 4 --steps 5"
    monkeypatch.setattr(sys, "argv", ["tuning.py", *words.split()])
    tuning.main()
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (row["shape"], row["processes"], row["steps"]) == ("135M", 1, 5)
    assert len(row["losses"]) == 1 and row["tokens"] == 5 * 4 * 504
    four = tuning.launcher(4)
    assert " ".join(four[2:]) == "accelerate.commands.launch --multi_gpu --num_processes 4 -m"
    monkeypatch.setattr(sys, "argv", ["tuning.py", *words.split(), "--shapes", "2B"])
    with pytest.raises(SystemExit):
        tuning.main()
    assert "--shapes: expected some of 135M, 1B, 8B, got 2B" in capfd.readouterr().err


@pytest.mark.parametrize("remembered", ["0", "1300"])
def test_reading_is_timed(remembered, tmp_path):
    """The same memory is read into again and again; a CPU has no kernels."""
    out = tmp_path / "read.json"
    command = [sys.executable, str(BENCHMARKS / "read.py"), "--out", str(out), "--device", "cpu"]
    subprocess.run(
        [*command, "--remembered", remembered, "--tokens", "200", "--repeats", "2"], check=True
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(row["by"], row["read"]) for row in rows] == [("plain", "retrieve"), ("plain", "local")]
    assert all(row["seconds"] > 0 and row["remembered"] == int(remembered) for row in rows)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_eviction_is_timed(tier, tmp_path):
    out = tmp_path / "eviction.json"
    command = [sys.executable, str(BENCHMARKS / "eviction.py"), "--out", str(out), "--tier", tier]
    subprocess.run(
        [*command, "--blocks", "1000", "--max-blocks", "20", "--window", "100"], check=True
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["blocks"] for row in rows] == [100, 500, 1000]
    assert all(row["microseconds"] > 0 and row["tier"] == tier for row in rows)


def small_books(folder):
    """A folder of books, of whose train split alone one can read."""
    for split, text in (("train", pydoc_text()[:6000]), ("test", "\0")):
        (folder / "books" / split).mkdir(parents=True)
        (folder / "books" / split / "a.txt").write_text(text)
    return folder / "books"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_archive_is_asked_before_and_after(tmp_path):
    """The text is shorter than what is to be read, and only that of the train split counts."""
    data = small_books(tmp_path)
    out = tmp_path / "archive.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "archive.py"),
        "--out",
        str(out),
        "--data",
        str(data),
    ]
    (tmp_path / "files").mkdir()
    subprocess.run([*command, "--tokens", "3000", "--folder", str(tmp_path / "files")], check=True)
    assert list((tmp_path / "files").iterdir()) == []
    (row,) = json.loads(out.read_text())["rows"]
    saved = row["saved"]
    opened = row["opened"]
    assert row["data"] == "books" and 0.49 < row["key_at"] < 0.6
    assert saved["asked"]["right"] and saved["asked"]["logits"] == opened["asked"]["logits"]
    answers = [each["answer"] for each in opened["appended"]["asked"]]
    assert all(each["right"] for each in opened["appended"]["asked"])
    assert answers[0] == saved["asked"]["answer"] == opened["asked"]["answer"] != answers[1]
    assert saved["bytes"] > 3000 // 64 * 64 * 2 * 384 * 6 * 4, (
        "keys and values of the blocks of all layers"
    )
    assert opened["appended"]["bytes"] > 3 * saved["bytes"]
    assert opened["resident_bytes_before"] < opened["resident_bytes"] <= opened["peak_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_text_is_remembered_and_asked(tmp_path):
    """Blocks lie in host memory and below, the pools do not grow, and both ways to ask agree."""
    data = small_books(tmp_path)
    out = tmp_path / "millions.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "millions.py"),
        "--out",
        str(out),
        "--data",
        str(data),
    ]
    command += [
        "--device",
        "cpu",
        "--tokens",
        "7000",
        "--named",
        "2",
        "--single",
        "1",
        "--single-tokens",
        "3000",
    ]
    subprocess.run(
        [*command, "--tier", "disk", "--host-bytes", "30000000", "--folder", str(tmp_path)],
        check=True,
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["books", "millions.json"]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["data"] == "books" and row["rounds_of_data"] > 1
    first = row["after_a_tenth"]
    last = row["after_reading"]
    assert (first["tokens"], last["tokens"]) == (700, 7000)
    block = 2 * 384 * 64 * 4  # of one layer: keys and values in float32
    assert last["host_tier_bytes"] <= 30000000 < last["disk_tier_bytes"]
    assert last["host_tier_bytes"] + last["disk_tier_bytes"] >= 7000 // 63 * block * 6
    assert last["landmark_bytes"] > 7 * first["landmark_bytes"]
    assert last["near_bytes"] - first["near_bytes"] <= 6 * block, (
        "at most one more block in each window"
    )
    named = row["named"]
    assert (
        named["asked"] == 2
        and named["right"] == sum(each["right"] for each in named["questions"]) > 0
    )
    assert all(0 < each["at"] < 1 and "logits" not in each for each in named["questions"])
    assert row["after"]["tokens"] == 7000, "asking changes nothing"
    decode = row["decode"]
    assert decode["right"] == named["questions"][0]["right"] and decode["text"].strip()
    assert decode["tokens"] == 56 and 0 < decode["ms_per_token"] <= decode["ms_most"]
    fetched = decode["fetched_host_per_token"] + decode["fetched_disk_per_token"]
    assert fetched == pytest.approx(decode["misses_per_token"] * block / 6, rel=1e-12)
    (single,) = row["single"]
    assert single["right"] and row["single_right"] == 1
    assert single["tokens"] == 3000 and 0.49 < single["at"] < 0.6


def test_an_archive_that_answers_otherwise_ends_the_command():
    spec = importlib.util.spec_from_file_location("benchmarks_archive", BENCHMARKS / "archive.py")
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    before = {"answer": "12345", "logits": [1.0, 2.0], "seconds": 1.0}
    archive.require_same(before, {**before, "seconds": 2.0})
    for change in ({"answer": "12346"}, {"logits": [1.0, 2.0 + 2**-22]}):
        with pytest.raises(SystemExit, match="expected the answer that was given before saving"):
            archive.require_same(before, {**before, **change})


@pytest.fixture
def decode():
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("benchmarks_decode", BENCHMARKS / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_decoding_is_compared_before_it_is_timed(decode, monkeypatch):
    """And both mistakes are found: other blocks, and another output."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = decode.token(40 * 16, (4, 2), 32, 16, 3, torch.float32, device)
    assert decode.check(case)["heads_alike"] == 4
    decoded = decode.attended(case, decode.on_grid(case))
    other_blocks = decoded._replace(selected=(decoded.selected - 1).clamp(min=0))
    monkeypatch.setattr(decode, "attended", lambda *_: other_blocks)
    with pytest.raises(RuntimeError, match="selection: expected scores within"):
        decode.check(case)
    other_output = decoded._replace(output=decoded.output * 1.01)
    monkeypatch.setattr(decode, "attended", lambda *_: other_output)
    with pytest.raises(RuntimeError, match="output: expected an error"):
        decode.check(case)


def test_bytes_of_decoding(decode):
    """40 blocks, of which the own one, two local ones and two more selected are read: one by both
    heads of a group.
    """
    case = decode.token(40 * 16, (2, 1), 32, 16, 2, torch.float32, "cpu")
    selected = torch.tensor([[3, 5], [5, 9]]).view(1, 1, 2, 1, 1, 2)
    block = 2 * 16 * 32 * 4
    landmarks = 37 * 32 * 4
    assert decode.bytes_read(case, selected) == {
        "landmark_bytes": landmarks,
        "bytes": landmarks + 2 * 5 * block,
        "least_bytes": landmarks + (3 + 3) * block,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph")
@torch.no_grad()
def test_a_layer_that_decodes_is_captured_in_a_graph(decode):
    """Replayed for another token, it computes what a call from Python does, bit for bit."""
    case = decode.token(64 * 40, (4, 2), 64, 64, 3, torch.bfloat16, "cuda")
    outputs = []

    def run():
        settings = {"scale": decode.SCALE, "retrieve": True, "record": False}
        outputs.append(case.memory.attend(*case[1:], **settings)[0])

    replay = decode.captured(run)
    graphed = outputs[-1]
    case.query.normal_()
    replay()
    run()
    assert torch.equal(graphed, outputs[-1]) and not torch.equal(outputs[0], outputs[-1])
