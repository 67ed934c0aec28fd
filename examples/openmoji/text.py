"""Makes the starter's tokenizer and text encoder: CLIP's conventions, with a vocabulary of a small world."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # of CLIP's 77: enough for all names but a handful, and each layer attends to less padding
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def new_tokenizer(texts: Iterable[str], size: int = 2048) -> CLIPTokenizer:
    """A byte-pair tokenizer laid out as CLIP's: the bytes, the bytes that end a word, the merges, start, end."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", min_frequency=2, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: Any = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    merges = merges[: size - len(tokens) - 2]
    tokens += ["".join(merge) for merge in merges] + [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 128) -> CLIPTextModel:
    """An untrained CLIP text model of three layers: (B, 32) token ids to (B, 32, width) hidden states."""
    start, end = tokenizer.get_vocab()[BOS], tokenizer.get_vocab()[EOS]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)
