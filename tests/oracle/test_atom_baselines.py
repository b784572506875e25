"""Random rows and centres of k-means as atoms, against what is known by hand and a plain loop."""

import pytest
import torch
from doubles import ArrayStore

from saelab import dictionaries
from saelab.errors import ConfigError
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

D = 6
SIZES = {"d_in": D, "d_sae": 12, "k": 2}


def batch_of(x, first=0):
    number = torch.arange(first, first + len(x))
    return Batch(x, x, number, number // 8)


def begun(type_name, x, **fields):
    d = dictionaries.create({"type": type_name, "d_in": x.shape[1], "d_sae": 4, "k": 2} | fields)
    d.begin_(x.mean(0), x, len(x))
    return d


def drawn(n, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ random rows


@pytest.mark.parametrize("center", [True, False])
def test_the_first_rows_are_kept_in_order_with_their_place(center):
    x = drawn(10)
    x[1] = x.mean(0) if center else 0
    d = begun("random_rows", x, center=center)
    if center:
        x[1] = d.b_dec  # exactly the mean, so that nothing is left of it
    said = [d.partial_fit(batch_of(x[:3], 100)), d.partial_fit(batch_of(x[3:], 103))]
    assert [s.failed for s in said] == [2, 2]
    assert d.is_full
    kept = x[[0, 2, 3, 4]] - d.b_dec
    torch.testing.assert_close(d.W_dec.data, kept / kept.norm(dim=1, keepdim=True))
    assert d.rows.tolist() == [100, 102, 103, 104]
    assert d.documents.tolist() == [12, 12, 12, 13]


def test_fewer_rows_than_atoms_is_an_error_before_the_first_batch():
    begun("random_rows", drawn(4))
    with pytest.raises(ConfigError, match="4 atoms are wanted of 3 rows"):
        begun("random_rows", drawn(3))
    store = ArrayStore({"site": drawn(16 * 20)})
    short = Member("m", dictionaries.create({"type": "random_rows", **SIZES, "d_sae": 40}), "site")
    with pytest.raises(ConfigError, match="40 atoms are wanted of 32 rows"):
        fit([short], store, TrainConfig(batch=16, tokens=32))


def test_a_kept_row_is_reconstructed_by_itself():
    x = drawn(8)
    d = begun("random_rows", x)
    d.partial_fit(batch_of(x))
    z = d.encode(x[:4])
    assert (z != 0).sum(1).tolist() == [1] * 4
    torch.testing.assert_close(d.reconstruct(x[:4]), x[:4])


# ---------------------------------------------------------------------------------------- k-means


def test_clusters_far_apart_give_their_means():
    centres = 50 * torch.eye(D)[:4]
    x = torch.cat([centres, (centres[:, None] + drawn(40).view(4, 10, D)).reshape(-1, D)])
    d = begun("k_means", x, center=False)
    d.partial_fit(batch_of(x))
    nearest = torch.cdist(x, centres).argmin(1)
    means = torch.stack([x[nearest == i].mean(0) for i in range(4)])
    torch.testing.assert_close(d.centres, means)
    torch.testing.assert_close(d.W_dec.data, means / means.norm(dim=1, keepdim=True))
    assert d.counts.tolist() == [11] * 4


def test_centres_are_the_means_of_all_rows_that_they_were_given():
    x = drawn(60, seed=1)
    d = begun("k_means", x)
    centres, given = (x - x.mean(0))[:4].clone(), [[] for _ in range(4)]
    for i in range(0, 60, 20):
        rows = x[i : i + 20] - x.mean(0)
        said = d.partial_fit(batch_of(x[i : i + 20], i))
        errors = 0.0
        for row in rows:
            place = int((row - centres).square().sum(1).argmin())
            errors += float((row - centres[place]).square().sum() / row.square().sum())
            given[place].append(row)
        centres = torch.stack(
            [torch.stack(g).mean(0) if g else c for g, c in zip(given, centres, strict=True)]
        )
        torch.testing.assert_close(d.centres, centres)
        assert said.error == pytest.approx(errors, rel=1e-5)


def test_a_centre_without_rows_stays_where_it_began():
    x = torch.cat([torch.eye(D)[:4], torch.eye(D)[:3].repeat(3, 1)])
    d = begun("k_means", x, center=False)
    d.partial_fit(batch_of(x[4:]))
    assert torch.equal(d.centres, torch.eye(D)[:4])
    assert d.counts.tolist() == [3, 3, 3, 0]


@pytest.mark.parametrize("center", [True, False])
def test_a_row_without_length_has_no_error(center):
    x = drawn(8)
    x = torch.cat([x, begun("k_means", x, center=center).b_dec.data[None]])
    errors = []
    for n in (9, 8):
        d = begun("k_means", drawn(8), center=center)
        errors.append(d.partial_fit(batch_of(x[:n])).error)
    assert errors[0] == errors[1] > 0


def test_fewer_rows_than_centres_is_an_error():
    with pytest.raises(ConfigError, match="4 centres start from as many rows, but the sample hold"):
        begun("k_means", drawn(3))


# ------------------------------------------------------------------------------- a shorter stream


def member(name, config, tokens=None):
    return Member(name, dictionaries.create(config | SIZES), "site", tokens=tokens)


@pytest.mark.parametrize("type_name", ["topk", "k_means"])
def test_a_member_with_fewer_tokens_is_the_one_of_a_shorter_run(type_name):
    store = ArrayStore({"site": drawn(300)})
    alone = fit([member("a", {"type": type_name})], store, TrainConfig(batch=16, tokens=96))
    both = fit(
        [member("a", {"type": type_name}, tokens=96), member("b", {"type": type_name})],
        store,
        TrainConfig(batch=16, tokens=240),
    )
    mine, other = (f.dictionary.state_dict() for f in (alone[0], both[0]))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert both[0].metrics == alone[0].metrics
    assert both[1].metrics[-1]["tokens"] == 240


@pytest.mark.parametrize("tokens", [15, 241])
def test_tokens_of_a_member_lie_between_a_batch_and_the_run(tokens):
    store = ArrayStore({"site": drawn(300)})
    with pytest.raises(ConfigError, match=f"a: tokens={tokens} should lie between one batch"):
        fit([member("a", {"type": "topk"}, tokens)], store, TrainConfig(batch=16, tokens=240))


def test_a_solved_member_has_no_tokens():
    store = ArrayStore({"site": drawn(300)})
    solved = Member(
        "s", dictionaries.create({"type": "semi_nmf", "d_in": D, "d_sae": 3}), "site", tokens=64
    )
    with pytest.raises(ConfigError, match="semi_nmf is solved from the whole store; drop tokens"):
        fit([solved], store, TrainConfig(batch=16, tokens=240))
