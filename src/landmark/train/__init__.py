"""Training from scratch and fine-tuning, on the Trainer of transformers."""
