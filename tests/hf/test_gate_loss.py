"""Losses on the gate: against loops in float64, their gradients, and inside compiled layers."""

import math
import multiprocessing
from dataclasses import dataclass, field

import contrast_on_devices as devices
import pytest
import torch
from contrast_on_devices import SETTINGS, SIZE
from torch._dynamo.testing import CompileCounterWithBackend

import models
from landmark.blocks import slot_of
from landmark.hf.gate_loss import (
    GateBlockMass,
    GateContrast,
    JointContrast,
    QuestionSpan,
    TextContrast,
    contrast_queries,
    far_questions,
)
from landmark.hf.recall import EvidenceQuery
from landmark.train.run import compile_layers

TOKENS = 63
QUERIES = [
    EvidenceQuery(0, 62, (range(3, 5),)),  # in blocks 0 and 1
    EvidenceQuery(1, 40, (range(8, 9), range(21, 22))),
    EvidenceQuery(1, 50, (range(30, 31),)),
    EvidenceQuery(0, 25, (range(2, 3),)),
]


@dataclass
class Kept:
    """Keeps what the layers attend with."""

    layers: list = field(default_factory=list)

    def prepare(self, settings, rotaries, like):
        self.rotaries = rotaries

    def add(self, layer):
        self.layers.append(layer)


def ids():
    return models.text(2 * TOKENS).view(2, TOKENS)


@pytest.fixture(params=["llama", "gemma3", "gpt_neox"])
def model(request):
    model = models.landmark_model(request.param, SETTINGS)
    model.train()
    return model


def run(model, gate_loss):
    model(input_ids=ids(), use_cache=False, gate_loss=gate_loss)
    return gate_loss


def rotated(rotary, vector, position):
    return rotary.rotation(torch.tensor(position), torch.float64).rotate(vector)


