"""Results on disk, and their pictures."""

import dataclasses
import json
import sys
import time

import pytest

from landmark.eval import plots, results
from landmark.eval.measure import measured

DEPTHS = tuple(
    {"from": i / 10, "to": (i + 1) / 10, "asked": 1, "correct": i % 2} for i in range(10)
)
PASSKEY = results.PasskeyRow(
    task="passkey",
    model="m",
    attention="landmark",
    length=512,
    filler="paper",
    facts=1,
    distractors=0,
    trials=10,
    asked=10,
    correct=5,
    accuracy=0.5,
    depths=DEPTHS,
    read="local",
    top_k=4,
    granularity="head",
    settings={"top_k": 4},
    beyond_trained=False,
    seed=0,
    dtype="float32",
    seconds=1.0,
    peak_bytes=None,
)
PERPLEXITY = results.PerplexityRow(
    model="m",
    attention="landmark",
    length=512,
    scheme="paper",
    local=250,
    blocks=40,
    top_k=4,
    attention_size=502,
    granularity="head",
    perplexity=20.0,
    loss=3.0,
    tokens=511,
    segments=1,
    settings={"local_blocks": 2},
    beyond_trained=True,
    seed=0,
    dtype="float32",
    seconds=1.0,
    peak_bytes=None,
    data="books",
)
RANK = results.RankRow(
    ranker="bm25",
    model=None,
    text="cut",
    documents=8,
    tokens=1000,
    max_tokens=None,
    passages=200,
    passage_tokens=126,
    recall_at_1=0.5,
    ndcg_at_10=0.75,
    settings={"k1": 1.5},
    seed=0,
    dtype=None,
    library_bytes=None,
    seconds=1.0,
    data="books, test",
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    results.write(path, [PASSKEY, PERPLEXITY, RANK], "cpu")
    assert results.read(path) == [PASSKEY, PERPLEXITY, RANK]
    content = json.loads(path.read_text())
    assert set(content) == {"versions", "rows"}
    assert {"landmark", "torch", "transformers", "python", "device", "commit", "sources"} == set(
        content["versions"]
    )
    assert content["rows"][0]["accuracy"] == 0.5
    assert content["rows"][1]["perplexity"] == 20.0


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{"accuracy": 1}]}', '{"rows": 3}', "\x80"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="expected JSON with versions and rows"):
        results.read(path)


def test_pictures_are_written(tmp_path):
    plain = dataclasses.replace(
        PASSKEY,
        attention="full",
        top_k=None,
        granularity=None,
        length=1024,
        correct=0,
        accuracy=0.0,
    )
    plots.plot_passkey(
        [PASSKEY, plain, dataclasses.replace(PASSKEY, length=2048)], tmp_path / "new" / "a.png"
    )
    none = dataclasses.replace(PERPLEXITY, top_k=0, length=2048)
    plots.plot_perplexity(
        [PERPLEXITY, none, dataclasses.replace(PERPLEXITY, top_k=None, attention="full")],
        tmp_path / "b.png",
    )
    for path in (tmp_path / "new" / "a.png", tmp_path / "b.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'landmark-attention\[viz\]'"):
        plots.plot_passkey([PASSKEY], tmp_path / "a.png")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_the_process():
    with measured("cpu") as measure:
        held = bytearray(200 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
        time.sleep(0.1)
        del held
    assert measure.seconds > 0
    assert 190 << 20 < measure.peak_bytes < 300 << 20
