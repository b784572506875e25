"""Tiny random Hugging Face models with a byte tokenizer, quickly written to a folder."""

from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with a few merges; return its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    words = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        model_max_length=16,
    ).save_pretrained(folder)
    return len(words)


def _save(config: Any, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name or "ln_" in name:
                weight.add_(0.2 * torch.randn(weight.shape))
            else:
                weight.mul_(6.0)
    network.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """Write a Llama of three layers: RMSNorm, gated MLP, grouped heads, rotary positions."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return _save(config, folder)


def save_gpt2(folder: Path) -> Path:
    """Write a GPT-2 of three layers: LayerNorm, biases, joint query-key-value, learnt positions."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=save_tokenizer(folder),
        n_embd=24,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
    )
    return _save(config, folder)