def contrast_in_loops(parts, queries, finished=None):
    """Returns ``(Q, H)`` of each layer.

    ``parts`` are batches that were kept, each alone; ``queries`` have the index of their batch.
    ``finished`` has the number of blocks of each row of the one batch, ``None`` for all.
    """
    found = []
    for layers in zip(*(part.layers for part in parts), strict=True):
        rotary = parts[0].rotaries[layers[0].rotary_type]
        heads = layers[0].query.shape[1]
        groups = layers[0].key.shape[1]
        losses = []
        for part, asked in queries:
            slot = slot_of(asked.token, SIZE)
            own = slot // SIZE
            # The prefix of top_k + 1 blocks, the local block, the own block.
            position = (SETTINGS.top_k + 1 + 1) * SIZE + slot % SIZE
            evidence = {token // (SIZE - 1) for mention in asked.evidence for token in mention}
            for head in range(heads):
                query = rotated(rotary, layers[part].query[asked.row, head, slot], position)
                every = []
                wanted = []
                for other, layer in enumerate(layers):
                    for row in range(layer.key.shape[0]):
                        is_own = (other, row) == (part, asked.row)
                        for block in range(layer.key.shape[2] // SIZE):
                            if is_own and block >= own - 1:
                                continue
                            if finished is not None and block >= finished[row]:
                                continue
                            at = block * SIZE + SIZE - 1
                            key = layer.key[row, head // (heads // groups), at]
                            score = layer.scale * (query @ rotated(rotary, key, SIZE - 1))
                            every.append(score)
                            if is_own and block in evidence:
                                wanted.append(score)
                losses.append(torch.stack(every).logsumexp(0) - torch.stack(wanted).logsumexp(0))
        found.append(torch.stack(losses).view(len(queries), heads))
    return found


def test_contrast_is_that_of_a_loop(model):
    kept = run(model, Kept())
    contrast = run(model, GateContrast(QUERIES))
    assert len(contrast.losses) == len(kept.layers) == 2
    expected = contrast_in_loops([kept], [(0, query) for query in QUERIES])
    for losses, looped in zip(contrast.losses, expected, strict=True):
        assert losses.shape == (len(QUERIES), models.HEADS)
        torch.testing.assert_close(losses, looped, atol=1e-9, rtol=0)


@pytest.mark.parametrize("there", [0, 3])
def test_blocks_that_are_not_there_are_no_negatives(model, there):
    """Such as those of a packed row, whose landmarks stand elsewhere."""
    queries = [query for query in QUERIES if query.row == 0]
    finished = [99, there]
    kept = run(model, Kept())
    contrast = run(model, GateContrast(queries, finished))
    expected = contrast_in_loops([kept], [(0, query) for query in queries], finished)
    everything = run(model, GateContrast(queries))
    for losses, looped, more in zip(contrast.losses, expected, everything.losses, strict=True):
        torch.testing.assert_close(losses, looped, atol=1e-9, rtol=0)
        assert (losses < more).all()


@pytest.fixture(scope="module")
def of_two_devices(tmp_path_factory):
    """What each of two processes found in each case."""
    folder = tmp_path_factory.mktemp("devices")
    multiprocessing.set_forkserver_preload(["transformers.trainer"])  # imported once for both
    torch.multiprocessing.start_processes(
        devices.on_two_devices, args=(folder,), nprocs=2, start_method="forkserver"
    )
    return {
        name: [torch.load(folder / f"{name}-{each}", weights_only=False) for each in range(2)]
        for name in devices.CASES
    }


@pytest.mark.parametrize(
    "name", [name for name in devices.CASES if devices.CASES[name].kind == "heads"]
)
def test_contrast_on_two_devices_is_that_of_a_loop(of_two_devices, name):
    """Loss and gradients, averaged over the devices; one of them may have no query at all."""
    shares = devices.CASES[name].shares
    model = devices.model_of(devices.CASES["no query"])
    parts = [Kept(), Kept()]
    text = 0
    for share, part in zip(shares, parts, strict=True):
        output = model(input_ids=share.ids, use_cache=False, gate_loss=part)
        text = text + devices.text_loss(output.logits)
    queries = [(part, query) for part, share in enumerate(shares) for query in share.queries]
    by_head = torch.cat(contrast_in_loops(parts, queries), dim=1).mean(0)
    loss = text + by_head.sort().values[: devices.HEADS].mean()
    loss.backward()
    check_equal(of_two_devices[name], devices.found(loss, model))


@pytest.mark.parametrize(
    "name",
    [
        "as many queries",
        "more queries",
        "no query",
        "checkpointing",
        "joint",
        "joint, no query",
        "text",
        "text, no query",
    ],
)
def test_contrast_on_two_devices_is_that_on_one(of_two_devices, name):
    first, second = devices.CASES[name].shares
    queries = [*first.queries, *(query._replace(row=1) for query in second.queries)]
    whole = devices.Share(torch.cat((first.ids, second.ids)), tuple(queries))
    check_equal(of_two_devices[name], devices.on_one_device(whole, kind=devices.CASES[name].kind))


def check_equal(both, expected):
    loss = sum(each.loss for each in both) / 2
    assert loss == pytest.approx(expected.loss, abs=1e-9)
    for each in both:
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(each.gradients[name], gradient, atol=1e-9, rtol=1e-9)


SPANS = [range(58, 63), range(40, 41), range(40, 51), range(22, 26)]


def joint_in_loops(kept, layers):
    """Returns ``(Q,)``: each question's loss from scores that are added one by one."""
    heads = kept.layers[0].query.shape[1]
    losses = []
    for asked, span in zip(QUERIES, SPANS, strict=True):
        own = slot_of(asked.token, SIZE) // SIZE
        evidence = {token // (SIZE - 1) for mention in asked.evidence for token in mention}
        every = []
        wanted = []
        for row in range(2):
            for block in range(kept.layers[0].key.shape[2] // SIZE):
                if row == asked.row and block >= own - 1:
                    continue
                score = 0.0
                for layer in (kept.layers[number] for number in layers):
                    rotary = kept.rotaries[layer.rotary_type]
                    key = layer.key[row, :, block * SIZE + SIZE - 1]
                    key = rotated(rotary, key, SIZE - 1)
                    for token in span:
                        slot = slot_of(token, SIZE)
                        position = (SETTINGS.top_k + 1 + 1) * SIZE + slot % SIZE
                        for head in range(heads):
                            query = rotated(rotary, layer.query[asked.row, head, slot], position)
                            product = query @ key[head // (heads // len(key))]
                            score += layer.scale * product / len(span)
                score = score / math.sqrt(len(layers) * heads)
                every.append(score)
                if row == asked.row and block in evidence:
                    wanted.append(score)
        losses.append(torch.stack(every).logsumexp(0) - torch.stack(wanted).logsumexp(0))
    return torch.stack(losses)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_joint_contrast_is_that_of_a_loop(model, layers):
    kept = run(model, Kept())
    joint = run(model, JointContrast(QUERIES, spans=SPANS, layers=layers))
    expected = joint_in_loops(kept, layers)
    torch.testing.assert_close(joint.losses, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(joint.loss(), expected.mean(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("heads", [[(1, 2)], [(0, 0), (1, 3), (1, 1)]])
def test_text_contrast_is_that_of_a_loop(model, heads):
    kept = run(model, Kept())
    questions = [QuestionSpan(*each) for each in zip(QUERIES, SPANS, strict=True)]
    contrast = run(model, TextContrast(questions, heads))
    expected = []
    for asked, span in questions:
        own = slot_of(asked.token, SIZE) // SIZE
        evidence = {token // (SIZE - 1) for mention in asked.evidence for token in mention}
        scores = torch.zeros(own - 1, dtype=torch.float64)
        for number, head in heads:
            layer = kept.layers[number]
            rotary = kept.rotaries[layer.rotary_type]
            group = head * layer.key.shape[1] // layer.query.shape[1]
            for token in span:
                slot = slot_of(token, SIZE)
                position = (SETTINGS.top_k + 1 + 1) * SIZE + slot % SIZE
                query = rotated(rotary, layer.query[asked.row, head, slot], position)
                for block in range(own - 1):
                    text = []
                    for inside in range(SIZE - 1):
                        key = layer.key[asked.row, group, block * SIZE + inside]
                        text.append(layer.scale * query @ rotated(rotary, key, inside))
                    scores[block] += torch.stack(text).logsumexp(0).item() / len(span)
        scores /= math.sqrt(len(heads))
        wanted = scores[[block for block in range(own - 1) if block in evidence]]
        expected.append(scores.logsumexp(0) - wanted.logsumexp(0))
    torch.testing.assert_close(contrast.losses, torch.stack(expected), atol=1e-9, rtol=0)
    torch.testing.assert_close(contrast.loss(), torch.stack(expected).mean(), atol=1e-9, rtol=0)


def test_block_mass_is_that_of_a_loop(model):
    slots = [slot_of(token, SIZE) for token in (0, 7, 40, 62)]
    kept = run(model, Kept())
    mass = run(model, GateBlockMass(slots))
    for layer, loss in zip(kept.layers, mass.losses, strict=True):
        query = layer.rotation.rotate(layer.query)
        key = layer.rotation.rotate(layer.key)
        heads = query.shape[1]
        found = []
        for row in range(2):
            for head in range(heads):
                keys = key[row, head // (heads // key.shape[1])]
                for slot in slots:
                    scores = (layer.scale * keys @ query[row, head, slot]).tolist()
                    own = slot // SIZE
                    text = [scores[at] for at in range(own * SIZE, slot + 1)]
                    target = list(text)
                    gate = list(text)
                    for block in range(own):
                        inside = scores[block * SIZE : block * SIZE + SIZE - 1]
                        target.append(math.log(sum(map(math.exp, inside))))
                        gate.append(scores[block * SIZE + SIZE - 1])
                    weights = torch.tensor(target, dtype=torch.float64).softmax(-1)
                    logs = torch.tensor(gate, dtype=torch.float64).log_softmax(-1)
                    found.append(float((weights * (weights.log() - logs)).sum()))
        assert loss.item() == pytest.approx(sum(found) / len(found), abs=1e-4)


@pytest.mark.parametrize("kind", ["contrast", "joint contrast", "text contrast", "block mass"])
def test_descent_does_what_the_loss_is_for(kind):
    """Contrast: the evidence is scored higher than all else. Mass: the gate is as told."""
    model = models.landmark_model("llama", SETTINGS)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for _ in range(25):
        if kind == "contrast":
            loss = run(model, GateContrast(QUERIES)).loss(4)
        elif kind == "joint contrast":
            loss = run(model, JointContrast(QUERIES, spans=SPANS, layers=[1])).loss()
        elif kind == "text contrast":
            questions = [QuestionSpan(*each) for each in zip(QUERIES, SPANS, strict=True)]
            loss = run(model, TextContrast(questions, [(0, 1), (1, 2)])).loss()
        else:
            loss = run(model, GateBlockMass([20, 40, 70])).loss()
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert model.base_model.landmark_embedding.weight.grad.abs().sum() > 0
        optimizer.step()
    model.load_state_dict(state)  # it is shared
    assert found[-1] < 0.3 * found[0]


def test_only_the_best_heads_are_trained():
    losses = [torch.tensor([[3.0, 1.0], [5.0, 1.0]]), torch.tensor([[2.0, 9.0], [0.0, 9.0]])]
    contrast = GateContrast([])
    contrast.losses = losses
    assert contrast.loss(1).item() == 1.0
    assert contrast.loss(3).item() == pytest.approx((1 + 1 + 4) / 3)
    assert contrast.loss(99).item() == pytest.approx((4 + 1 + 1 + 9) / 4)


def test_the_target_of_the_mass_has_no_gradient():
    """Where the gate is the mass already, nothing moves."""
    mass = GateBlockMass([7])
    mass.prepare(SETTINGS.replace(block_size=2), {}, torch.zeros(1, 8, 0))

    class Still:
        def rotate(self, x):
            return x

    from landmark.hf.gate_loss import LayerInputs

    query = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    key = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    key[:, :, 1::2] = key[:, :, 0::2]  # blocks of one text token, whose score is the block's mass
    key.requires_grad_()
    mass.add(LayerInputs(query, key, Still(), 0.5, None))
    mass.loss().backward()
    assert mass.loss().item() == pytest.approx(0, abs=1e-6)
    assert key.grad.abs().max() < 1e-6


def test_compiled_layers_add_the_same():
    """The layers share their graphs, whatever the queries of a batch are."""
    others = [EvidenceQuery(1, 62, (range(1, 3),)), *QUERIES[1:]]
    counts = []
    for layers in (2, 4):
        model = models.landmark_model("llama", SETTINGS, layers=layers)
        model.train()
        expected = [run(model, GateContrast(queries)).losses for queries in (QUERIES, others)]
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compile_layers(model, backend=graphs)
        try:
            for queries, losses in zip((QUERIES, others), expected, strict=True):
                contrast = run(model, GateContrast(queries))
                assert len(contrast.losses) == layers
                for here, there in zip(contrast.losses, losses, strict=True):
                    torch.testing.assert_close(here, there)
                contrast.loss(5).backward()
            counts.append(graphs.frame_count)
        finally:
            for module in model.modules():  # the model is shared
                module._compiled_call_impl = None
    assert counts[0] == counts[1]


def test_queries_of_a_contrast():
    far = [EvidenceQuery(0, 60, (range(n, n + 1),)) for n in range(10)]
    near = [EvidenceQuery(0, 60, (range(50, 57),))]
    cpu = torch.device("cpu")
    assert contrast_queries(near, SETTINGS, 4, cpu) is None
    assert contrast_queries([*near, *far], SETTINGS, 5, cpu) == far[::2]
    assert contrast_queries(far[:1], SETTINGS, 3, cpu) == 3 * far[:1]


def test_questions_whose_evidence_is_far():
    far = QuestionSpan(EvidenceQuery(0, 60, (range(3, 4),)), range(50, 61))
    near = QuestionSpan(EvidenceQuery(0, 60, (range(50, 57),)), range(50, 61))
    cpu = torch.device("cpu")
    assert far_questions([near], SETTINGS, cpu) is None
    assert far_questions([near, far, near], SETTINGS, cpu) == [far]
