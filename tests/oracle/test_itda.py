"""ITDA against what is known by hand, and its blocks against the plain loop over rows."""

import pytest
import torch
from doubles import ArrayStore
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import dictionaries
from saelab.errors import ConfigError
from saelab.evals.similarity import atom_keys, jaccard
from saelab.ops import construct as construction
from saelab.ops.construct import Rule, construct, construct_plainly
from saelab.ops.threshold import threshold_for
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

D = 6
BASIS = torch.eye(D).repeat(5, 1)


def batch_of(x, first=0):
    number = torch.arange(first, first + len(x))
    return Batch(x, x, number, number // 8)


def itda(**fields):
    config = {"d_in": D, "d_sae": 40, "k": 3, "center": False}
    if "target_size" not in fields:
        config["threshold"] = 0.2
    return dictionaries.create({"type": "itda"} | config | fields)


def built(x, *, dtype=torch.float32, batch=64, **fields):
    """Return a dictionary that has taken in all rows, batch by batch, and what it said to each."""
    d = itda(**{"d_in": x.shape[1]} | fields).to(dtype)
    d.begin_(x.mean(0), x, len(x))
    parts, firsts = x.split(batch), range(0, len(x), batch)
    said = [d.partial_fit(batch_of(part, i)) for part, i in zip(parts, firsts, strict=True)]
    return d, said


def clustered(n, d, seed, dtype=torch.float32):
    """Rows near a few centres, with repeats, scaled copies, and rows of zeros."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, n // 6), d, generator=generator, dtype=dtype)
    chosen = torch.randint(len(centres), (n,), generator=generator)
    noise = torch.randn(n, d, generator=generator, dtype=dtype)
    amount = torch.rand(n, 1, generator=generator, dtype=dtype)
    x = centres[chosen] * (0.5 + amount) + 0.3 * noise
    x[torch.rand(n, generator=generator) < 0.1] = 0
    repeats = (torch.rand(n, generator=generator) < 0.1).nonzero()[:, 0]
    x[repeats] = -2 * x[(repeats * 7) % n]
    return x


def fvu(x, residual):
    return residual.square().sum(1) / x.square().sum(1)


# ---------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("rule", ["fvu", "paper", "reference"])
@pytest.mark.parametrize("refit", ["mp", "omp", "gp"])
def test_the_basis_repeated_gives_exactly_d_atoms_and_no_error(rule, refit):
    d, (said,) = built(BASIS, rule=rule, refit=refit, threshold=1e-3)
    assert torch.equal(d.W_dec, torch.eye(D))
    assert torch.equal(d.reconstruct(BASIS), BASIS)
    assert (said.seen, said.failed) == (len(BASIS), D)
    again = d.partial_fit(batch_of(BASIS))
    assert (again.failed, again.error, d.d_sae) == (0, 0.0, D)


def test_another_length_of_a_stored_row_is_explained_without_error():
    first = torch.eye(D)[:1]
    d, said = built(torch.cat([first, 3 * first, -2 * first]), batch=1)
    assert [s.failed for s in said] == [1, 0, 0]
    assert said[1].error == said[2].error == 0
    assert d.encode(-3 * first).tolist() == [[-3.0]]


def test_near_duplicates_of_one_batch_do_not_enter_together():
    x = torch.ones(50, D) + 1e-3 * torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    d, (said,) = built(x)
    assert d.d_sae == said.failed == 1


def test_a_row_without_length_never_becomes_an_atom():
    d, (said,) = built(torch.cat([torch.zeros(3, D), BASIS]))
    assert d.d_sae == D
    assert 0 not in d.rows
    assert said.seen == 3 + len(BASIS)


def test_centred_rows_are_measured_from_the_mean_and_uncentred_ones_from_zero():
    x = 5 + 0.1 * torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    plain, _ = built(x)
    centred, _ = built(x, center=True)
    assert plain.d_sae == 1
    assert not plain.b_dec.any()
    assert centred.d_sae > 3
    assert torch.equal(centred.b_dec, x.mean(0))


def test_every_atom_is_the_unit_row_that_its_number_says():
    x = clustered(200, D, 3)
    d, _ = built(x)
    rows = x[d.rows]
    torch.testing.assert_close(d.W_dec, rows / rows.norm(dim=1, keepdim=True))
    assert torch.equal(d.documents, d.rows // 8)


# --------------------------------------------------------------------------- the three rules


def test_the_rules_measure_what_they_say():
    x = torch.tensor([[2.0, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]])
    errors = {}
    for rule in ("fvu", "paper", "reference"):
        d, _ = built(x[:1], rule=rule, threshold=0.1)
        errors[rule] = d.partial_fit(batch_of(x[1:])).error
    cos = 3 / 5
    assert errors["fvu"] == pytest.approx(1 - cos**2)
    assert errors["paper"] == pytest.approx(16)
    assert errors["reference"] == pytest.approx(2 * (1 - cos) / D)


def test_a_reference_threshold_of_4e_4_at_width_768_means_a_cosine_of_846():
    def fails(cos):
        x = torch.zeros(2, 768)
        x[0, 0] = 1
        x[1, :2] = torch.tensor([cos, (1 - cos**2) ** 0.5])
        d, _ = built(x, rule="reference", threshold=4e-4, k=1)
        return d.d_sae == 2

    assert fails(0.8463)
    assert not fails(0.8465)


def test_a_share_of_the_energy_that_no_row_reaches_is_refused_with_its_range():
    with pytest.raises(ConfigError, match=r"threshold=1 can never fire.*between 0 and 1"):
        itda(threshold=1.0)
    d, _ = built(BASIS, threshold=0.999)
    assert d.d_sae == D


def test_the_example_of_the_papers_code_is_refused_with_the_range_at_its_width():
    with pytest.raises(ConfigError, match=r"0\.01 can never fire.*below 2 / d_in = 0\.000391"):
        itda(rule="reference", threshold=0.01, d_in=5120)
    d, _ = built(BASIS, rule="reference", threshold=0.999 * 2 / D)
    assert d.d_sae == D


def test_a_squared_error_above_every_rows_is_refused_with_the_largest():
    x = 2 * BASIS
    with pytest.raises(ConfigError, match=r"threshold=4 .*none of the first 30 .*lie below 4"):
        built(x, rule="paper", threshold=4.0)
    d, _ = built(x, rule="paper", threshold=3.99)
    assert d.d_sae == D


def test_threshold_and_size_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        itda(threshold=0.1, target_size=4)


# ------------------------------------------------------------------------------ the plain loop


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6),
    st.sampled_from(["mp", "omp"]), st.sampled_from([0.02, 0.2, 0.6]), st.integers(1, 60),
)  # fmt: skip
def test_blocks_come_to_what_the_plain_loop_comes_to(n, d, k, seed, refit, threshold, limit):
    x = clustered(n, d, seed, torch.float64)
    rule = Rule(k, refit, fvu, threshold, limit)
    blocks, plain = (make(x, x[:0], rule) for make in (construct, construct_plainly))
    assert torch.equal(blocks.taken, plain.taken)
    assert torch.equal(blocks.atoms, plain.atoms)
    torch.testing.assert_close(blocks.errors, plain.errors, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sizes", [(256, 64, 512), (7, 1, 3), (40, 5, 2)])
def test_no_size_of_block_changes_the_atoms(sizes, monkeypatch):
    for name, size in zip(("BLOCK", "LOOK", "SPARE"), sizes, strict=True):
        monkeypatch.setattr(construction, name, size)
    x = clustered(600, 12, 4)
    rule = Rule(4, "mp", fvu, 0.1, 300)
    blocks, plain = (make(x, x[:0], rule) for make in (construct, construct_plainly))
    assert 80 < len(blocks.taken) < 300
    assert torch.equal(blocks.taken, plain.taken)
    assert torch.equal(blocks.atoms, plain.atoms)


def test_it_grows_without_a_gram_matrix_as_with_one(monkeypatch):
    x = clustered(300, 12, 4)
    whole = construct(x, x[:0], Rule(4, "mp", fvu, 0.1, 300))
    monkeypatch.setattr(construction, "SPARE", 5)
    for limit in (0, 4 * 40**2):
        monkeypatch.setattr("saelab.ops.pursuit.GRAM_BYTES", limit)
        monkeypatch.setattr(construction, "GRAM_BYTES", limit)
        assert torch.equal(construct(x, x[:0], Rule(4, "mp", fvu, 0.1, 300)).taken, whole.taken)


def test_the_split_into_batches_changes_nothing():
    x = clustered(300, D, 5)
    sizes = [built(x, batch=batch)[0] for batch in (1, 64, 300)]
    assert all(torch.equal(sizes[0].rows, other.rows) for other in sizes[1:])


def test_a_full_dictionary_ends_at_the_row_that_filled_it():
    x = clustered(200, 12, 6)
    whole, _ = built(x, threshold=0.05, d_sae=150)
    some, said = built(x, threshold=0.05, d_sae=20)
    assert whole.d_sae > 20
    assert some.is_full
    assert torch.equal(some.rows, whole.rows[:20])
    assert sum(s.seen for s in said) == int(whole.rows[19]) + 1


# ----------------------------------------------------------------------------------- repeats


def planted(n=3000, d=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(40, d, generator=generator))
    codes = torch.rand(n, 40, generator=generator)
    return (codes * (codes > 0.93)) @ directions + 0.02 * torch.randn(n, d, generator=generator)


def test_two_builds_have_the_same_bytes_and_disjoint_rows_no_common_key(tmp_path):
    x = planted()
    for name in ("a", "b"):
        built(x, d_sae=400)[0].save(tmp_path / name)
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    one, other = itda(d_in=16, d_sae=400), itda(d_in=16, d_sae=400)
    for d, rows in ((one, slice(0, 1500)), (other, slice(1500, 3000))):
        d.begin_(x.mean(0), x, len(x))
        d.partial_fit(batch_of(x[rows], rows.start))
    assert jaccard(atom_keys(one), atom_keys(one)) == 1
    assert jaccard(atom_keys(one), atom_keys(other)) == 0


def test_rotated_rows_give_the_same_keys_in_float64():
    x = planted().double()
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    a, _ = built(x, dtype=torch.float64, d_sae=400, center=True)
    b, _ = built(x @ rotation.double(), dtype=torch.float64, d_sae=400, center=True)
    assert 30 < a.d_sae < 400
    assert torch.equal(a.rows, b.rows)
    torch.testing.assert_close(a.W_dec @ rotation.double(), b.W_dec)


def test_rotated_rows_differ_in_float32_only_from_a_tie_on():
    threshold = 0.05
    for seed in range(2):
        x = planted(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
        rule = Rule(3, "mp", fvu, threshold, 2000)
        a, b = (construct(rows, rows[:0], rule) for rows in (x, x @ rotation))
        assert jaccard(a.taken.tolist(), b.taken.tolist()) >= 0.99
        differ = ((a.errors > threshold) != (b.errors > threshold)).nonzero()[:, 0]
        if len(differ):
            assert abs(a.errors[differ[0]] - threshold) < 1e-5


# ------------------------------------------------------------------------------ size and scale


def test_the_threshold_for_a_size_is_met_on_the_sample_itself():
    x = planted()
    threshold = threshold_for(x, lambda t: Rule(3, "mp", fvu, t, 200), 1.0, len(x))
    made = construct(x, x[:0], Rule(3, "mp", fvu, threshold, 1000))
    assert len(made.taken) == pytest.approx(200, rel=0.03)


@pytest.mark.parametrize("rule", ["fvu", "paper", "reference"])
def test_a_wanted_size_comes_of_the_whole_run_by_any_rule(rule):
    x = planted(n=6000)
    store = ArrayStore({"site": x})
    config = {"type": "itda", "d_in": 16, "d_sae": 400, "k": 3, "rule": rule, "target_size": 120}
    member = Member("a", dictionaries.create(config), "site")
    (fitted,) = fit([member], store, TrainConfig(batch=100, tokens=4000))
    assert fitted.dictionary.d_sae == pytest.approx(120, rel=0.15)
    assert not fitted.facts["full"]


def test_more_atoms_than_rows_are_refused(caplog):
    x = planted(n=100)
    with pytest.raises(ConfigError, match="300 atoms are wanted of 100 rows"):
        built(x, threshold=None, target_size=300)
    flat = torch.eye(3, D).repeat(30, 1)
    d, _ = built(flat, threshold=None, target_size=50)
    assert d.d_sae == 3
    assert "no threshold comes to 50 atoms" in caplog.text


def test_the_papers_threshold_is_in_the_stores_own_unit():
    x = 30 * planted(n=1000)
    store = ArrayStore({"site": x})
    config = {"type": "itda", "d_in": 16, "d_sae": 400, "k": 3, "rule": "paper", "center": False}
    member = Member("a", dictionaries.create(config | {"threshold": 400.0}), "site")
    (fitted,) = fit([member], store, TrainConfig(batch=50, tokens=800))
    rows = next(store.batches("site", batch=800, seed=0)).rows
    alone = dictionaries.create(config | {"threshold": 400.0})
    alone.begin_(x.mean(0), x, len(x))
    alone.partial_fit(Batch(x[rows], x[rows], rows, rows))
    assert 10 < alone.d_sae < 400
    assert torch.equal(fitted.dictionary.rows, alone.rows)
    torch.testing.assert_close(fitted.dictionary.threshold, torch.tensor(400.0))
