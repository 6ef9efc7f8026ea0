"""The errors a user can cause, each saying where, what was got, what is allowed and what to do."""

from difflib import get_close_matches

RENAMED = dict.fromkeys(("init", "alpha_init", "k", "clip"), "range")  # of quantizers: what picks the first range


class QexpError(Exception):
    """A mistake in the request (not a bug): shown without a traceback on the command line."""


def near(name: str, known: list[str], n: int = 3, prefix: str = "") -> str:
    """Returns `" (did you mean 'a', 'b'?)"` for the known names closest to `name`, each after the prefix, or an empty string."""
    close = get_close_matches(name.strip("*"), known, n=n, cutoff=0.4)
    return f" (did you mean {', '.join(repr(prefix + c) for c in close)}?)" if close else ""
