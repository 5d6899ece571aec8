"""LoRA adapters and the landmark's embedding, trained together by transformers' Trainer, then used
to generate.

A tiny random model and random rows stand in for yours: replace `tiny_model` and `rows`.
"""

import tempfile

import torch
from convert_model import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import landmark


def rows(count: int = 8, tokens: int = 126) -> list[dict[str, torch.Tensor]]:
    """Text token ids and labels; landmarks are inserted inside the model."""
    ids = torch.randint(3, 512, (count, tokens))
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    """Trains, saves and generates."""
    base = landmark.convert(tiny_model(), block_size=64, top_k=4, mode="all")
    adapters = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["landmark_embedding"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, adapters)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            report_to="none",
            logging_steps=1,
        )
        Trainer(model=model, args=arguments, train_dataset=rows()).train()
        model.save_pretrained(folder)  # the adapters and the landmark's embedding, nothing else

    base.configure_landmark(mode="retrieval", landmark_trained=True)
    model.eval()
    document = torch.randint(3, 512, (1, 700), device=model.device)
    generated = model.generate(input_ids=document, max_new_tokens=5, do_sample=False)
    print(f"generated {generated.shape[1] - document.shape[1]} tokens after {document.shape[1]}")


if __name__ == "__main__":
    main()
