"""Losses on the gate and from a teacher in a run: they are logged, resumed, and do their work."""

import shutil

import pytest
import torch
from toy import silent, toy_recipe
from transformers import AutoModelForCausalLM

import landmark
from landmark.config import LandmarkConfig
from landmark.data.episodes import RowQuestion
from landmark.data.rows import stack
from landmark.data.tokenizer import load_tokenizer
from landmark.hf.attention import FullPass
from landmark.hf.gate_loss import CONTRAST_TOKENS, QUESTION_TOKENS, QuestionSpan
from landmark.hf.recall import EvidenceQuery
from landmark.train import trainer
from landmark.train.gate import evidence_queries, forced_blocks, gate_losses, question_spans
from landmark.train.loss import divergence
from landmark.train.prepare import prepare_rows
from landmark.train.run import train
from landmark.train.settings import RetrievalSettings
from landmark.train.trainer import LandmarkTrainer


def losses(summary):
    return [entry["loss"] for entry in summary["losses"]]


def test_losses_on_the_gate_are_logged_and_resumed(books, scratch, tmp_path):
    """With micro-batches and another mode in half of the steps."""
    lines = []
    recipe = toy_recipe(
        steps=4, save_every=2, contrast=0.5, block_mass=0.2, all_blocks=0.5, micro_batch=2
    )
    options = {"recipe": recipe, "tokenizer": str(scratch[0])}
    whole = train(str(books), tmp_path, report=lines.append, **options)
    logged = [line for line in lines if "  lr " in line]
    assert len(logged) == 4
    assert all(" block mass " in line for line in logged)
    assert any(" contrast " in line for line in logged)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    again = train(str(books), tmp_path, resume=True, report=silent, **options)
    assert losses(again) == losses(whole)
    plain = toy_recipe(steps=4, all_blocks=0.5, micro_batch=2)
    without = train(
        str(books), tmp_path / "plain", recipe=plain, tokenizer=str(scratch[0]), report=silent
    )
    assert losses(without)[0] < losses(whole)[0]


def test_the_losses_are_added_with_their_weights(books, scratch, tmp_path, monkeypatch):
    noted = {}
    stock = LandmarkTrainer._note

    def noting(self, name, loss):
        noted[name] = loss.item()
        stock(self, name, loss)

    monkeypatch.setattr(LandmarkTrainer, "_note", noting)
    options = {"tokenizer": str(scratch[0]), "report": silent}
    found = {}
    for name, changes in {
        "none": {},
        "contrast": {"contrast": 2.0},
        "joint": {"joint_contrast": 4.0, "retrieval_layers": [0, 1]},
        "text": {"text_contrast": 3.0, "retrieval_heads": [[0, 1], [1, 0]]},
        "mass": {"block_mass": 3.0},
    }.items():
        recipe = toy_recipe(steps=1, position_gap=0, episodes=1.0, **changes)
        summary = train(str(books), tmp_path / name, recipe=recipe, **options)
        found[name] = losses(summary)[0]
    assert found["contrast"] - found["none"] == pytest.approx(2 * noted["contrast_loss"], abs=1e-3)
    joint = noted["joint_contrast_loss"]
    assert found["joint"] - found["none"] == pytest.approx(4 * joint, abs=1e-3)
    text = noted["text_contrast_loss"]
    assert found["text"] - found["none"] == pytest.approx(3 * text, abs=1e-3)
    assert found["mass"] - found["none"] == pytest.approx(3 * noted["block_mass_loss"], abs=1e-3)


def test_contrast_teaches_to_retrieve(books, scratch, tmp_path):
    """A few steps of it alone raise the recall of the heads that do best."""
    recall = {}
    for weight in (0.0, 5.0):
        recipe = toy_recipe(
            steps=60, lr=3e-3, episodes=1.0, contrast=weight, top_k=1, contrast_heads=2
        )
        options = {"tokenizer": str(scratch[0]), "report": silent}
        summary = train(str(books), tmp_path / str(weight), recipe=recipe, **options)
        layers = summary["evaluations"][-1]["episodes_recall"]
        recall[weight] = max(max(layer["heads"]) for layer in layers)
    assert recall[5.0] > recall[0.0] + 0.1


