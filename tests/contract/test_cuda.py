"""Every type on a GPU: what it learns there is what it learns on a CPU. `make gpu`."""

import pytest
import torch
from doubles import ArrayStore, planted_store
from test_training_laws import CONFIG, SOLVED, TRAINED, member

from saelab import laws
from saelab.ops.pursuit import pursue
from saelab.train.fit import fit
from saelab.types import SparseLatents

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _few_rows_to_calibrate_on(monkeypatch):
    monkeypatch.setattr("saelab.train.fit.CALIBRATION_ROWS", 1000)


@pytest.fixture(scope="module")
def store() -> ArrayStore:
    x = planted_store(n=300, d=8, latents=12)[0].rows("site", torch.arange(300))
    return ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})


@pytest.mark.parametrize("name", TRAINED + SOLVED)
def test_a_type_learns_on_a_gpu_what_it_learns_on_a_cpu(name, store):
    (here,) = fit([member(name)], store, CONFIG)
    moved = member(name)
    moved.dictionary.to("cuda")
    (there,) = fit([moved], store, CONFIG)
    assert all(v.device.type == "cuda" for v in there.dictionary.state_dict().values())
    for key, expected in here.dictionary.state_dict().items():
        torch.testing.assert_close(
            there.dictionary.state_dict()[key].cpu(), expected, atol=2e-2, rtol=2e-2
        )


@pytest.mark.parametrize("name", TRAINED)
def test_a_type_codes_on_a_gpu_as_on_a_cpu(name):
    dictionary = laws.ready(name)
    x = laws.some_rows(dictionary.d_in)
    with torch.no_grad():
        dense, sparse = dictionary.encode(x), dictionary.encode_sparse(x)
        restored = dictionary.reconstruct(x)
        moved = dictionary.to("cuda")
        torch.testing.assert_close(moved.encode(x.cuda()).cpu(), dense, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            moved.reconstruct(x.cuda()).cpu(), restored, atol=1e-4, rtol=1e-4
        )
        coded = moved.encode_sparse(x.cuda())
    assert isinstance(coded, SparseLatents)
    torch.testing.assert_close(coded.dense().cpu(), sparse.dense(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refit", ["mp", "omp", "gp"])
def test_a_pursuit_on_a_gpu_takes_the_atoms_that_it_takes_on_a_cpu(refit):
    seeded = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(200, 32, generator=seeded).double())
    x = torch.randn(50, 32, generator=seeded).double()
    here = pursue(x, atoms, 8, refit=refit)
    there = pursue(x.cuda(), atoms.cuda(), 8, refit=refit)
    assert torch.equal(there.order.cpu(), here.order)
    torch.testing.assert_close(there.coefficients.cpu(), here.coefficients)
