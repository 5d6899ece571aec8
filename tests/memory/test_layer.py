"""One layer's memory: what a call takes beside what is kept, float16, and calls that fail half
way.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import models
from landmark import LandmarkCache, LandmarkConfig
from landmark.memory.geometry import make_geometry
from landmark.memory.layer import LayerMemory
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage import store
from landmark.rotary import Rotary

TESTS = Path(__file__).resolve().parents[1]
PATHS = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent / 'src'}"}


def tables(dim, block_size):
    return RotaryTables(
        Rotary(torch.linspace(0.01, 1, dim).double(), torch.ones(dim).double(), False), block_size
    )


def attend(dtype, slots=90):
    """One call on random queries and keys so large that their products pass what float16 can
    hold.
    """
    config = LandmarkConfig(block_size=8, top_k=2, local_blocks=1)
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        (spread * torch.randn(1, heads, slots, 64, generator=random)).half().to(dtype)
        for spread, heads in ((60, 4), (60, 2), (1, 2))
    )
    memory = LayerMemory(config, tables(64, 8), layer=1)
    return memory.attend(
        query,
        key,
        value,
        make_geometry([0], [slots], config),
        scale=0.001,
        retrieve=True,
        record=False,
    )


def test_products_beyond_float16_do_not_overflow():
    found, _ = attend(torch.float16)
    expected, _ = attend(torch.float32)
    assert found.isfinite().all()
    assert (found.float() - expected).abs().mean() < 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "blocks", "granularity"), [(16, 512, "token_head"), (1, 16384, "head")]
)
def test_peak_memory_of_a_call(rows, blocks, granularity):
    """A large batch, and a long text: fetched for a whole block of queries at once, the batch takes
    900 MiB.
    """
    code = f"""
        import re, torch
        from landmark import LandmarkConfig
        from landmark.memory.layer import LayerMemory
        from landmark.memory.geometry import make_geometry
        from memory.test_layer import tables

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        torch.set_num_threads(1)
        config = LandmarkConfig(granularity="{granularity}")
        memory = LayerMemory(config, tables(64, 64), layer=1)
        query, key = torch.randn({rows}, 6, 128, 64), torch.randn({rows}, 6, 128, 64)
        plan = make_geometry([{blocks} * 64] * {rows}, [128] * {rows}, config)
        memory.prepare(plan, key)
        before = peak()
        with torch.no_grad():
            memory.attend(query, key, key, plan, scale=0.125, retrieve=True, record=False)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=PATHS)
    assert int(done.stdout) / 2**10 < 400


@pytest.mark.parametrize(
    ("layers", "granularity"), [(None, "token_head"), ((1,), "token_head"), (None, "head")]
)
@torch.no_grad()
def test_a_call_that_failed_can_be_made_again(monkeypatch, layers, granularity):
    """A layer that was through drops nothing that the call needs, nor the queries that `head` has
    to remember.
    """
    monkeypatch.setattr(store, "EVICTION_STEP", 1)
    monkeypatch.setattr(store, "SPARE_BLOCKS", 0)
    settings = LandmarkConfig(
        block_size=3,
        top_k=2,
        local_blocks=1,
        max_blocks=3,
        layers=layers,
        granularity=granularity,
        chunk_tokens=41,
    )
    model = models.landmark_model("llama", settings)
    ids = models.text(80, seed=1)[None]
    expected = model(ids, use_cache=False).logits[:, 41:]
    cache = LandmarkCache(model.config)
    model(ids[:, :41], past_key_values=cache)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, 41:], past_key_values=cache)
    hook.remove()
    again = model(ids[:, 41:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)