def test_layers_learn_to_choose_together(books, scratch, tmp_path):
    """The saved model names the layers, and what is logged falls."""
    recipe = toy_recipe(
        steps=60, lr=3e-3, episodes=1.0, joint_contrast=5.0, retrieval_layers=[1], log_every=10
    )
    lines = []
    train(str(books), tmp_path, recipe=recipe, tokenizer=str(scratch[0]), report=lines.append)
    logged = [
        float(line.split("joint contrast ")[1].split()[0]) for line in lines if "  lr " in line
    ]
    assert logged[-1] < 0.8 * logged[0]
    assert landmark.load(tmp_path).landmark.retrieval_layers == (1,)


@pytest.mark.parametrize(
    ("loss", "missing"),
    [("joint_contrast", "retrieval_layers"), ("text_contrast", "retrieval_heads")],
)
def test_a_contrast_needs_who_chooses(books, scratch, tmp_path, loss, missing):
    with pytest.raises(ValueError, match=f"{loss}: expected a model with {missing}, got none"):
        train(
            str(books),
            tmp_path,
            recipe=toy_recipe(**{loss: 1.0}),
            tokenizer=str(scratch[0]),
            report=silent,
        )


def test_questions_are_scored_by_their_last_tokens():
    asked = [
        RowQuestion(range(10, 80), range(70, 80), (range(1, 3),)),
        RowQuestion(range(90, 97), range(95, 97), (range(1, 3),)),
        RowQuestion(range(98, 99), range(98, 99), (range(1, 3),)),
    ]
    assert question_spans([[], asked]) == [
        QuestionSpan(EvidenceQuery(1, 69, (range(1, 3),)), range(70 - QUESTION_TOKENS, 70)),
        QuestionSpan(EvidenceQuery(1, 94, (range(1, 3),)), range(90, 95)),
        QuestionSpan(EvidenceQuery(1, 97, (range(1, 3),)), range(97, 98)),
    ]


def test_queries_are_those_that_predict_an_answer(books, scratch, tmp_path):
    tokenizer = load_tokenizer(scratch[0])
    prepared = prepare_rows(str(books), tmp_path, toy_recipe(), tokenizer, block_size=16)
    rows = [group[0] for group in prepared.train]
    batch = stack([(row,) for row in rows], answers=True)
    found = evidence_queries(batch["questions"])
    codes = batch["answers"] & (batch["input_ids"] != tokenizer.convert_tokens_to_ids("Ġ"))
    assert codes.sum() < batch["answers"].sum(), "the space before a code needs no evidence"
    expected = codes.nonzero() - torch.tensor([0, 1])
    assert sorted([query.row, query.token] for query in found) == expected.tolist()
    more = evidence_queries(batch["questions"], before=3)
    assert len(more) == len(found) + 3 * sum(len(row.questions) for row in rows)


@pytest.mark.parametrize("queries", [1, 20])
def test_a_contrast_is_taken_at_as_many_tokens_as_the_recipe_says(
    books, scratch, tmp_path, queries
):
    tokenizer = load_tokenizer(scratch[0])
    prepared = prepare_rows(str(books), tmp_path, toy_recipe(), tokenizer, block_size=16)
    asking = [group[0] for group in prepared.train if group[0].questions][:3]
    batch = stack([(row,) for row in asking], answers=True)
    retrieval = RetrievalSettings(contrast=1.0, contrast_queries=queries)
    found = gate_losses(batch, retrieval, LandmarkConfig(block_size=16), draw="0")
    assert len(found.contrast.queries) == 3 * queries


