"""Greedy construction: a row that the atoms so far code badly becomes an atom itself.

    for each row x, in order:
        r = what k steps of pursuit with the atoms leave of x
        if error(x, r) > threshold:  append x / ‖x‖ to the atoms

Each decision depends on all before it, so near-duplicates never enter together, and the loop is
slow: `construct_plainly` is that loop. `construct` makes the same decisions with large products. It
pursues a block of rows with the atoms at its start; a code then holds until an atom comes that
would have been chosen at one of its steps. The score of a new atom a at step t of a row's matching
pursuit costs no pursuit,

    ⟨r_t, a⟩ = ⟨x, a⟩ − Σ_{s<t} v_s ⟨d_{j_s}, a⟩

and where it stays below |v_t| at every step, the row's code and error are what they were. The other
rows are stale, and pursued again when their turn comes, a few at a time. Orthogonal matching
pursuit has no such scores to hand: there every new atom makes all rows stale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.ops.pursuit import (
    GRAM_BYTES,
    NOISE,
    gram_of,
    pursue,
    pursue_plainly,
    sum_repeats,
)
from saelab.ops.refit import Refit
from saelab.ops.sparse import decode_ragged

BLOCK = 256
"""Rows that are pursued together first."""
LOOK = 64
"""Most stale rows that are pursued again together. Fewer are while atoms keep coming."""
SPARE = 512
"""Atoms that room is made for at a time."""

RowError = Callable[[Float[Tensor, "n d"], Float[Tensor, "n d"]], Float[Tensor, " n"]]
"""A row's error from the row and its residual."""


@dataclass(frozen=True)
class Rule:
    """When a row becomes an atom."""

    k: int
    """Most steps of pursuit."""
    refit: Refit
    error: RowError
    threshold: float
    limit: int
    """Most atoms; with so many, construction ends."""


@dataclass(frozen=True)
class Constructed:
    """What a construction came to."""

    atoms: Float[Tensor, "n_atoms d"]
    """Those given, then the new ones."""
    taken: Int[Tensor, " m"]
    """The rows that became atoms, in order."""
    errors: Float[Tensor, " n_seen"]
    """Each row's error at its turn; rows after the one that filled the dictionary have none."""


@torch.no_grad()
def construct(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "n_atoms d"], rule: Rule
) -> Constructed:
    """Take in rows in order; what comes out does not depend on how they are split into calls.

    That holds up to rounding: scores that differ by less may fall either way. A row without length
    has no direction, and never becomes an atom.
    """
    growing = _Growing(atoms, rule, len(x))
    taken: list[int] = []
    errors: list[Tensor] = []
    for start in range(0, len(x), BLOCK):
        if growing.n == rule.limit:
            break
        block = _Block(x[start : start + BLOCK], growing, rule)
        taken += [start + row for row in block.run()]
        errors.append(block.errors[: block.seen])
    found = torch.tensor(taken, dtype=torch.int64, device=x.device)
    return Constructed(growing.atoms[: growing.n], found, torch.cat([x.new_zeros(0), *errors]))


@torch.no_grad()
def construct_plainly(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "n_atoms d"], rule: Rule
) -> Constructed:
    """Do as `construct`, by the obvious loop over rows: its reference."""
    taken, errors = [], []
    for number, row in enumerate(x.split(1)):
        if len(atoms) == rule.limit:
            break
        residual = row
        if len(atoms):
            order, values = pursue_plainly(row, atoms, rule.k, sign="abs", refit=rule.refit)
            residual = row - decode_ragged(sum_repeats(order, values, len(atoms)), atoms)
        errors.append(_error(row, residual, rule))
        if errors[-1] > rule.threshold:
            atoms = torch.cat([atoms, row / row.norm()])
            taken.append(number)
    found = torch.tensor(taken, dtype=torch.int64, device=x.device)
    return Constructed(atoms, found, torch.cat([x.new_zeros(0), *errors]))


def _error(x: Tensor, residual: Tensor, rule: Rule) -> Tensor:
    """Return the rows' errors; a row that cannot be an atom has none."""
    return rule.error(x, residual).masked_fill(x.square().sum(1) == 0, 0)


