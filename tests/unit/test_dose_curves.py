"""Dose–response curves: from responses, out of results, over seeds; their figures and page."""

import pytest
import torch
from fabricated import SITE, store
from saelab_experiments import steered

from saelab import artifacts
from saelab.config import digest
from saelab.dose_curves import curves_in, labels_in, with_interval
from saelab.errors import ArtifactError, ConfigError
from saelab.results import write_rows
from saelab.stats import bootstrap
from saelab.steering.curves import GREY, curves_of, dose_figure, looks_of
from saelab.steering.judges import Validation
from saelab.steering.rows import Rows
from saelab.steering.sweep import Continuations, Matched
from saelab.steering.trial import Response

DOSES = (0.1, 0.4)


def matched(dose: float | None) -> tuple[Matched, ...]:
    """Of two directions one misses the larger dose, and it is not monotone."""
    if dose is None:
        return ()
    strength = None if dose == DOSES[1] else 1.0
    return Matched(dose, 1.0, dose, True), Matched(dose, strength, dose, strength is not None)


def response(arm: str, dose: float | None, lift: float, reached: bool = True) -> Response:
    sums = torch.ones(4, 5, dtype=torch.float64)
    sums[:, 0] = lift + 0.1 * torch.arange(4) - 0.15
    sums[:, 1], sums[:, 3] = 0.0, 0.5
    written = (Continuations(("a", "b", "c", "d"), ("e", "f", "g", "h")),) if reached else ()
    return Response(arm, dose, matched(dose), 0.2, "some", sums, written)


def arms(lift: float) -> dict[str, list[Response]]:
    found = {
        arm: [response(arm, dose, share * lift * dose) for dose in DOSES]
        for arm, share in (("dictionary", 1.0), ("mean_difference", 0.5), ("isotropic", 0.1))
    }
    return found | {"prompt": [response("prompt", None, 0.3)]}


# ------------------------------------------------------------------------------------------ curves


def test_a_curve_has_what_was_reached_in_the_order_of_doses():
    found = arms(1.0)
    several = [found["dictionary"][1], response("dictionary", 0.8, 0.0, reached=False)]
    several += [found["dictionary"][0], *found["prompt"], response("lost", 0.1, 0.0, False)]
    own, prompt = curves_of(several, resamples=50)
    assert (own.arm, own.doses, own.is_control) == ("dictionary", DOSES, False)
    assert [p.value for p in own.measures["lift"]] == pytest.approx(list(DOSES))
    assert all(p.low < p.value < p.high for p in own.measures["lift"])
    assert [p.value for p in own.measures["fluency"]] == [0.5, 0.5]
    assert (prompt.arm, prompt.doses, len(prompt.measures["score"])) == ("prompt", (), 1)
    assert (own.reached, own.non_monotone, own.flagged) == ((1, 0.5), (0, 0.5), (False, True))
    assert prompt.flagged == ()


def test_the_figure_has_a_panel_per_measure_and_grey_controls():
    curves = curves_of([one for own in arms(1.0).values() for one in own], resamples=20)
    figure = dose_figure(curves, title="glad")
    lines = [trace for trace in figure.data if trace.mode != "lines" or trace.name == "prompt"]
    assert len(lines) == 3 * 4
    colours = {trace.name: trace.line.color for trace in lines}
    points = [trace.marker.symbol for trace in lines if trace.name == "dictionary"]
    assert points == 3 * [("circle", "circle-open")]
    assert [arm for arm, colour in colours.items() if colour == GREY] == ["isotropic"]
    level = next(trace for trace in figure.data if trace.name == "prompt")
    assert (list(level.x), level.y[0]) == ([0.1, 0.4], level.y[1])
    with pytest.raises(ConfigError, match="nothing to draw"):
        dose_figure([])


def test_arms_are_told_apart_when_colours_run_out():
    curves = curves_of([response(f"arm {i}", 0.1, 0.1) for i in range(9)], resamples=5)
    assert len(set(looks_of(curves).values())) == 9


# ----------------------------------------------------------------------------------------- results


