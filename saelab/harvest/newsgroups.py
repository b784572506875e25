"""Threads of newsgroup posts whose headers are gone: `split_field: thread`.

The posts of `20newsgroups` have no subject line of their own, but each begins with it, and those
that quote go on with "in article … writes". Where a subject ends is known only there; so a thread
is called by its first two words, which all posts under one subject share. Threads that begin alike
are one, which makes them larger and lets nothing through.
"""

THREAD = "thread"
"""What `corpus.split_field` calls it."""
SOURCES = frozenset({"20newsgroups", "20newsgroups-test"})
_WORDS = 2


def has_threads(source: str, field: str | None) -> bool:
    """Whether a column of this source is the thread, which is found in the text."""
    return field == THREAD and source in SOURCES


def thread_of(text: str) -> str:
    """Return the first two words of a post's subject, without "re"; one if it has no more."""
    words = text.split()
    first = next((place for place, word in enumerate(words) if word != "re"), 0)
    subject = words[first : first + _WORDS]
    if words[first + 1 : first + 3] == ["in", "article"]:
        subject = subject[:1]
    return " ".join(subject)
