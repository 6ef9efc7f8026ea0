"""Key maps as text: `{"^net[.]": "", "total_ops$": null}`, in the form of the command line and of YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from qexp.errors import QexpError

EXAMPLE = '{"^net[.]": "", "total_ops$": null}'


def parsed(text: str) -> dict[str, Any]:
    r"""Returns the mapping that a text describes; a backslash stays a backslash, as regular expressions need it.

    Raises:
        QexpError: The text is not a mapping.

    >>> parsed(r'{"^net\.(\d)": "\\1", "total_ops$": null}')
    {'^net\\.(\\d)': '\\1', 'total_ops$': None}
    """
    kept = re.sub(r'\\(\\|"|)', lambda found: found[0] if found[1] else "\\\\", text) if '"' in text else text
    try:
        said = yaml.safe_load(kept)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QexpError(f"key_map={text} cannot be read ({why}); write patterns in quotes: {EXAMPLE}") from error
    if not isinstance(said, Mapping):
        raise QexpError(f"key_map={text} is not allowed; use a mapping: {EXAMPLE}")
    return dict(said)
