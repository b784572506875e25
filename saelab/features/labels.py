"""Labels of documents for the index: those of the shown windows, and how common each one is."""

from collections import Counter

from saelab.protocols import LabelledStore, Store
from saelab.types import Window


class Labels:
    """Takes in a store's windows and remembers what their documents are labelled."""

    def __init__(self, store: Store) -> None:
        """Nothing will be found if the store does not know its documents, or they have no label."""
        self._store = store if isinstance(store, LabelledStore) else None
        self.windows: Counter[str] = Counter()
        """Windows in which a document of the label keeps a position."""
        self.shown: dict[int, str] = {}
        """Labels of the documents of the windows that are shown."""

    def add(self, window: Window, *, shown: bool) -> None:
        """Take in one window."""
        if self._store is None:
            return
        for number in window.document[window.kept].unique().tolist():
            label = self._store.document(number).label
            if label is None:
                continue
            self.windows[str(label)] += 1
            if shown:
                self.shown[number] = str(label)
