"""The reward regex:PATTERN, in a process of its own: no search can be interrupted from within. Imports re alone."""

import re


def is_found(pattern: str, text: str) -> float:
    """Return 1 where the pattern is found in the text, else 0. Bad patterns take time exponential in the text."""
    return float(re.search(pattern, text) is not None)
