"""Tiny transformers trained from seeds on one text: models whose layers have known counterparts.

A small Llama of transformers and a byte-level BPE tokenizer, written as an ordinary model folder,
so that it is loaded and read like any other. All seeds share the tokenizer and differ in the
initial weights and in the order of the text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field
from saelab_experiments.damage import tune_
from torch import Tensor

from saelab.config import Config
from saelab.models.convert import quiet_transformers

END, START = "<|end|>", "<|start|>"


class TinyConfig(Config):
    """Size and training of a tiny transformer."""

    vocabulary: int = Field(1024, ge=260)
    """Of the tokenizer: 256 bytes, two marks, the rest merges."""
    n_layers: int = Field(6, gt=0)
    d_model: int = Field(128, gt=0)
    heads: int = Field(4, gt=0)
    context: int = Field(256, ge=2)
    """Length of a training window, and the longest one that the model takes."""
    steps: int = Field(gt=0)
    batch: int = Field(8, gt=0)
    """Windows per step."""
    lr: float = Field(3e-3, gt=0)


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Return a fast byte-level BPE tokenizer of transformers, learnt from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, bos_token=START, pad_token=END
    )


def windows_of(tokenizer: Any, texts: Sequence[str], length: int) -> Int[Tensor, "n pos"]:
    """Return the texts' tokens, joined with the end mark, in windows of equal length; the rest is
    dropped."""
    end = tokenizer.eos_token_id
    ids = [i for run in tokenizer(list(texts)).input_ids for i in (*run, end)]
    n = len(ids) // length
    return torch.tensor(ids[: n * length], dtype=torch.int64).reshape(n, length)


def new_network(config: TinyConfig, vocabulary: int, seed: int) -> Any:
    """Return an untrained network; its weights depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    network: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.d_model,
            intermediate_size=3 * config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.02 if parameter.shape[0] == vocabulary
                                else noise * (0.5 / parameter.shape[1]) ** 0.5)  # fmt: skip
    return network


def train_tiny(
    config: TinyConfig,
    tokenizer: Any,
    windows: Int[Tensor, "n pos"],
    held: Int[Tensor, "m pos"],
    *,
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """Train a network from a seed and write it, with its tokenizer, as a model folder.

    Return its loss on held windows and the unigram model's, in nats per token.
    """
    network = new_network(config, len(tokenizer), seed)
    tune_(network, windows, steps=config.steps, batch=config.batch, lr=config.lr, seed=seed)
    with quiet_transformers():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"loss": loss_on(network, held), "unigram": unigram_loss(windows, held, len(tokenizer))}


@torch.no_grad()
def loss_on(network: Any, windows: Int[Tensor, "n pos"]) -> float:
    """Return the mean loss on windows, in nats per token."""
    losses = [float(network(input_ids=part, labels=part).loss) * len(part)
              for part in windows.split(8)]  # fmt: skip
    return sum(losses) / len(windows)


def unigram_loss(seen: Int[Tensor, "n pos"], held: Int[Tensor, "m pos"], vocabulary: int) -> float:
    """Return the loss of the seen tokens' frequencies, each with one count more, on held windows
    (as `loss_on`, without their first tokens), in nats per token."""
    counts = torch.bincount(seen.flatten(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held[:, 1:].flatten()].mean())
