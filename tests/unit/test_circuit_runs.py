"""Runs of circuits on the toy: what they write, find again, and refuse."""

import json
from dataclasses import replace

import circuit_prompts
import jsonschema
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from saelab import artifacts
from saelab.circuit_runs import features as circuits_features
from saelab.circuit_runs import supervised as circuits_supervised
from saelab.circuit_runs.config import (
    FeaturesConfig,
    SupervisedRunConfig,
    load_features,
    load_supervised,
)
from saelab.circuit_runs.inputs import chosen_dictionaries, parted
from saelab.circuit_runs.report import circuit_tables, supervised_table
from saelab.circuits.ability import TaskScore
from saelab.circuits.contrast import contrast_of
from saelab.circuits.tasks import shuffled
from saelab.circuits.viewer import schema
from saelab.cli import app
from saelab.errors import ArtifactError, ConfigError, SiteError, TaskError
from saelab.results import read_rows
from saelab.run_config import load_config

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_model):
    """The toy's dictionaries, and a circuit found with them."""
    out = tmp_path_factory.mktemp("run")
    paths = [circuit_prompts.save_dictionary(out, toy_model, site) for site in (FIRST, LAST)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuits_features, "draw", circuit_prompts.draw)
        patch.setenv("SAELAB_CACHE", str(out / "cache"))
        config = features_config(out, paths)
        found = circuits_features.features(config)
        assert circuits_features.features(config) == found
    return out, paths, found


def features_config(out, paths, **changes):
    return FeaturesConfig.parse(
        {
            "name": "toy-ioi", "model": {"source": "toy"}, "dictionaries": list(paths), "out": out,
            "task": {"name": "ioi", "pairs": 8, "test_pairs": 12, "force": True},
            "attribution": {"method": "attribution", "batch": 6}, "graph": {"nodes": 12},
            "curves": {"sizes": [4], "draws": 1},
        }
        | changes
    )  # fmt: skip


def supervised_config(out, paths):
    return SupervisedRunConfig.parse(
        {
            "name": "toy-labels", "model": {"source": "toy"}, "out": out,
            "dictionaries": list(paths),
            "task": {"name": "ioi", "fit": 160, "test": 48, "force": True},
            "supervised": {"budgets": [2], "slots": ["end"], "batch": 32, "shrink": [1, 0]},
            "random_decoder": {"d_sae": 48, "k": 4},
        }
    )  # fmt: skip


@pytest.fixture
def patched(monkeypatch, tmp_path):
    for runs in (circuits_features, circuits_supervised):
        monkeypatch.setattr(runs, "draw", circuit_prompts.draw)
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))


def test_a_circuit_holds_its_graph_its_numbers_and_what_runs_it_again(made):
    _, paths, found = made
    circuit = circuits_features.open_circuit(found)
    graph, manifest = circuit.graph, circuit.manifest
    assert manifest.facts["n_nodes"] == len(graph.nodes) == 12
    names = [artifacts.read_manifest(path).name for path in paths]
    assert [site.dictionary for site in graph.sites] == names
    assert all(site.content_hash for site in graph.sites)
    assert circuit.means[LAST].f.shape == (2, len(graph.slots), 24)
    assert contrast_of(circuit.prompts, slot_names=graph.slots).n_slots == len(graph.slots)
    assert len(circuit.prompts) == len(circuit.prompts.attributes["io"]) == 12
    rows = {(row["name"], row["arm"]): row for row in read_rows(found)}
    assert ("faithfulness", "all latents, no errors") in rows
    assert ("completeness", "circuit(n=4)") in rows
    assert ("completeness", "circuit, no errors(n=4)") in rows
    assert ("faithfulness", "pca(n=4)") in rows
    assert {p.stage for p in manifest.parents} == {"dictionary"}


def test_the_viewers_file_validates(made):
    exported = json.loads((made[2] / "viewer.json").read_text())
    jsonschema.validate(exported, schema())
    assert exported["metadata"]["prompt"].startswith("when")


def test_the_tables_say_what_was_found(made):
    _, _, found = made
    graph = circuits_features.open_circuit(found).graph
    console = Console(width=160, record=True)
    console.print(circuit_tables(found, graph, 3))
    text = console.export_text()
    assert graph.nodes[0].id in text and "ceiling" in text and "by activation" in text
    assert "what nodes send on is 0% off their effects" in text
    for title in circuits_features.CURVES.values():
        assert f"{title}, of n nodes" in text


