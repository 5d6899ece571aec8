"""What the tests of evaluation and of the command line share: tiny models, and one that knows every
answer.
"""

import types

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import landmark
from chats import CHATML
from landmark.data.tokenizer import train_tokenizer
from landmark.eval.episodes import Question

BLOCK = 16
WORDS = (
    "The grass is green. What is the pass key? The pass key is 12345. The code of the north gate"
)


def tiny_tokenizer():
    return train_tokenizer([WORDS], 300)


def talking_tokenizer():
    """With a chat template, whose two signs are special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(dtype=torch.float64, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_landmark(dtype=torch.float64, layers=2):
    model = landmark.convert(
        tiny_llama(dtype, layers), block_size=BLOCK, top_k=2, local_blocks=2, chunk_tokens=60
    )
    model.config.landmark["landmark_trained"] = True
    return model


def save_models(root):
    """Saves a plain model and the landmark model made of it with their tokenizer, as root/plain and
    root/marked, and that with a chat template as root/talking.
    """
    for name, model, tokenizer in (
        ("plain", tiny_llama(torch.float32), tiny_tokenizer()),
        ("marked", tiny_landmark(torch.float32), tiny_tokenizer()),
        ("talking", tiny_landmark(torch.float32), talking_tokenizer()),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


class Knowing(torch.nn.Module):
    """Stands for a model that gives every answer's tokens the greatest logit, but for rows it is
    told to miss.
    """

    def __init__(self, episodes, misses=()):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace(max_position_embeddings=None)
        self.known = {tuple(q.ids): q for episode in episodes for q in episode.questions}
        self.misses = {tuple(episodes[i].questions[0].ids) for i in misses}

    def forward(self, ids, logits_to_keep=0, **_):
        logits = torch.zeros(*ids.shape, 320)
        for row in range(len(ids)):
            found, end = self._question(ids[row].tolist())
            wrong = tuple(found.ids) in self.misses
            for place in range(end - found.answered, end):
                last = place == end - 1
                logits[row, place - 1, ids[row, place] + (1 if wrong and last else 0)] = 1
        return types.SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def _question(self, ids) -> tuple[Question, int]:
        for question in self.known.values():
            size = len(question.ids)
            for end in range(len(ids), size - 1, -1):
                if tuple(ids[end - size : end]) == tuple(question.ids):
                    return question, end
        raise AssertionError("asked for something else")
