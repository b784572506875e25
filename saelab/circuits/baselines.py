"""What discrete codes are held against: scores of heads that are as easily had.

*Observational*, from the same outputs: what they add to the right answers' logits, how well a probe
tells positives from negatives, how far their means are apart, how large they are and how much they
vary, how many codes they have; and the score of the codes with other codes in place of the learnt
ones (a random encoder, k-means, the signs of principal components), or with labels exchanged at
random. *Causal*, from runs: attribution patching, integrated gradients and zero patching.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits.discrete_codes import (
    SILENT,
    Codes,
    Encode,
    HeadOutputs,
    code,
    distinct,
    node_scores,
)
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.tasks import TaskData
from saelab.probes import fit_probe
from saelab.stats import auc

Scores = Float[Tensor, " heads"]


# --------------------------------------------------------------------------------- from the outputs


def of_outputs(outputs: HeadOutputs, first: Bool[Tensor, " n"]) -> dict[str, Scores]:
    """Return the scores that need nothing but raw outputs; `first` are the examples of one half."""
    positive, both = outputs.positive.double(), outputs.both.double()
    means = outputs.positive.double().mean(0) - outputs.negative.double().mean(0)
    return {
        "mean_difference": means.norm(dim=-1),
        "output_norm": both.norm(dim=-1).mean(0),
        "output_variance": (positive - positive.mean(0)).square().sum(-1).mean(0),
        "probe": probe_scores(outputs, first),
    }


def probe_scores(outputs: HeadOutputs, first: Bool[Tensor, " n"]) -> Scores:
    """Return how well a linear probe on a head's output tells positives from negatives: its AUC.

    Fitted on the `first` examples, positive and negative, and read on the others, and the other way
    round.
    """
    both = outputs.both
    label = torch.arange(len(both)) < len(outputs.positive)
    first = first.repeat(2)
    found = torch.zeros(both.shape[1], dtype=torch.float64)
    for head in range(both.shape[1]):
        x = both[:, head].double()
        for fitted in (first, ~first):
            probe = fit_probe(x[fitted], label[fitted])
            found[head] += auc(probe.scores(x[~fitted]), label[~fitted]) / 2
    return found


def direct_logits(
    model: PatchableModel, data: TaskData, written: Float[Tensor, "n heads d"]
) -> Float[Tensor, "n heads"]:
    """Return what each head adds to the right answers' logits over the wrong ones', per example.

    The final norm's scale is applied and its division left out; see `LanguageModel.logit_effect`.
    The baseline is the size of the mean over positives.
    """
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    found = []
    for row, heads in enumerate(written):
        effect = model.logit_effect(site, heads).cpu().double()
        right, wrong = (ids[row][ids[row] >= 0] for ids in (data.right, data.wrong))
        found.append(effect[:, right].mean(1) - effect[:, wrong].mean(1))
    return torch.stack(found)


# ----------------------------------------------------------------------------------- other codes


def random_encoder(rows: Float[Tensor, "n d"], d_sae: int, *, seed: int) -> Encode:
    """Return the encoder of a dictionary that was never trained."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(d_sae, rows.shape[1], generator=generator)
    return lambda x: (x.float() @ weights.T).relu()


def k_means(rows: Float[Tensor, "n d"], d_sae: int, *, seed: int) -> Encode:
    """Return an encoder whose one latent is the nearest of `d_sae` cluster centres."""
    from sklearn.cluster import MiniBatchKMeans

    n = min(d_sae, len(torch.unique(rows, dim=0)))
    clusters = MiniBatchKMeans(n, random_state=seed, n_init=1, batch_size=2048)  # pyright: ignore[reportArgumentType]
    clusters.fit(rows.float().numpy())

    def encode(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
        labels = torch.from_numpy(clusters.predict(x.float().numpy())).long()
        return torch.nn.functional.one_hot(labels, n).float()

    return encode


def principal_signs(rows: Float[Tensor, "n d"], d_sae: int) -> Encode:
    """Return an encoder whose one latent is the signs of the first log₂ `d_sae` components."""
    bits = min(max(1, (d_sae - 1).bit_length()), *rows.shape)
    mean = rows.float().mean(0)
    centred = rows.float() - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.T[-bits:]
    places = 2 ** torch.arange(bits)

    def encode(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
        signs = (x.float() - mean) @ directions.T > 0
        return torch.nn.functional.one_hot((signs * places).sum(1), 2**bits).float()

    return encode


def of_other_codes(outputs: HeadOutputs, d_sae: int, *, seed: int) -> dict[str, Scores]:
    """Return the codes' score with codes that nothing was learnt for; `outputs` as coded."""
    rows = rearrange(outputs.both, "n h d -> (n h) d")
    rows = rows[rows.any(1)]
    makers: dict[str, Callable[[], Encode]] = {
        "codes_random": lambda: random_encoder(rows, d_sae, seed=seed),
        "codes_k_means": lambda: k_means(rows, d_sae, seed=seed),
        "codes_pca_signs": lambda: principal_signs(rows, d_sae),
    }
    return {name: node_scores(code(outputs, make())) for name, make in makers.items()}


def of_codes(codes: Codes, *, seed: int) -> dict[str, Scores]:
    """Return what the learnt codes give without the labels: their number, and labels exchanged."""
    both = torch.cat([codes.positive, codes.negative])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(both), generator=generator)
    mixed = both[order]
    n = len(codes.positive)
    return {
        "distinct_codes": distinct(both) - (both == SILENT).any(0).double(),
        "codes_permuted": node_scores(Codes(mixed[:n], mixed[n:])),
    }


# ------------------------------------------------------------------------------- surface statistics


def bag_of_tokens_auc(
    positive: Int[Tensor, "n pos"], negative: Int[Tensor, "n pos"], *, seed: int
) -> float:
    """Return how well counts of tokens alone tell positives from negatives: AUC on held-out rows.

    Rows of equal number stay on one side of the split, as the versions of a prompt share its words.
    """
    n = len(positive)
    tokens, place = torch.unique(torch.cat([positive, negative]), return_inverse=True)
    counts = torch.zeros(2 * n, len(tokens)).scatter_add_(1, place, torch.ones(place.shape))
    label = torch.arange(2 * n) < n
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first = torch.isin(torch.arange(2 * n) % n, order[: n // 2])
    found = []
    for fitted in (first, ~first):
        probe = fit_probe(counts[fitted], label[fitted])
        found.append(auc(probe.scores(counts[~fitted]), label[~fitted]))
    return sum(found) / 2
