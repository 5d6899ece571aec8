"""Read a text once, ask several questions, and see which text was read for each answer. Uses the
bundled model.

python examples/ask.py                      a text of the script's own, about 20k tokens
python examples/ask.py --text FILE "..."    your own text and questions
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

import landmark
from landmark.hf.bundled import model_path

FILLER = "The road went on between the hedges, and nobody was to be seen on it that day. "
CODES = {"north gate": 7312, "old tower": 4096, "white harbour": 2205}


def story(sentences: int = 900) -> str:
    """A long dull text with three codes in it."""
    lines = [FILLER] * sentences
    for place, (name, code) in zip((100, 430, 777), CODES.items(), strict=True):
        lines[place] = f"The code of the {name} is {code}. "
    return "".join(lines)


def main() -> None:
    """Reads, asks, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", help="each ends where the answer begins")
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text() if arguments.text else story()
    questions = arguments.questions or [
        f"What is the code of the {name}? The code of the {name} is" for name in reversed(CODES)
    ]

    model = landmark.load()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    document = tokenizer(text, return_tensors="pt").input_ids
    memory = model.read(
        document, retrieve=False
    )  # local context only, fast; the questions retrieve
    print(f"{document.shape[1]} tokens read")
    for question in questions:
        ids = tokenizer(" " + question, return_tensors="pt", add_special_tokens=False).input_ids
        cache = memory.fork()
        cache.record = True
        both = torch.cat([document, ids], dim=1)
        out = model.generate(both, past_key_values=cache, max_new_tokens=6, do_sample=False)
        print(f"\n{question}{tokenizer.decode(out[0, both.shape[1] :])}")
        for block in most_read(cache):
            print(
                f"  read block {block}:",
                tokenizer.decode(text_of(block, document, model.landmark.text_per_block)),
            )


def most_read(cache: landmark.LandmarkCache, count: int = 3) -> list[int]:
    """The retrieved blocks with the greatest shares of the gate while the answer was written; block
    0 is the sink.
    """
    shares: Counter[int] = Counter()
    for found in cache.retrievals:
        blocks = found.blocks[..., -1, :]
        weights = found.weights[..., -1, :]  # of each call's last token
        for block, weight in zip(
            blocks.flatten().tolist(), weights.flatten().tolist(), strict=True
        ):
            if block > 0:
                shares[block] += weight
    return [block for block, _ in shares.most_common(count)]


def text_of(block: int, document: torch.Tensor, size: int) -> torch.Tensor:
    """The text tokens of a block."""
    return document[0, block * size : (block + 1) * size]


if __name__ == "__main__":
    main()
