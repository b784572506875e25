"""What evaluators that write text prepare once, and share between the dictionaries of a site."""

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar, final

from saelab.edits.placement import Steerable
from saelab.errors import ConfigError
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.steering.judging import Judges, judges_of
from saelab.steering.scene import Scene, SteeringConfig, scene_of

G = TypeVar("G")
"""What is prepared for a concept."""
Prepare = Callable[[Steerable, Store, Scene, Judges, int], G]
"""Prepares the concept at a place of the scene's labels."""


@final
class Prepared(Generic[G]):
    """The judges of a store, and what each concept needs whatever the dictionary."""

    def __init__(
        self, name: str, config: SteeringConfig, site: str | None, prepare: Prepare[G]
    ) -> None:
        """Prepare for the evaluator `name` at `site`; by default the store's only one."""
        self._name, self._config, self._site, self._prepare = name, config, site, prepare
        self._concepts: dict[Hashable, G] = {}
        self._judges: dict[str, Judges] = {}

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
        if store.content_hash not in self._judges:
            judges = judges_of(store, scene.labelled, self._config.judge)
            self._judges = {store.content_hash: judges}
        judges = self._judges[store.content_hash]
        for place in scene.places:
            key = (store.content_hash, scene.site, model.fingerprint, place)
            if key not in self._concepts:
                self._concepts[key] = self._prepare(model, store, scene, judges, place)
            yield model, scene, place, self._concepts[key]
