"""Planted worlds against closed forms: marginals, exclusion, scaling, copula, frames, trees."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from saelab.errors import ConfigError
from saelab.metrics.truth import overlap, overlaps
from saelab.ops.tree import has_children, levels_of, strata
from saelab.run_config import RunConfig
from saelab.store.benchmark import (
    SIZES,
    BenchmarkConfig,
    BenchmarkWorld,
    CodeLaw,
    compensated,
    forest,
    overlap_grad,
    push_apart,
    zipf,
)
from saelab.store.flat import FlatConfig, FlatWorld
from saelab.store.hierarchy import HierarchyConfig, HierarchyWorld, bend
from saelab.store.synthetic import make_world


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def law(q, parents, *, mu=5.0, sigma=0.5, factor=None, scaling=True) -> CodeLaw:
    n = len(q)
    return CodeLaw(
        q=torch.as_tensor(q, dtype=torch.float64), parents=torch.tensor(parents),
        mu=torch.full((n,), mu), sigma=torch.full((n,), sigma),
        factor=torch.zeros(n, 0) if factor is None else factor, parent_scaling=scaling,
    )  # fmt: skip


def achieved(q: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """p̂_child = p̂_parent · q · E[1 / (1 + other siblings drawn)], over all sets of siblings."""
    found = q.clone()
    for i in range(len(q)):
        above = int(parents[i])
        if above >= 0:
            others = [float(q[j]) for j in (parents == above).nonzero()[:, 0].tolist() if j != i]
            keep = 0.0
            for drawn in product((0, 1), repeat=len(others)):
                chance = math.prod(p if on else 1 - p for p, on in zip(others, drawn, strict=True))
                keep += chance / (1 + sum(drawn))
            found[i] = found[above] * q[i] * keep
    return found


# ------------------------------------------------------------------------- probabilities and trees


def test_a_lone_child_is_compensated_exactly_for_its_gate():
    p, parents = double([0.4, 0.1]), torch.tensor([-1, 0])
    assert_close(compensated(p, parents), double([0.4, 0.25]))
    chain = double([0.5, 0.2, 0.05])
    q = compensated(chain, torch.tensor([-1, 0, 1]))
    assert_close(q, double([0.5, 0.4, 0.25]))
    assert_close(achieved(q, torch.tensor([-1, 0, 1])), chain)


def test_chains_of_parents_are_drawn_at_their_nominal_rates():
    parents = torch.tensor([-1, 0, 1])
    nominal = [0.5, 0.2, 0.05]
    a = law(compensated(double(nominal), parents), parents.tolist()).draw(60_000, seeded()) > 0
    for rate, want in zip(a.double().mean(0).tolist(), nominal, strict=True):
        assert abs(rate - want) < 4 * math.sqrt(want * (1 - want) / 60_000)
    assert not bool((a[:, 1:] & ~a[:, :-1]).any())


@pytest.mark.parametrize(
    ("children", "raw", "result"),
    [
        ((0.1, 0.1), (0.3125, 0.3125), (0.10547, 0.10547)),
        ((0.05, 0.03, 0.02), (0.140625, 0.088125, 0.06), (0.052183, 0.031813, 0.021354)),
        ((0.2,) * 4, (1.0,) * 4, (0.1,) * 4),
    ],
)
def test_exclusive_siblings_have_the_raw_and_achieved_rates_of_the_closed_form(
    children, raw, result
):
    parents = torch.tensor([-1] + [0] * len(children))
    q = compensated(double([0.4, *children]), parents)
    assert_close(q[1:], double(list(raw)))
    assert_close(achieved(q, parents)[1:], double(list(result)), rtol=1e-4, atol=1e-6)
    a = law(q, parents.tolist()).draw(60_000, seeded()) > 0
    assert int(a[:, 1:].sum(1).max()) == 1
    assert not bool((a[:, 1:].any(1) & ~a[:, 0]).any())
    for rate, want in zip(a[:, 1:].double().mean(0).tolist(), result, strict=True):
        assert abs(rate - want) < 4 * math.sqrt(want * (1 - want) / 60_000)


def test_the_winner_is_uniform_among_the_siblings_that_were_drawn():
    three = law([1, 1, 1, 1], [-1, 0, 0, 0]).draw(20_000, seeded()) > 0
    assert_close(three[:, 1:].double().mean(0), double([1 / 3] * 3), rtol=0, atol=0.014)
    two = law([1, 1, 0.5], [-1, 0, 0]).draw(20_000, seeded()) > 0
    assert_close(two[:, 1:].double().mean(0), double([0.75, 0.25]), rtol=0, atol=0.013)


def test_parent_scaling_spreads_children_and_ties_them_to_the_parent():
    a = law([1, 1], [-1, 0]).draw(60_000, seeded())
    assert float(a[:, 1].mean()) == pytest.approx(5, abs=0.012)
    assert float(a[:, 1].std()) == pytest.approx(0.7089, rel=0.015)
    assert float(torch.corrcoef(a.T)[0, 1]) == pytest.approx(0.705, abs=0.01)
    plain = law([1, 1], [-1, 0], scaling=False).draw(60_000, seeded())
    assert float(plain[:, 1].std()) == pytest.approx(0.5, rel=0.015)
    assert float(torch.corrcoef(plain.T)[0, 1]) == pytest.approx(0, abs=0.017)
    chain = law([1] * 4, [-1, 0, 1, 2]).draw(60_000, seeded())
    moment = float((chain[:, 3] / 5).square().mean())
    assert moment == pytest.approx(1.01**4, rel=0.01)
    spread = (chain / 5).var(0)
    wanted = torch.tensor([1.01**k - 1 for k in (1, 2, 3, 4)])
    assert_close(spread, wanted, rtol=0.04, atol=0)


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_the_copula_keeps_marginals_and_gives_the_joint_of_its_latent_correlation(rho):
    factor = torch.full((2, 1), math.sqrt(rho))
    on = law([0.5, 0.5], [-1, -1], factor=factor).draw(60_000, seeded()) > 0
    assert_close(on.double().mean(0), double([0.5, 0.5]), rtol=0, atol=0.0085)
    both = 0.25 + math.asin(rho) / (2 * math.pi)
    assert float(on.all(1).double().mean()) == pytest.approx(both, abs=0.0077)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.25])
def test_marginals_do_not_depend_on_the_copulas_scale(scale):
    q = [0.4, 0.1, 0.02] * 4
    factor = torch.randn(12, 25, generator=seeded(1)) * scale
    on = law(q, [-1] * 12, factor=factor).draw(40_000, seeded()) > 0
    for rate, p in zip(on.double().mean(0).tolist(), q, strict=True):
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / 40_000)


def test_a_small_latent_correlation_shows_in_the_joint():
    a = law([0.5, 0.5], [-1, -1], factor=torch.full((2, 1), math.sqrt(0.05)))
    both = (a.draw(500_000, seeded()) > 0).all(1).double().mean()
    assert float(both) == pytest.approx(0.25796, abs=4 * 0.00062)


def test_factor_rows_leave_unit_variance_and_are_capped():
    loud = torch.randn(40, 25, generator=seeded()) * 0.25
    capped = law([0.1] * 40, [-1] * 40, factor=loud)
    square = capped.factor.square().sum(1)
    assert_close(square + capped.noise.square(), torch.ones(40))
    assert float((square.double() + capped.noise.double().square() - 1).abs().max()) < 1e-6
    assert float(square.max()) <= 0.99 + 1e-6
    assert int((square > 0.989).sum()) >= 1


def test_zipf_frequencies_have_the_benchmarks_sums():
    p = zipf(16_384, 0.4, 5e-4)
    assert float(p.sum()) == pytest.approx(59.144, abs=0.01)
    assert float(p[:4096].sum()) == pytest.approx(40.117, abs=0.01)
    assert (float(p[0]), float(p[-1])) == (0.4, 5e-4)
    assert zipf(1, 0.4, 5e-4).tolist() == [0.4]
    ranks = {1: 0.4, 2: 0.2821, 10: 0.1247, 100: 0.0376, 129: 0.0328, 641: 0.01326,
             2689: 0.00512, 4096: 0.00365, 10881: 0.00121, 16384: 5e-4}  # fmt: skip
    assert [float(p[i - 1]) for i in ranks] == pytest.approx(list(ranks.values()), rel=4e-3)
    assert bool((p.diff() < 0).all())


def test_trees_fill_levels_in_index_order():
    parents = forest(16_384, 128)
    level = levels_of(parents)
    inside = parents >= 0
    assert int(inside.sum()) == 512 + 2048 + 8192
    assert [int((level == i).sum()) for i in range(1, 4)] == [512, 2048, 8192]
    assert parents[128:132].tolist() == [0] * 4
    assert parents[640:644].tolist() == [128] * 4
    assert bool((parents[10_880:] == -1).all())


def test_strata_tell_roots_levels_and_lone_features_apart():
    parents = torch.tensor([-1, -1, 0, 2, 0, -1])
    assert has_children(parents).tolist() == [True, False, True, False, False, False]
    found = {name: nodes.nonzero()[:, 0].tolist() for name, nodes in strata(parents).items()}
    assert found == {"root": [0], "level 1": [2, 4], "level 2": [3], "alone": [1, 5]}
    assert strata(torch.full((3,), -1)) == {}


@pytest.mark.parametrize(
    ("preset", "l0", "first_quarter", "levels"),
    [("16k", 34.495, 25.168, (8.202, 7.324, 7.323, 7.129)),
     ("mini", 7.26, 5.56, (1.70, 1.68, 1.68, 1.57)),
     ("mini-matched", 5.67, 4.31, (1.32, 1.31, 1.30, 1.22)),
     ("mini-dense", 6.62, 4.86, (1.52, 1.45, 1.45, 1.40)),
     ("ci", 3.35, 2.17, (0.68, 0.68, 0.68, 0.66))],
)  # fmt: skip
def test_presets_have_the_l0_of_the_level_recursion(preset, l0, first_quarter, levels):
    size = SIZES[preset]
    parents = forest(size.n, size.roots)
    q = compensated(zipf(size.n, size.p_max, size.p_min), parents)
    found = achieved_by_family(q, parents)
    assert float(found.sum()) == pytest.approx(l0, abs=0.006)
    assert float(found[: size.n // 4].sum()) == pytest.approx(first_quarter, abs=0.006)
    level = levels_of(parents)
    sums = [float(found[: size.roots].sum())]
    sums += [float(found[level == depth].sum()) for depth in (1, 2, 3)]
    assert sums == pytest.approx(levels, abs=6e-4 if preset == "16k" else 0.006)
    clamped, largest = {"16k": (0, 0.915), "mini": (0, None), "ci": (12, 1)}.get(preset, (0, None))
    assert int((q == 1).sum()) == clamped
    assert largest is None or float(q.max()) == pytest.approx(largest, abs=5e-4)


def achieved_by_family(q: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """The same recursion for whole levels of families of four."""
    found, level = q.clone(), levels_of(parents)
    for depth in range(1, int(level.max()) + 1):
        members = (level == depth).nonzero()[:, 0].view(-1, 4)
        drawn = q[members]
        for i in range(4):
            others = drawn[:, [j for j in range(4) if j != i]]
            keep = torch.zeros(len(members), dtype=torch.float64)
            for on in product((0, 1), repeat=3):
                mask = torch.tensor(on, dtype=torch.bool)
                keep += torch.where(mask, others, 1 - others).prod(1) / (1 + sum(on))
            found[members[:, i]] = found[parents[members[:, i]]] * drawn[:, i] * keep
    return found


@pytest.mark.parametrize("correlated", [False, True])
def test_simulated_rows_of_the_ci_world_agree_with_the_recursion(correlated):
    world = BenchmarkWorld(BenchmarkConfig(kind="benchmark", preset="ci", correlated=correlated))
    a = torch.cat(list(world.codes(0, 20_000)))
    assert float((a > 0).sum(1).double().mean()) == pytest.approx(3.35, rel=0.015)
    on, parents = a > 0, world.truth.parents
    child = parents >= 0
    assert not bool((on[:, child] & ~on[:, parents[child]]).any())
    families = torch.zeros(len(a), 256).index_add_(1, parents[child], on[:, child].float())
    assert int(families.max()) == 1
    assert_close(world.truth.bias.norm(), torch.tensor(0.5))


def test_the_mini_world_has_the_benchmarks_magnitudes_correlations_and_overlaps():
    world = BenchmarkWorld(BenchmarkConfig(kind="benchmark", preset="mini"))
    law, W = world.law, world.truth.directions
    assert (float(law.mu[0]), float(law.mu[-1])) == (5, 4)
    assert_close(law.mu.diff(), torch.full((1023,), -1 / 1023), rtol=0, atol=1e-6)
    assert float(law.sigma.mean()) == pytest.approx(0.583, abs=0.04)
    assert float(law.sigma.square().mean()) == pytest.approx(0.5, abs=0.07)
    correlation = law.factor @ law.factor.T
    assert float(correlation.diagonal().mean()) == pytest.approx(0.25, rel=0.03)
    off = correlation[~torch.eye(1024, dtype=torch.bool)]
    assert float(off.square().mean().sqrt()) == pytest.approx(0.05, rel=0.03)
    assert float(law.q.sum()) == pytest.approx(396, abs=0.5)
    assert overlap(W) == pytest.approx(0.281, abs=0.003)
    found = overlaps(W)
    assert found["mean"] == pytest.approx(0.0662, abs=4e-4)
    gram = (W @ W.T)[~torch.eye(1024, dtype=torch.bool)]
    assert float(gram.square().mean().sqrt()) == pytest.approx(0.0829, abs=1e-4)


def test_the_benchmark_without_trees_keeps_its_nominal_rates_and_with_shuffling_its_sizes():
    flat = BenchmarkWorld(BenchmarkConfig(kind="benchmark", preset="ci", trees=False))
    assert_close(flat.law.q, zipf(256, 0.4, 5e-3))
    mixed = BenchmarkWorld(BenchmarkConfig(kind="benchmark", preset="ci", shuffled=True))
    roots = mixed.law.q[:2]
    assert not torch.equal(roots, flat.law.q[:2])
    again = BenchmarkWorld(BenchmarkConfig(kind="benchmark", preset="ci", shuffled=True))
    assert torch.equal(next(mixed.codes(3, 10)), next(again.codes(3, 10)))


# ----------------------------------------------------------------------------------- dictionaries


def test_the_gram_form_is_the_gradient_of_the_pair_loss():
    W = torch.randn(30, 7, generator=seeded(), dtype=torch.float64, requires_grad=True)
    gram = W @ W.T
    off = (gram - torch.diag(gram.diagonal())).square().sum()
    (off + 30 * (gram.diagonal() - 1).square().sum()).backward()
    assert_close(overlap_grad(W.detach()), W.grad, rtol=1e-10, atol=1e-10)


def test_pushing_apart_reaches_orthogonality_or_the_welch_bound():
    few = torch.nn.functional.normalize(torch.randn(12, 16, generator=seeded()), dim=1)
    apart = push_apart(few, 600, 1e-2)
    assert float((apart @ apart.T - torch.eye(12)).abs().max()) < 0.01
    n, d = 120, 16
    many = torch.nn.functional.normalize(torch.randn(n, d, generator=seeded()), dim=1)
    gram = push_apart(many, 300, 1e-2)
    gram = gram @ gram.T - torch.eye(n)
    rms = float(gram.square().sum() / (n * (n - 1))) ** 0.5
    assert rms == pytest.approx(math.sqrt((n - d) / (d * (n - 1))), rel=0.01)


# -------------------------------------------------------------------------- hierarchy and signs


@pytest.mark.parametrize(
    ("size", "epsilons"),
    [(3, (0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482)),
     (11, (0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739))],
)  # fmt: skip
def test_bending_agrees_with_the_papers_tables(size, epsilons):
    for i, epsilon in enumerate(epsilons):
        assert bend((i + 1) / 10, size) == pytest.approx(epsilon, abs=0.004)


def test_the_hierarchy_has_one_parent_exclusive_children_and_level_orthogonal_directions():
    world = HierarchyWorld(HierarchyConfig(kind="hierarchy", correlation=0.3))
    a = next(world.codes(0, 20_000))
    on = a > 0
    assert bool((on[:, :11].sum(1) == 1).all())
    assert int(on[:, 11:].sum(1).max()) == 1
    assert bool(on[:, :11].gather(1, world.truth.parents[11:].expand(20_000, 9))[on[:, 11:]].all())
    assert float(on.double().sum(1).mean()) == pytest.approx(1.36, abs=0.015)
    gram = world.truth.directions @ world.truth.directions.T
    assert_close(gram.diagonal(), torch.ones(20))
    assert float(gram[:11, 11:].abs().max()) < 1e-5
    pairs = gram[11:14, 11:14][~torch.eye(3, dtype=torch.bool)]
    assert_close(pairs, torch.full((6,), 0.3), rtol=0, atol=1e-4)
    assert float(a[on].mean()) == pytest.approx(1.5, abs=0.01)
    assert float(a[on].std()) == pytest.approx(0.25, abs=0.006)
    rates = double([0.2] * 3 + [0.05] * 8 + [0.04] * 9)
    assert_close(on.double().mean(0), rates, rtol=0, atol=0.0114)
    assert_close(on[:, 3:].double().mean(0), rates[3:], rtol=0, atol=0.0062)


def test_constant_magnitudes_are_constant():
    config = HierarchyConfig(kind="hierarchy", sd=0, mean=1, child_sd=0, child_mean=0.5)
    a = next(HierarchyWorld(config).codes(0, 500))
    assert set(a[:, :11].unique().tolist()) == {0.0, 1.0}
    assert set(a[:, 11:].unique().tolist()) == {0.0, 0.5}


def test_signs_mean_what_the_kind_says():
    flat, both, opposed = (
        FlatWorld(FlatConfig(kind=kind, n_features=8, d=4, l0=2))
        for kind in ("flat", "bidirectional", "opposed")
    )
    a, signed = next(flat.codes(0, 2000)), next(both.codes(0, 2000))
    assert bool((a >= 0).all())
    assert_close(signed.abs(), a)
    assert float((signed[signed != 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(opposed.truth.directions[1::2], -opposed.truth.directions[::2])
    assert torch.equal(next(opposed.codes(0, 2000)), a)


# --------------------------------------------------------------------------------- configuration


def test_the_kind_decides_which_settings_there_are():
    def synthetic(**settings):
        return RunConfig.parse({"name": "x", "out": "o", "synthetic": settings}).synthetic

    assert isinstance(synthetic(), FlatConfig)
    assert isinstance(make_world(synthetic(kind="hierarchy")), HierarchyWorld)
    assert synthetic(kind="benchmark", preset="16k").d == 768
    with pytest.raises(ConfigError, match=r"synthetic\.l0: .*must not exceed|l0 .9.*n_features"):
        synthetic(n_features=4, l0=9)
    with pytest.raises(ConfigError, match=r"unknown key 'synthetic\.corelation'.*'correlat"):
        synthetic(kind="hierarchy", corelation=0.5)
    with pytest.raises(ConfigError, match=r"synthetic\.kind.*'bidirectional'"):
        synthetic(kind="bi")
    with pytest.raises(ConfigError, match="n_features must be even"):
        synthetic(kind="opposed", n_features=5, l0=1)
