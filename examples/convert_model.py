"""A landmark model of any RoPE model: convert, save, load, and read a text far longer than the
model was trained on.

Without an argument it uses a tiny random model; pass a folder or a name of the hub for a real one.
"""

import argparse
import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import landmark


def tiny_model() -> Qwen3ForCausalLM:
    """A random model with 512 positions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Converts, saves, loads, reads, generates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub name; by default a tiny random model")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the text")
    arguments = parser.parse_args()

    model = landmark.convert(arguments.model or tiny_model(), block_size=64, top_k=4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = landmark.load(folder)
    print(f"{type(model).__name__}: {model.landmark}")

    model.configure_landmark(landmark_trained=True)  # it is not; this example only shows what runs
    document = torch.randint(3, model.config.vocab_size, (1, arguments.tokens))
    cache = model.read(document)
    print(f"read {cache.get_seq_length()} tokens, {cache.nbytes() / 2**20:.1f} MiB remembered")
    question = torch.cat([document, torch.randint(3, model.config.vocab_size, (1, 5))], dim=1)
    answer = model.generate(question, past_key_values=cache, max_new_tokens=5, do_sample=False)
    print(f"answered with {answer.shape[1] - question.shape[1]} tokens")


if __name__ == "__main__":
    main()
