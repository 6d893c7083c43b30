"""The frozen language model: where it comes from, how DeepSpeed hosts it, what is read from it."""
