"""Known answers for the shared linear algebra."""

import pytest
import torch
from scipy.optimize import minimize

from saelab.ops import linalg


@pytest.mark.parametrize("d", [1, 2, 5])
def test_geometric_median_has_the_smallest_sum_of_distances(d):
    x = torch.randn(31, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)

    def cost(m):
        return float((x - torch.as_tensor(m)).norm(dim=1).sum())

    found = linalg.geometric_median(x, max_iterations=1000, tolerance=1e-9)
    best = minimize(cost, x.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-9})
    assert cost(found) <= best.fun * (1 + 1e-6)


def test_geometric_median_leaves_the_mean_where_that_is_a_row_but_not_the_median():
    x = torch.tensor([[-3.0], [-3.0], [-3.0], [0.0], [9.0]])
    found = linalg.geometric_median(x, max_iterations=1000)
    torch.testing.assert_close(found, torch.tensor([-3.0]), atol=1e-3, rtol=0)


def test_geometric_median_of_equal_rows_is_that_row():
    assert torch.equal(linalg.geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_rows_have_unit_norm_and_projected_gradients_leave_it():
    generator = torch.Generator().manual_seed(0)
    W = linalg.unit_rows(torch.randn(6, 4, generator=generator))
    torch.testing.assert_close(W.norm(dim=1), torch.ones(6))
    g = torch.randn(6, 4, generator=generator)
    linalg.remove_parallel_(g, W)
    torch.testing.assert_close((g * W).sum(1), torch.zeros(6), atol=1e-6, rtol=0)
    linalg.unit_rows_(g)
    torch.testing.assert_close(g.norm(dim=1), torch.ones(6))
    assert linalg.unit_rows(torch.zeros(1, 4)).isfinite().all()
