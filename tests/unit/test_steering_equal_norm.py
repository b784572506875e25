"""Equal norms: what a vector at every position does, against slow references and at zero."""

import pytest
import torch
from steering_toys import dictionary_with

from saelab.errors import ConfigError
from saelab.steering.equal_norm import EqualNormConfig, EqualNormEvaluator, contexts_of, pushed
from saelab.steering.neutral import heldout_windows

SITE = "blocks.1.hook_resid_post"
CONFIG = EqualNormConfig(norms=(0.5, 2.0), latents=4, windows=3, length=6, rows=200, resamples=20)


def test_a_push_is_measured_at_every_position(toy_model, toy_store):
    contexts = contexts_of(toy_model, heldout_windows(toy_store, SITE, toy_model, 2), 5)
    change, targets = torch.randn(32, generator=torch.Generator().manual_seed(0)), [270, 271]
    found = pushed(toy_model, contexts, SITE, change, torch.tensor(targets))
    for row, (ids, n) in enumerate(
        zip(contexts.windows.tokens, contexts.windows.lengths, strict=True)
    ):
        clean = toy_model.logits(ids[None, :n])[0].double()
        other = toy_model.logits(ids[None, :n], {SITE: lambda x: x + change})[0].double()
        p, q = clean.softmax(-1), other.softmax(-1)
        moved = other - clean
        wanted = [
            (p * (p / q).log()).sum(-1).mean(),
            (moved - moved.mean(-1, keepdim=True)).norm(dim=-1).mean(),
            (q[:, targets].sum(-1) / p[:, targets].sum(-1)).log().mean(),
        ]
        torch.testing.assert_close(found[row].double(), torch.stack(wanted), atol=1e-4, rtol=1e-3)
    nothing = pushed(toy_model, contexts, SITE, torch.zeros(32), torch.tensor(targets))
    torch.testing.assert_close(nothing, torch.zeros(2, 3), atol=1e-5, rtol=0)


def test_latents_and_random_directions_are_pushed_by_one_length(toy_model, toy_store):
    evaluate = EqualNormEvaluator(CONFIG, SITE)
    dictionary = dictionary_with(torch.ones(32), 0)
    with torch.no_grad():
        dictionary.W_dec.mul_(7.0)  # lengths of rows do not matter
    rows = list(evaluate(dictionary, toy_store, toy_model))
    found = {(row.name, row.arm): row for row in rows}
    assert {row.arm for row in rows} == {"dictionary", "isotropic", "covariance"}
    for arm in ("isotropic", "covariance"):
        low, high = (found[f"equal_norm_kl[norm={n}]", arm].value for n in ("0.5", "2"))
        assert 0 < low < high
        assert found["equal_norm_target_shift[norm=0.5]", arm].value > 0
        assert found["equal_norm_logits[norm=2]", arm].n == 4
    again = {(row.name, row.arm): row for row in evaluate(dictionary, toy_store, toy_model)}
    assert again == found
    assert len(rows[0].replicates) == 20


def test_equal_norms_need_a_model_and_live_latents(toy_model, toy_store):
    dictionary = dictionary_with(torch.ones(32), 0)
    with pytest.raises(ConfigError, match="live `model:`"):
        list(EqualNormEvaluator(CONFIG, SITE)(dictionary, toy_store, None))
    many = CONFIG.model_copy(update={"latents": 21})
    with pytest.raises(ConfigError, match="asks for 21 live latents"):
        list(EqualNormEvaluator(many, SITE)(dictionary, toy_store, toy_model))