def invoke(command, config, folder):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    result = CliRunner().invoke(app, ["circuits", command, str(path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_a_circuit(made, patched, tmp_path):
    out, paths, found = made
    printed = invoke("features", features_config(out, paths), tmp_path)
    node = circuits_features.open_circuit(found).graph.nodes[0].id
    assert node in printed and f"saelab app {out}" in "".join(printed.splitlines())


def test_curves_are_read_back_by_what_they_measure(made):
    _, _, found = made
    rows = {(row["name"], row["arm"]): row["value"] for row in read_rows(found)}
    arms = {"completeness": {"circuit", "circuit, no errors"}}
    arms["faithfulness_of_ceiling"] = {"circuit, no errors", "by activation", "random 0"}
    arms["faithfulness"] = (
        arms["completeness"] | arms["faithfulness_of_ceiling"] | {"neurons", "pca"}
    )
    for name, expected in arms.items():
        curves = circuits_features.read_curves(found, name)
        assert set(curves) == expected
        for arm, (point,) in curves.items():
            assert (point.n_nodes, point.value) == (4, rows[name, f"{arm}(n=4)"])
    with pytest.raises(ConfigError, match="did you mean 'completeness'"):
        circuits_features.read_curves(found, "completness")


def test_discovery_and_test_share_no_prompt_and_both_have_every_template(toy_model):
    data = circuit_prompts.draw("ioi", toy_model, 24, seed=0)
    first, second = parted(data, 8)
    assert len(first) == 8 and sorted([*first.tolist(), *second.tolist()]) == list(range(24))
    assert set(data.templates[first].tolist()) == set(data.templates[second].tolist()) == {0, 1}


def prompts(data):
    rows = zip(data.clean.tolist(), data.lengths.tolist(), strict=True)
    return [tuple(prompt[:length]) for prompt, length in rows]


class Seen(Exception):
    pass


def test_no_prompt_is_both_found_on_and_tested_on(made, patched, monkeypatch, toy_model, tmp_path):
    _, paths, _ = made
    task = {"name": "ioi", "pairs": 60, "test_pairs": 60, "force": True}
    plain = prompts(circuit_prompts.draw("ioi", toy_model, 120, seed=0))
    assert len(set(plain)) < len(plain), "words are so few that a draw repeats itself"

    def pairs(data, **_):
        raise Seen(data)

    def evaluation(model, site, fit, test, *_, **__):
        raise Seen(fit, test)

    monkeypatch.setattr(circuits_features, "contrast_of", pairs)
    with pytest.raises(Seen) as seen:
        circuits_features.features(features_config(tmp_path, paths, task=task))
    (data,) = seen.value.args
    assert len(data) == len(set(prompts(data))) == 120
    mixed = features_config(tmp_path, paths, task=task | {"shuffled": True})
    with pytest.raises(Seen) as seen:
        circuits_features.features(mixed)
    assert prompts(seen.value.args[0]) == prompts(shuffled(data)) != prompts(data)
    monkeypatch.setattr(circuits_supervised, "SupervisedEvaluation", evaluation)
    with pytest.raises(Seen) as seen:
        circuits_supervised.supervised(supervised_config(tmp_path, paths[1:]))
    fit, test = map(prompts, seen.value.args)
    assert (len(fit), len(test)) == (160, 48) and not set(fit) & set(test)


def test_dictionaries_of_another_model_or_of_one_site_twice_are_refused(made, patched, toy_model):
    out, paths, found = made
    other = circuit_prompts.save_dictionary(
        out, toy_model, FIRST, seed=5, model={"source": "toy:seed=3", "name": "toy-3"}
    )
    with pytest.raises(ArtifactError, match="trained on activations of toy:seed=3"):
        circuits_features.features(features_config(out, [other]))
    again = circuit_prompts.save_dictionary(out, toy_model, FIRST, seed=6)
    with pytest.raises(ConfigError, match=f"{paths[0]} and {again} are both of {FIRST}"):
        circuits_features.features(features_config(out, [paths[0], again]))
    with pytest.raises(ArtifactError, match="no finished dictionary"):
        circuits_features.features(features_config(out, [out / "dictionary" / "none"]))
    with pytest.raises(ArtifactError, match="is a circuit"):
        circuits_features.features(features_config(out, [found]))
    with pytest.raises(ArtifactError, match="a circuit is wanted"):
        circuits_features.open_circuit(paths[0])
    with pytest.raises(ConfigError, match="at least one"):
        circuits_features.features(features_config(out, []))


def test_weights_decide_whose_dictionary_it_is(tmp_path, toy_model):
    def chosen(seed, **facts):
        path = circuit_prompts.save_dictionary(tmp_path, toy_model, FIRST, seed=seed, **facts)
        return list(chosen_dictionaries(features_config(tmp_path, [path]))) == [path]

    def parent(name, fingerprint):
        with artifacts.open_draft(tmp_path, "store", name, name * 8) as draft:
            draft.write("stats", name.encode())
            facts = {"model_fingerprint": fingerprint}
            draft.finish(stage="store", name=name, inputs={}, parents=[], facts=facts)
        return artifacts.parent_of(draft.target)

    own, other = toy_model.fingerprint, "0" * 64
    renamed = {"source": "toys/old-name", "dtype": "float32", "name": "toy"}
    assert chosen(0, model_fingerprint=own)
    assert chosen(1, model_fingerprint=own, model=renamed)
    assert chosen(2, model_fingerprint=None)
    with pytest.raises(ArtifactError, match="of toy with other weights than it has now, but"):
        chosen(3, model_fingerprint=other)
    assert chosen(4, parents=[parent("a", own)])
    with pytest.raises(ArtifactError, match="of toy with other weights than it has now, but"):
        chosen(5, parents=[parent("b", other)])
    replaced = replace(parent("c", other), content_hash="1" * 64)
    assert chosen(6, parents=[replaced])


def test_a_site_that_the_model_lacks_is_refused_by_the_dictionarys_name(made, patched, toy_model):
    out, paths, _ = made
    lost = circuit_prompts.save_dictionary(
        out, toy_model, FIRST, seed=7, site="blocks.7.hook_resid_post"
    )
    with pytest.raises(SiteError, match=f"{lost} is of a site that toy lacks.*blocks.7"):
        circuits_features.features(features_config(out, [paths[0], lost]))
    with pytest.raises(SiteError, match=f"{lost} is of a site that toy lacks"):
        circuits_supervised.supervised(supervised_config(out, [lost]))


def test_a_task_that_the_model_cannot_do_is_refused_unless_forced(made, patched, monkeypatch):
    from unittest import mock

    from saelab.circuits import examples, tasks

    def as_written(*args, **kwargs):
        with mock.patch.multiple(examples, **circuit_prompts.WORDING):
            return tasks.draw(*args, **kwargs)

    monkeypatch.setattr(circuits_features, "draw", as_written)
    out, paths, _ = made
    task = {"name": "ioi", "pairs": 4, "test_pairs": 4}
    with pytest.raises(TaskError, match="cannot do the task"):
        circuits_features.features(features_config(out, paths, task=task))


def test_what_was_forced_is_refused_without_force_also_when_it_is_found(
    made, patched, monkeypatch, tmp_path
):
    unable = TaskScore("ioi", "logit_difference", 9, 0.4, 0.1, 0.5, 0.1, 0.2, 0.0, 0.1, 0.2)
    _, paths, _ = made
    circuit = features_config(tmp_path, paths, name="forced")
    labels = supervised_config(tmp_path, paths[1:])
    for runs, run, config in (
        (circuits_features, circuits_features.features, circuit),
        (circuits_supervised, circuits_supervised.supervised, labels),
    ):
        monkeypatch.setattr(runs, "score", lambda *_, **__: unable)
        plain = config.model_copy(update={"task": config.task.model_copy(update={"force": False})})
        with pytest.raises(TaskError, match="40% right of 9"):
            run(plain)
        assert run(config) == run(config)
        with pytest.raises(TaskError, match="40% right of 9"):
            run(plain)


def test_a_supervised_run_scores_every_arm(made, patched, tmp_path):
    out, paths, _ = made
    config = supervised_config(out, [paths[1].parent / "toy-1-0"])
    found = circuits_supervised.supervised(config)
    rows = read_rows(found)
    floor = "untrained random decoder"
    assert {row["arm"] for row in rows} == {"supervised", "none", "toy-1-0", floor}
    values = {(row["arm"], row["name"]): row["value"] for row in rows}
    for attribute in ("subject", "order"):
        assert values["supervised", f"f1[{attribute}]@end"] == pytest.approx(1)
    assert 0 <= values[floor, "agreement[io, k=2]"] <= 1
    numbers = {row["name"]: row["n"] for row in rows}
    assert (numbers["f1[subject]@end"], numbers["norm[io]@end"], numbers["moved"]) == (80, 160, 48)
    assert {arm for arm, name in values if " | α(" in name} == {"toy-1-0", floor}
    console = Console(width=160, record=True)
    console.print(supervised_table(found))
    assert "necessity" in console.export_text()
    printed = invoke("supervised", config, tmp_path)
    assert "necessity" in printed and found.name in printed
    two_sites = config.model_copy(update={"dictionaries": paths})
    with pytest.raises(ConfigError, match="compared at one site"):
        circuits_supervised.supervised(two_sites)


def test_the_shipped_configurations_are_valid():
    from pathlib import Path

    shipped = Path(__file__).parents[2] / "experiments" / "circuits"
    made = {f"circuits-{m.name}" for m in load_config(shipped / "dictionaries.yaml").members()}
    features = load_features(shipped / "ioi.yaml")
    assert len(features.dictionaries) >= 3 and features.task.name == "ioi"
    supervised = load_supervised(shipped / "supervised.yaml")
    assert len(supervised.dictionaries) == 5 and supervised.random_decoder is not None
    assert {path.name for path in (*features.dictionaries, *supervised.dictionaries)} == made