def test_forced_evidence_falls_to_none(books, scratch, tmp_path):
    tokenizer = load_tokenizer(scratch[0])
    prepared = prepare_rows(str(books), tmp_path, toy_recipe(), tokenizer, block_size=16)
    batch = stack([(group[0],) for group in prepared.train], answers=True)
    settings = LandmarkConfig(block_size=16)
    counts = []
    for done in (0.0, 0.2, 0.3, 0.4, 0.9):
        retrieval = RetrievalSettings(forced=1.0, forced_until=0.4)
        drawn = [
            forced_blocks(batch, retrieval, settings, done=done, draw=f"{draw}")
            for draw in range(20)
        ]
        kept = [0 if found is None else int((found >= 0).any(-1).sum()) for found in drawn]
        counts.append(sum(kept))
    queries = evidence_queries(batch["questions"], before=CONTRAST_TOKENS)
    assert counts[0] == 20 * len({(query.row, query.token) for query in queries})
    assert counts[0] > counts[1] > counts[2] > 0
    assert counts[3:] == [0, 0]
    found = forced_blocks(batch, RetrievalSettings(forced=1.0), settings, done=0.0, draw="")
    for query in evidence_queries(batch["questions"]):
        expected = {token // 15 for tokens in query.evidence for token in tokens}
        kept = found[query.row, query.token].tolist()
        assert {block for block in kept if block >= 0} == set(sorted(expected)[:4])
    assert forced_blocks(batch, RetrievalSettings(), settings, done=0.0, draw="") is None


def test_forced_evidence_is_kept_in_a_run(books, scratch, tmp_path, monkeypatch):
    """By all tokens that predict an answer, in the steps of mode ``top_k``, until it is 0."""
    seen = []
    stock = FullPass.attend

    def noting(self, *args):
        if torch.is_grad_enabled():
            seen.append((self.settings.mode, self.forced))
        return stock(self, *args)

    monkeypatch.setattr(FullPass, "attend", noting)
    recipe = toy_recipe(steps=8, episodes=1.0, all_blocks=0.5, forced=1.0, forced_until=0.5)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    train(str(books), tmp_path / "forced", **options)
    half = len(seen) // 2
    assert {mode for mode, _ in seen[:half]} == {"all", "top_k"}
    assert all((forced is not None) == (mode == "top_k") for mode, forced in seen[:half])
    assert all(forced is None for _, forced in seen[half:])


def test_a_model_keeps_forced_blocks(scratch):
    """They are counted from the row's first text; slots of landmarks and padding have none."""
    model = AutoModelForCausalLM.from_pretrained(scratch[0]).double()
    model.configure_landmark(mode="top_k", top_k=1, local_blocks=0)
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 70))
    free = model(ids).logits
    best = []

    def noting(self, *args):
        best.append(self.forced)
        return stock(self, *args)

    stock = FullPass.attend
    forced = torch.full((2, 70, 1), -1)
    assert torch.equal(model(ids, forced_blocks=forced).logits, free)
    forced[0, 65] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullPass, "attend", noting)
        kept = model(ids, forced_blocks=forced).logits
    width = 70 + 70 // 15
    expected = torch.full((2, width, 1), -1)
    expected[0, 65 + 65 // 15] = 1
    assert torch.equal(best[0], expected)
    assert torch.equal(kept[1], free[1])
    assert torch.equal(kept[0, :65], free[0, :65])
    every = [model(ids, forced_blocks=torch.where(forced < 0, -1, block)) for block in range(4)]
    assert any(not torch.equal(each.logits[0, 65:], free[0, 65:]) for each in every)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :7] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullPass, "attend", noting)
        model(ids, attention_mask=mask, forced_blocks=forced)
    assert (best[-1] >= 0).nonzero().tolist() == [[0, 58 + 58 // 15, 0]]
    model.configure_landmark(mode="all")
    assert torch.equal(model(ids, forced_blocks=forced).logits, model(ids).logits)


def test_divergence_is_that_of_the_distributions():
    torch.manual_seed(0)
    ours = torch.randn(2, 3, 7, dtype=torch.float64)
    theirs = torch.randn(2, 3, 9, dtype=torch.float64)
    kept = torch.tensor([[True, False, True], [False, False, True]])
    expected = []
    for row, column in kept.nonzero().tolist():
        p = theirs[row, column, :7].softmax(-1)
        q = ours[row, column].softmax(-1)
        expected.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)))
    assert divergence(ours, theirs, kept).item() == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert divergence(ours, ours, kept).item() == pytest.approx(0, abs=1e-6)
    assert divergence(ours, theirs, torch.zeros_like(kept)).item() == 0