def rows_of(lift: float):
    rows = Rows(
        "glad", Validation("some", 0.9, 0.7, 0.95), 4, "steering", 2, 200, 0, "fluency(toy)"
    )
    yield from rows.judge()
    for arm, responses in arms(lift).items():
        yield rows.row("steering_reached", 1.0, "share", arm)
        yield from rows.chosen(arm, responses[-1], 10)
        yield from rows.by_dose(arm, responses)
    yield from rows.chosen("oracle", response("dictionary", 0.4, 0.9), 10)
    own, other = arms(lift)["dictionary"][-1], arms(lift)["isotropic"][-1]
    yield rows.lead("isotropic", "dictionary", own, other)


@pytest.fixture
def run(tmp_path):
    """A run with two seeds of one type, and one of another."""
    kept = store(tmp_path)
    for name, lift in (("run-a-seed0", 1.0), ("run-a-seed1", 2.0), ("run-b", 0.5)):
        with artifacts.open_draft(tmp_path, "dictionary", name, digest(name)) as draft:
            draft.write("weights", name.encode())
            draft.finish(
                stage="dictionary", name=name, inputs={"dictionary": {"type": "topk"}},
                parents=[artifacts.parent_of(kept)], facts={"site": SITE},
            )  # fmt: skip
        parents = [artifacts.parent_of(draft.target), artifacts.parent_of(kept)]
        with artifacts.open_draft(tmp_path, "results", name, digest(name)) as draft:
            write_rows(draft, rows_of(lift), {})
            draft.finish(
                stage="results", name=name, inputs={}, parents=parents, facts={"site": SITE}
            )
    return tmp_path


def results(run, *names):
    return [path for path, m in artifacts.find_all(run, "results") if m.name in names]


def test_intervals_of_several_seeds_are_over_prompts_and_seeds(run):
    one, two = results(run, "run-a-seed0", "run-a-seed1")
    name = "steering_lift(glad)"
    alone = with_interval([one], "dictionary", name)
    own = arms(1.0)["dictionary"][-1]
    drawn = bootstrap(own.sums, lambda t: t[:, 0] / t[:, 2], resamples=200)
    ends = torch.quantile(drawn.float().double(), torch.tensor([0.025, 0.975]).double())
    assert (alone.low, alone.high) == pytest.approx(tuple(ends.tolist()))
    both = with_interval([one, two], "dictionary", name)
    assert both.value == pytest.approx(0.6)
    # .4 and .8 are as far apart as no two draws of prompts
    assert both.low < 0.4
    assert both.high > 0.8
    assert with_interval([one], "dictionary", "steering_dose(glad)") is None


def test_curves_come_out_of_results_as_they_went_in(run):
    (folder,) = results(run, "run-b")
    assert labels_in(folder) == ["glad"]
    found = {curve.arm: curve for curve in curves_in([folder], "glad", name="b")}
    assert set(found) == {"b", "mean_difference", "isotropic", "prompt"}
    assert found["b"].doses == DOSES
    assert [p.value for p in found["b"].measures["lift"]] == pytest.approx([0.05, 0.2])
    assert found["isotropic"].is_control
    assert found["b"].reached == found["isotropic"].reached == (1, 0.5)
    assert found["b"].flagged == (False, True)
    assert found["prompt"].doses == ()
    with pytest.raises(ArtifactError, match="not steered by 'sad'"):
        curves_in([folder], "sad")


def test_the_page_has_a_row_per_type_and_control_and_its_figure(run, tmp_path):
    said = []
    page, picture = tmp_path / "page.md", tmp_path / "figure.svg"
    argv = [str(run), "--output", str(page), "--figure", str(picture)]
    steered.main(argv, said.append)
    text = page.read_text()
    assert "It has 0.950 on held-out text of its own corpus." in text
    assert "AUROC 0.900 on held-out text and 0.700 on unsteered generations (unvalidated" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 2 |" in lines["| **run-a**"]
    assert lines["| **run-b**"].split(" | ")[3].startswith("0.200 [")
    assert lines["| isotropic"].split(" | ")[3].startswith("0.040 [")  # of the first member
    assert lines["| run-a"].count("[") == 1
    assert "![Lift, fluency and score at each dose](figure.svg)" in text
    assert "| directions at the dose | not monotone |" in text
    assert lines["| **run-b**"].split(" | ")[9:11] == ["0.5", "0.5"]
    assert "Hollow: some direction misses the dose" in text
    first = picture.read_bytes()
    steered.main(argv, said.append)
    assert picture.read_bytes() == first
    with pytest.raises(ArtifactError, match="holds no steering"):
        steered.main([str(tmp_path / "elsewhere")])
