"""What evaluators that write text prepare once, and share between the dictionaries of a site."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from saelab.edits.placement import Steerable
from saelab.errors import ConfigError
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.steering.judge_configs import ModelJudgeConfig
from saelab.steering.judging import Judges, judges_of
from saelab.steering.scene import Scene, SteeringConfig, scene_of


@dataclass(frozen=True)
class Readers:
    """Who reads what is written."""

    judges: Judges
    fluency: LanguageModel | None
    """Another model whose loss says what is fluent; None: the steered one's, unsteered."""


G = TypeVar("G")
"""What is prepared for a concept."""
Prepare = Callable[[Steerable, Store, Scene, Readers, int], G]
"""Prepares the concept at a place of the scene's labels."""
Load = Callable[..., LanguageModel]
"""Loads another model, as `saelab.load_model` does: by its source, with a `device`."""


@final
class Prepared(Generic[G]):
    """The judges of a store, and what each concept needs whatever the dictionary."""

    def __init__(
        self,
        name: str,
        config: SteeringConfig,
        site: str | None,
        prepare: Prepare[G],
        load: Load | None = None,
    ) -> None:
        """Prepare for the evaluator `name` at `site`; by default the store's only one.

        `load` is needed by configurations that name other models.
        """
        self._name, self._config, self._site, self._prepare = name, config, site, prepare
        self._load = load
        self._concepts: dict[Hashable, G] = {}
        self._readers: dict[Hashable, Readers] = {}

    def concepts(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None
    ) -> Iterator[tuple[Steerable, Scene, int, G]]:
        """Yield the model, the dictionary's scene, and each concept's place and preparation.

        Raises ConfigError without a model that can be steered, without two frequent labels, or for
        a concept that the judge's corpus does not know.
        """
        if not isinstance(model, Steerable):
            raise ConfigError(f"evaluate.evals: {self._name} writes text and needs a live `model:`")
        scene = scene_of(self._config, dictionary, store, self._site)
        who = (store.content_hash, model.fingerprint)
        if who not in self._readers:
            self._readers = {who: self._read_by(model, store, scene)}
        for place in scene.places:
            key = (store.content_hash, scene.site, model.fingerprint, place)
            if key not in self._concepts:
                self._concepts[key] = self._prepare(model, store, scene, self._readers[who], place)
            yield model, scene, place, self._concepts[key]

    def _read_by(self, model: Steerable, store: Store, scene: Scene) -> Readers:
        judge, fluency = self._config.judge, self._config.fluency_model
        source = judge.source if isinstance(judge, ModelJudgeConfig) else None
        asked = model if source is None else self._loaded(source, model)
        other = None if fluency is None else self._loaded(fluency, model)
        return Readers(judges_of(store, scene.labelled, judge, asked), other)

    def _loaded(self, source: str, steered: LanguageModel) -> LanguageModel:
        """Return a model that the configuration names, beside the steered one."""
        if self._load is None:
            raise ConfigError(
                f"{self._name} is to read with the model {source!r} and was given no way to load "
                "it; make the evaluator with load=saelab.load_model"
            )
        return self._load(source, device=steered.device)
