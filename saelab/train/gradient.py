"""Training by gradient steps: one member's optimiser, counters, metrics and checkpoints.

A member owns all of its state and draws nothing from shared randomness, so what it becomes does not
depend on who else is trained on the stream.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saelab.clock import now
from saelab.errors import NonFiniteError, ShapeError
from saelab.protocols import Loss, Store
from saelab.train import checkpoint, resample, schedules
from saelab.train.config import ADAM_EPS, Fitted, Member, TrainConfig
from saelab.train.journal import Journal, compare_machine, hand_over, machine
from saelab.train.trainee import Trainee
from saelab.types import Batch


class GradientTrainer:
    """One member in training, on inputs scaled to mean norm √d_in."""

    def __init__(self, member: Member, store: Store, config: TrainConfig) -> None:
        """Take a copy of the member's dictionary.

        Raises ShapeError on a site of another width, and ConfigError if dead latents are to be
        resampled of a type that has no rule for it.
        """
        given: Trainee = member.dictionary  # pyright: ignore[reportAssignmentType]
        width = store.width(member.site)
        if given.d_in != width:
            raise ShapeError(
                f"{member.name}: site {member.site!r} has width {width}, but the dictionary takes "
                f"{given.d_in}. Is this the site that it is meant for?"
            )
        if config.resample_every is not None:
            resample.require_rule(member.name, given)
        self.config = config
        self.scale = input_scale(store, member.site)
        started = given.folded(1 / self.scale) if member.initialised else copy.deepcopy(given)
        self.dictionary: Trainee = started
        self.member = replace(member, dictionary=started)
        self.device = given.W_dec.device
        self.lr = member.lr or schedules.default_lr(given.d_sae)
        self.generator = torch.Generator().manual_seed(member.seed)
        groups = _groups(started)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(
            groups,
            lr=self.lr,
            betas=config.betas,
            eps=ADAM_EPS,
            fused=self.device.type in {"cpu", "cuda"},
        )
        self.silent = torch.zeros(given.d_sae, dtype=torch.int64, device=self.device)
        """Tokens since each latent fired."""
        self.done = 0
        """Steps taken."""
        self.n_revived = 0
        """Dead latents resampled since the last line of metrics."""
        self.resumed_at = 0
        self.init_seconds: float | None = 0.0
        """Spent in `init_`; None where the checkpoint does not say."""
        self.journal = Journal(member.draft)

    # ------------------------------------------------------------------------------------- steps

    @property
    def is_full(self) -> bool:
        """Whether it takes no more steps though the run goes on."""
        return self.done == self.config.steps

    @property
    def needs_init(self) -> bool:
        """Whether `init_` must be called before the first step."""
        return self.done == 0 and not self.member.initialised

    def init_(self, sample: Tensor) -> None:
        """Initialise the weights from a sample of scaled activations."""
        started = now()
        self.dictionary.init_(sample, self.generator)
        self.init_seconds = now() - started

    def step(self, batch: Batch) -> bool:
        """Take one step on a scaled batch; return whether a line of metrics was written."""
        config, dictionary = self.config, self.dictionary
        dead = self.silent >= config.window
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.autocast == "bfloat16"
        ):
            loss = dictionary.loss(batch, self.done / config.steps, dead)
        self._check_finite(loss.total, "loss")
        self.optimizer.zero_grad()
        loss.total.backward()
        dictionary.constrain_grad_()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._check_finite(norm, "gradient")
        if norm > config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
        lr = self._set_lr()
        self.optimizer.step()
        dictionary.constrain_()
        dictionary.observe_(loss)
        self.silent += len(batch)
        self.silent[loss.fired] = 0
        self.done += 1
        if config.resamples_after(self.done):
            self._resample(batch)
        if self.done % config.log_every and self.done != config.steps:
            return False
        self._log(loss, float(norm), lr)
        return True

    def _resample(self, batch: Batch) -> None:
        """Point dead latents at the batch's badly reconstructed rows; each is new afterwards.

        Dead latents beyond the rows that have an error wait for the next time.
        """
        dead = (self.silent >= self.config.window).nonzero()[:, 0]
        if len(dead) == 0:
            return
        self._check_weights()
        self.optimizer.zero_grad()  # gradients are used up: their memory is that of a copy
        errors = resample.row_errors(self.dictionary, batch)
        self._check_finite(errors.sum(), "reconstruction error")
        rows = resample.draw_rows(errors, len(dead), self.generator)
        ids = dead[: len(rows)]
        self.dictionary.revive_(ids, batch.x[rows])
        resample.forget_moments_(self.optimizer, self.dictionary, ids)
        self.silent[ids] = 0
        self.n_revived += len(ids)

    def _set_lr(self) -> float:
        middle = (self.done + 0.5) / self.config.steps
        factor = schedules.lr_factor(middle, warmup=self.config.warmup, decay=self.config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * group["factor"]
        return self.lr * factor

    def _check_finite(self, value: Tensor, what: str) -> None:
        if not bool(torch.isfinite(value)):
            steps = self.config.steps
            raise NonFiniteError(
                f"{self.member.name}: the {what} became {float(value.detach())} "
                f"at step {min(self.done + 1, steps)} of {steps} (peak lr {self.lr:.3g}). "
                f"Try a lower lr, for example {self.lr / 3:.1g}, or a longer warmup."
            )

    def _check_weights(self) -> None:
        largest = torch.stack([p.detach().abs().amax() for p in self.parameters])
        self._check_finite(largest.amax(), "largest weight")

    # ----------------------------------------------------------------------------------- metrics

    def _log(self, loss: Loss, norm: float, lr: float) -> None:
        line = {
            "step": self.done,
            "tokens": self.done * self.config.batch,
            "loss": float(loss.total.detach()),
            **{name: float(term.detach()) for name, term in loss.terms.items()},
            "l0": float(loss.l0),
            "dead": float((self.silent >= self.config.window).float().mean()),
            "grad_norm": norm,
            "lr": lr,
        }
        if self.config.resample_every is not None:
            line["revived"] = self.n_revived / self.dictionary.d_sae
            self.n_revived = 0
        self.journal.add(line)

    # ------------------------------------------------------------------------------- checkpoints

    def checkpoint(self) -> None:
        """Write the whole state between two steps; nothing without a draft."""
        if self.member.draft is None:
            return
        adam = self.optimizer.state_dict()["state"]
        tensors = {f"weights.{name}": t for name, t in self.dictionary.state_dict().items()}
        tensors |= {f"adam.{i}.{name}": t for i, s in adam.items() for name, t in s.items()}
        tensors |= {"silent": self.silent, "generator": self.generator.get_state()}
        state = {"step": self.done, "n_revived": self.n_revived, **machine()}
        state["init_seconds"] = self.init_seconds
        checkpoint.write(self.member.draft.scratch, tensors, state)

    def discard(self) -> None:
        """Remove what was written of this member: it diverged."""
        if self.member.draft is not None:
            self.member.draft.discard()

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one, and cut the metrics at its step."""
        if self.member.draft is None:
            return
        found = checkpoint.read(self.member.draft.scratch)
        if found is not None:
            tensors, state = found
            self._restore(tensors)
            self.done = self.resumed_at = state["step"]
            self.n_revived = state.get("n_revived", 0)
            self.init_seconds = state.get("init_seconds")
            compare_machine(self.member.name, state)
        self.journal.cut(self.done)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        weights, adam = {}, {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if head == "weights":
                weights[rest] = tensor
            elif head == "adam":
                number, _, key = rest.partition(".")
                adam.setdefault(int(number), {})[key] = tensor
        self.dictionary.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        self.silent.copy_(tensors["silent"])
        self.generator.set_state(tensors["generator"])

    # ------------------------------------------------------------------------------------ finish

    def finish(self, calibration: Iterable[Batch]) -> Fitted:
        """Calibrate, fold the input scale in, save into the draft; return the trained member."""
        self._check_weights()
        self.dictionary.calibrate(calibration)
        trained = self.dictionary.folded(self.scale)
        last = self.journal.lines[-1]
        facts = hand_over(self.member, trained, self.scale) | {
            "lr": self.lr,
            "dead_window": self.config.window,
            **{f"last_{key}": last[key] for key in ("loss", "l0", "dead")},
        }
        return Fitted(self.member.name, trained, self.journal.lines, facts)


def _groups(dictionary: Trainee) -> list[dict[str, Any]]:
    """Return the parameters grouped by their factor on the learning rate."""
    factors = dictionary.lr_factors()
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in dictionary.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [{"params": some, "factor": factor} for factor, some in groups.items()]


def input_scale(store: Store, site: str) -> float:
    """Return the constant that brings the site's training rows to mean norm √d."""
    mean_norm = store.stats(site).mean_norm
    if not (math.isfinite(mean_norm) and mean_norm > 0):
        raise NonFiniteError(
            f"site {site!r} has mean norm {mean_norm}: activations should be finite and not all 0. "
            "Look at the store with `saelab list`, or harvest it again."
        )
    return store.width(site) ** 0.5 / mean_norm
