"""Checkpoints of other programs become Hugging Face folders: fairseq's megatron_11b, NVIDIA's Megatron-LM, GGUF."""
