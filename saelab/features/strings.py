"""Token ids as text, for the index."""

from jaxtyping import Int
from torch import Tensor

from saelab.protocols import LanguageModel, Store


class Strings:
    """Token ids as text: the model's vocabulary, or what the store's windows show."""

    def __init__(self, store: Store, site: str, model: LanguageModel | None) -> None:
        """Read the windows of a site where there is no model."""
        self._model = model
        self._known: dict[int, str] = {}
        if model is None:
            for window in store.windows(site):
                for token, text in zip(window.ids.tolist(), window.strings, strict=True):
                    self._known.setdefault(token, text)

    def of(self, ids: Int[Tensor, " n"]) -> dict[int, str]:
        """Return a mapping that holds at least these ids."""
        unknown = sorted(set(ids.tolist()) - self._known.keys())
        if unknown:
            assert self._model is not None
            self._known.update(zip(unknown, self._model.to_strings(unknown), strict=True))
        return self._known
