"""Tokenizers of the two kinds, learnt from the corpus; the same text gives the same ids every time."""

from collections import Counter
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_LETTERS = 500  # characters that WordPiece knows; a word with another one is [UNK]


def train_tokenizer(kind: str, lines: list[str], vocab_size: int, max_tokens: int) -> Any:
    """A transformers tokenizer: byte-level BPE (gpt2), or cased WordPiece with [CLS] and [SEP] (bert)."""
    from transformers import PreTrainedTokenizerFast

    if kind == "gpt2":
        trained, names = _byte_level_bpe(lines, vocab_size), dict.fromkeys(("unk", "bos", "eos"), END_OF_TEXT)
    else:
        trained, names = _wordpiece(lines, vocab_size), BERT_TOKENS
    specials = {f"{role}_token": token for role, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=max_tokens, **specials)


def _byte_level_bpe(lines: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Unlike GPT-2's own: a first word has the token that it has after a space, which a small corpus can afford better.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _wordpiece(lines: list[str], vocab_size: int) -> Tokenizer:
    """Pieces by BPE with ## before a word's later pieces, as the library's own trainer learns them.

    That trainer numbers the ## letters in an order that differs by run, and breaks ties by number. Here they have
    their numbers beforehand.
    """
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(normalizer.normalize_str(line))
    common = sorted(counts, key=lambda letter: (-counts[letter], letter))
    letters = sorted(letter for letter in common[:_LETTERS] if not letter.isspace())
    later = [f"##{letter}" for letter in letters]

    learner = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, len(BERT_TOKENS) + 2 * len(letters)),
        special_tokens=[*BERT_TOKENS.values(), *later],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    learner.train_from_iterator(lines, trainer)

    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=BERT_TOKENS["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in (BERT_TOKENS["cls"], BERT_TOKENS["sep"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
