"""`qexp new quantizer|model|dataset|range NAME`: writes a Python file and a YAML that run as they are, to edit."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import NamedTuple

from qexp.command.commands import called
from qexp.command.folders import CONF, PACKAGE, config_folders
from qexp.command.listing import offered
from qexp.errors import QexpError

TEMPLATES = Path(__file__).parent / "templates"


class Kind(NamedTuple):
    """A kind of thing to write: its part of the package, its group of choices, how to try it, and the tests that find it in a clone."""

    part: str
    group: str
    tried: str
    tests: str


KINDS = {
    "quantizer": Kind("quantizers", "quant", "quant={name} bits=w4a4", "tests/quantizers"),
    "range": Kind("ranges", "quant", "quant={name} bits=w4a4", "tests/quantizers"),
    "model": Kind("models", "model", "model={name} quant=minmax bits=w8a8", "tests/models/test_conf_models.py"),
    "dataset": Kind("data", "dataset", "dataset={name} quant=minmax bits=w8a8", "tests/models/test_conf_models.py"),
}


def write(kind: str, name: str) -> list[Path]:
    """Writes the files and returns them: in a clone into qexp/ and conf/, elsewhere into the folder where the user stands.

    Raises:
        QexpError: The name is not one of a Python module, or is taken.
    """
    part, group = KINDS[kind][:2]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise QexpError(f"NAME={name} is not allowed; use small letters, digits and _, such as my_{kind}")
    if name in offered(config_folders([]), group):
        raise QexpError(f"NAME={name} is taken: {group}={name} is a choice already; use another name")
    if in_clone():
        source, module = PACKAGE / part / f"{name}.py", f"qexp.{part}.{name}"
        choice = CONF / group / f"{name}.yaml"
    else:
        if find_spec(name) is not None:
            raise QexpError(
                f"NAME={name} is taken: Python has a module of this name; use another name, such as my_{name}"
            )
        source, module = Path.cwd() / f"{name}.py", name
        choice = Path.cwd() / "conf" / group / f"{name}.yaml"
    for path in (source, choice):
        if path.exists():
            raise QexpError(f"NAME={name} is taken: {path} exists; use another name, or remove the file")
    words = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "Class": class_name(name),
        "module": module,
    }
    for path, template in ((source, f"{kind}.py.template"), (choice, f"{kind}.yaml.template")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((TEMPLATES / template).read_text()).substitute(words))
    return [source, choice]


def class_name(name: str) -> str:
    """Returns the name of the class in a file.

    >>> class_name("my_method2")
    'MyMethod2'
    """
    return "".join(word.capitalize() for word in name.split("_"))


def in_clone() -> bool:
    """Whether the user stands in the clone that this program is run from."""
    here = Path.cwd().resolve()
    return CONF.parent != PACKAGE and CONF.parent.resolve() in (here, *here.parents)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, prints their paths and how to try them; returns 0, or 2 with one line on stderr for a mistake."""
    parser = argparse.ArgumentParser(prog=f"{called()} new", description=__doc__.partition(": ")[2])
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("name", metavar="NAME", help="small letters, digits and _; also the name of the choice")
    given = parser.parse_args(argv)
    try:
        written = write(given.kind, given.name)
    except (QexpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    print(f"try it:      {called()} {KINDS[given.kind].tried.format(name=given.name)}")
    if in_clone():
        print(
            f"its tests:   python -m pytest -q {KINDS[given.kind].tests} -k '{given.name} or {class_name(given.name)}'"
        )
    return 0
