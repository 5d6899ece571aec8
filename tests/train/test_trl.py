"""trl's SFTTrainer on a landmark model, as docs/training.md shows it."""

import pytest
import torch
from toy import MODEL

from chats import CHATML, chat
from landmark.config import LandmarkConfig
from landmark.data.chat import Message
from landmark.data.conversations import Conversation, encode_conversations
from landmark.data.tokenizer import train_tokenizer
from landmark.hf.convert import from_config
from landmark.train.loss import text_loss, token_losses
from small_text import sentences

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [
    chat(f"Who went over the river {number}?", f"The old man {number * 7}.") for number in range(8)
]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([sentences(200)], 400)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture
def model(tokenizer):
    from transformers import LlamaConfig

    torch.manual_seed(0)
    fields = {name: value for name, value in MODEL.items() if name != "model_type"}
    config = LlamaConfig(**fields, vocab_size=len(tokenizer), pad_token_id=0)
    return from_config(config, LandmarkConfig(block_size=16, top_k=2, local_blocks=1, mode="all"))


def expected_loss(model, tokenizer):
    """The mean over all tokens of the conversations, each in a pass of its own."""
    conversations = [
        Conversation("a", tuple(Message(**message) for message in row)) for row in ROWS
    ]
    losses = []
    with torch.no_grad():
        for each in encode_conversations(conversations, tokenizer):
            ids = torch.from_numpy(each.ids)[None]
            losses.append(token_losses(model(ids, use_cache=False).logits, ids)[0, 1:])
    labels = torch.ones(1, 1 + sum(map(len, losses)), dtype=torch.long)
    return float(text_loss(torch.cat(losses), labels))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(model, tokenizer, tmp_path, packing):
    """Conversations do not see each other, padded or packed; the loss falls; it retrieves after."""
    expected = expected_loss(model, tokenizer)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=10,
        per_device_train_batch_size=1 if packing else 8,
        max_length=1024 if packing else 128,
        packing=packing,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"messages": row} for row in ROWS]),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    model.configure_landmark(mode="retrieval", landmark_trained=True, trained_length=160)
    ids = tokenizer(sentences(60), return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] == ids.shape[1] + 3