@pytest.mark.parametrize("episodes", [0.0, 0.5])
def test_the_stock_model_is_a_teacher(twin, books, tmp_path, episodes):
    """At first the landmark model differs from it; a heavy weight keeps it near."""
    lines = {}
    after = {}
    for weight in (0.0, 50.0):
        lines[weight] = []
        recipe = toy_recipe(
            steps=12,
            lr=3e-3,
            episodes=episodes,
            teacher="stock",
            teacher_weight=weight,
            teacher_share=0.5,
            micro_batch=2,
        )
        train(
            str(books),
            tmp_path / str(weight),
            recipe=recipe,
            model=str(twin[0]),
            report=lines[weight].append,
        )
        last = [line for line in lines[weight] if "from the teacher" in line][-1]
        after[weight] = float(last.split("from the teacher ")[1].split()[0])
    assert after[50.0] < 0.7 * after[0.0]


def test_a_teacher_of_its_own_name_and_a_plain_pupil(twin, books, tmp_path):
    """A plain model that learns from itself has no divergence at the first step."""
    lines = []
    recipe = toy_recipe(steps=1, teacher=str(twin[0]), teacher_share=1.0)
    options = {"model": str(twin[0]), "plain": True, "report": lines.append}
    train(str(books), tmp_path, recipe=recipe, **options)
    (line,) = [line for line in lines if "from the teacher" in line]
    assert float(line.split("from the teacher ")[1].split()[0]) < 1e-3


def test_a_teacher_sees_what_it_was_trained_on(twin, books, tmp_path, monkeypatch):
    """Not more positions, and no answers."""
    seen = []
    stock = LandmarkTrainer._divergence

    def noting(self, inputs, logits):
        forward = self._teacher.forward

        def watched(*args, **kwargs):
            seen.append((kwargs["input_ids"].shape[1], kwargs["logits_to_keep"].tolist()))
            return forward(*args, **kwargs)

        self._teacher.forward = watched
        return stock(self, inputs, logits)

    monkeypatch.setattr(LandmarkTrainer, "_divergence", noting)
    model = AutoModelForCausalLM.from_pretrained(twin[0])
    model.config.max_position_embeddings = 100
    model.save_pretrained(tmp_path / "short")
    load_tokenizer(twin[0]).save_pretrained(tmp_path / "short")
    recipe = toy_recipe(steps=2, teacher=str(tmp_path / "short"), teacher_share=0.2)
    train(str(books), tmp_path / "out", recipe=recipe, model=str(twin[0]), report=silent)
    assert all(tokens == 100 and len(columns) == 20 for tokens, columns in seen)
    assert seen[0][1] != seen[-1][1]


def test_a_teacher_does_not_read_rows_whose_positions_start_again(
    twin, books, tmp_path, monkeypatch
):
    """It would read them at other distances."""
    read = []
    kept = []
    stock = LandmarkTrainer._divergence

    def noting(self, inputs, logits):
        forward = self._teacher.forward

        def watched(*args, **kwargs):
            read.append(kwargs["input_ids"].tolist())
            return forward(*args, **kwargs)

        self._teacher.forward = watched
        asked = [len(questions) > 0 for questions in inputs["questions"]]
        kept.append(inputs["input_ids"][~torch.tensor(asked)].tolist())
        found = stock(self, inputs, logits)
        self._teacher.forward = forward
        return found

    monkeypatch.setattr(LandmarkTrainer, "_divergence", noting)
    recipe = toy_recipe(
        episodes=0.7, micro_batch=2, position_span=112, teacher="stock", teacher_share=1.0
    )
    train(str(books), tmp_path, recipe=recipe, model=str(twin[0]), report=silent)
    assert read == [rows for rows in kept if rows]
    counts = [len(rows) for rows in kept]
    assert min(counts) == 0 < max(counts)


def test_reading_held_out_questions_tells_of_itself(books, scratch, tmp_path, monkeypatch):
    """It takes long where rows are long, and is counted as the batches before it are."""
    seen = []
    monkeypatch.setattr(trainer, "RECALL_TOKENS", 1)
    recipe = toy_recipe(steps=1, episodes=1.0)
    train(
        str(books),
        tmp_path,
        recipe=recipe,
        tokenizer=str(scratch[0]),
        report=silent,
        progress=lambda what, done, total: seen.append((what, done)),
    )
    counts = [done for what, done in seen if what == "batches of held-out rows"]
    rows = counts[-1]
    assert rows > 32
    assert counts[-rows:] == list(range(1, rows + 1))