@final
class _Growing:
    """Atoms with room for more, and their Gram matrix. Room is rows of zeros: no pursuit takes
    them, so the tables are used as they are."""

    def __init__(self, atoms: Tensor, rule: Rule, rows: int) -> None:
        self.n = len(atoms)
        self._limit = min(rule.limit, self.n + rows)
        self.atoms = atoms.new_zeros(self._room(), atoms.shape[1])
        self.atoms[: self.n] = atoms
        self.gram = gram_of(self.atoms) if rule.refit == "mp" else None

    def _room(self) -> int:
        return min(self._limit, self.n + SPARE)

    def add(self, atom: Float[Tensor, " d"]) -> Float[Tensor, " room"]:
        """Append an atom; return its products with all."""
        if self.n == len(self.atoms):
            self._make_room()
        self.atoms[self.n] = atom
        products = self.atoms @ atom
        if self.gram is not None:
            self.gram[self.n] = self.gram[:, self.n] = products
        self.n += 1
        return products

    def _make_room(self) -> None:
        n, more = self.n, self._room() - self.n
        self.atoms = torch.nn.functional.pad(self.atoms, (0, 0, 0, more))
        if self.gram is not None:
            fits = (n + more) ** 2 * self.gram.element_size() <= GRAM_BYTES
            self.gram = torch.nn.functional.pad(self.gram, (0, more, 0, more)) if fits else None


@final
class _Block:
    """Rows that are gone through in order, with the codes that hold of them."""

    def __init__(self, x: Tensor, growing: _Growing, rule: Rule) -> None:
        self.x, self.growing, self.rule = x, growing, rule
        self.seen = 0
        """Rows whose turn is over."""
        self.errors = x.new_zeros(len(x))
        self._order = torch.full((len(x), rule.k), -1, dtype=torch.int64, device=x.device)
        self._values = x.new_zeros(len(x), rule.k)
        self._stale = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._noise = NOISE * torch.finfo(x.dtype).eps * x.norm(dim=1)
        self._look = LOOK
        self._pursue(torch.arange(len(x), device=x.device))

    def run(self) -> list[int]:
        """Go through all rows, or until there is no room; return those that became atoms."""
        taken = []
        while self.growing.n < self.rule.limit:
            ahead = self._stale | (self.errors > self.rule.threshold)
            ahead[: self.seen] = False
            row = int(ahead.int().argmax())
            if not ahead[row]:
                break
            if self._stale[row]:
                self._pursue(row + self._stale[row:].nonzero()[: self._look, 0])
                self._look = min(2 * self._look, LOOK)
            else:
                taken.append(row)
                self.seen = row + 1
                self._take(row)
                self._look = max(self._look // 2, 1)
        else:
            return taken
        self.seen = len(self.x)
        return taken

    def _pursue(self, rows: Int[Tensor, " m"]) -> None:
        """Pursue these rows with the atoms that there are."""
        x, growing = self.x[rows], self.growing
        self._stale[rows] = False
        if growing.n == 0:
            self.errors[rows] = _error(x, x, self.rule)
            return
        k, refit = self.rule.k, self.rule.refit
        trace = pursue(x, growing.atoms, k, sign="abs", refit=refit, gram=growing.gram)
        self._order[rows], self._values[rows] = trace.order, trace.coefficients
        self.errors[rows] = _error(x, trace.residual, self.rule)

    def _take(self, row: int) -> None:
        """Make a row an atom; find which rows after it would have chosen that."""
        atom = self.x[row] / self.x[row].norm()
        products = self.growing.add(atom)
        later = slice(row + 1, None)
        if self.rule.refit != "mp":
            self._stale[later] = True
            return
        order, values = self._order[later], self._values[later]
        went = order >= 0
        steps = values * products[order.clamp(min=0)]
        scores = (self.x[later] @ atom)[:, None] - (steps.cumsum(1) - steps)
        noise = self._noise[later, None]
        least = torch.where(went, values.abs() - 2 * noise, noise / 2)
        self._stale[later] |= (scores.abs() > least).any(1)
