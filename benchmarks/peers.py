"""Train one TopK dictionary with a peer library's own training step, on our batches.

    python benchmarks/peers.py sae_lens --rows FOLDER --order FOLDER/order-0.npy --lr 2e-3

Runs in an environment of the peers' own, since they pin other versions than we do:

    pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 "nnsight<0.4"
    pip install --no-deps dictionary-learning==0.1.0
    pip uninstall torchvision      # pulled in by nnsight, and built for another torch

FOLDER holds `train.npy` and `heldout.npy` (rows of one site); the order file holds one row number
of `train.npy` per training row, batch after batch. Each peer keeps its defaults: initialisation,
loss, auxiliary loss, clipping, decoder norm. The optimiser is Adam in all of them. Inputs are
scaled by one constant to a mean norm of √d, as our own trainer does. The learning rate is

- `constant`: no warm-up and no decay;
- `warmup_decay`: linear warm-up over 5 % of the steps, linear decay to 0 over the last 30 %,
  through the peer's own options where it has them;
- `linear`: what sparsify's trainer does with Adam: warm-up, then linear decay to 0 (sparsify only).

Prints one JSON line: held-out fvu (one global mean), seconds, milliseconds per step.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WARMUP, DECAY = 0.05, 0.3
"""Shares of the run in which the learning rate rises and falls."""

PACKAGE = {
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}

Step = Callable[[int, Tensor], None]
Reconstruct = Callable[[Tensor], Tensor]


def sae_lens(args: argparse.Namespace, d: int, steps: int) -> tuple[Step, Reconstruct]:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    scheduled = args.schedule == "warmup_decay"
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=args.d_sae, k=args.k))
    config = SAETrainerConfig(
        total_training_samples=args.batch * steps,
        train_batch_size_samples=args.batch,
        lr=args.lr,
        lr_end=args.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=round(WARMUP * steps) if scheduled else 0,
        lr_decay_steps=round(DECAY * steps) if scheduled else 0,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        device="cpu",
        autocast=False,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        n_batches_for_norm_estimate=1,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(_: int, x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, sae


def dictionary_learning(args: argparse.Namespace, d: int, steps: int) -> tuple[Step, Reconstruct]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    scheduled = args.schedule == "warmup_decay"
    trainer = TopKTrainer(
        steps=steps,
        activation_dim=d,
        dict_size=args.d_sae,
        k=args.k,
        layer=0,
        lm_name="",
        lr=args.lr,
        warmup_steps=round(WARMUP * steps) if scheduled else 0,
        decay_start=round((1 - DECAY) * steps) if scheduled else None,
        device="cpu",
        seed=args.seed,
    )
    return trainer.update, trainer.ae


def sparsify(args: argparse.Namespace, d: int, steps: int) -> tuple[Step, Reconstruct]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    sae = SparseCoder(d, SparseCoderConfig(num_latents=args.d_sae, k=args.k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
    shape = learning_rate_shape(args.schedule, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)

    def step(number: int, x: Tensor) -> None:
        # its Trainer.fit works inside a hook of a language model; these are the calls it makes
        if number == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return step, lambda x: sae(x).sae_out


def learning_rate_shape(schedule: str, steps: int) -> Callable[[int], float]:
    """The learning rate as a share of its peak, by step number."""
    warmup = round(WARMUP * steps)
    fall = {"constant": None, "warmup_decay": round(DECAY * steps), "linear": steps - warmup}
    decay = fall[schedule]
    if decay is None:
        return lambda _: 1.0
    return lambda step: min(1.0, (step + 1) / warmup, max(steps - step, 0) / decay)


def fvu(x: Tensor, reconstruct: Reconstruct) -> float:
    """Σ‖x − x̂‖² / Σ‖x − mean‖² in float64."""
    mean = x.double().mean(0)
    error = total = 0.0
    with torch.no_grad():
        for rows in x.split(4096):
            error += float(((rows - reconstruct(rows)).double() ** 2).sum())
            total += float(((rows.double() - mean) ** 2).sum())
    return error / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("impl", choices=sorted(PACKAGE))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--order", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--seed", type=int, default=0, help="of the initialisation")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train = np.load(args.rows / "train.npy", mmap_mode="r")
    order = np.load(args.order)
    steps, d = len(order) // args.batch, train.shape[1]
    norms = np.linalg.norm(train[: 1 << 16].astype(np.float32), axis=1)
    scale = d**0.5 / float(norms.mean())
    step, reconstruct = globals()[args.impl](args, d, steps)
    seconds = []
    for number in range(steps):
        rows = order[number * args.batch : (number + 1) * args.batch]
        x = torch.from_numpy(train[rows].astype(np.float32)) * scale
        started = time.perf_counter()
        step(number, x)
        seconds.append(time.perf_counter() - started)
    heldout = torch.from_numpy(np.load(args.rows / "heldout.npy").astype(np.float32)) * scale
    print(
        json.dumps(
            {
                "fvu": fvu(heldout, reconstruct),
                "seconds": round(sum(seconds), 1),
                "ms_per_step": round(1e3 * float(np.median(seconds)), 1),
                "version": version(PACKAGE[args.impl]),
            }
        )
    )


if __name__ == "__main__":
    main()
