"""Backbones without a hub: a small GPT-2 or BERT and its tokenizer, trained from scratch on a text file."""
