"""``~`` and ``$VAR`` in the paths of a configuration, as a shell has them.

Where a path stands in a file, between quotes or behind ``=``, no shell expands it. So the configuration does,
once, while it is read; what a run records is the expanded path. Variables first, then a ``~`` at the
beginning:

* ``$NAME`` and ``${NAME}``: the environment variable, which has to be there and not empty;
* ``~`` and ``~name``: a home folder, up to the first ``/``;
* ``$$``: a dollar sign. ``./~`` begins the path of what is called ``~`` itself.
"""

from __future__ import annotations

import difflib
import os
import re

from megatron_lpa.errors import UserError, named, shown

PATH_KEYS = frozenset(
    {
        "data.prefix", "data.blend", "data.train_prefix", "data.valid_prefix", "data.test_prefix",
        "data.cache_dir",
        "data.tokenizer", "train.deepspeed_config", "logging.run_dir",
    }
)  # fmt: skip
"""Keys whose text is a path, or whose names are."""

_VARIABLE = re.compile(r"\$(?:\$|(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})?", re.ASCII)


def expanded(path: str, what: str) -> str:
    """A path with its variables and its home folder filled in.

    Args:
        path: as it was written.
        what: whose value it is and where it was written, for messages.

    Raises:
        UserError: an environment variable that is not set or empty, a ``$`` that begins none, or a user or
            home folder that is not known.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match["plain"] or match["braced"]
        if name is None:
            raise UserError(
                f"{what} is {shown(path)}, where '$' begins no name of a variable: write $NAME or ${{NAME}}, "
                "or $$ for a dollar sign"
            )
        if found := os.environ.get(name):
            return found
        state, near = ("is empty", "") if name in os.environ else ("is not set", _near(name))
        raise UserError(
            f"{what} is {shown(path)} but the environment variable {named(name)} {state}; {near}set it, "
            "write the path out, or write $$ for a dollar sign"
        )

    return _at_home(_VARIABLE.sub(value, path), what)


def _at_home(path: str, what: str) -> str:
    if not path.startswith("~"):
        return path
    name, slash, rest = path[1:].partition("/")
    # With an empty HOME, Python gives "/".
    home = os.environ["HOME"] if not name and "HOME" in os.environ else os.path.expanduser(f"~{name}")
    if not home.startswith("/"):
        problem = (
            f"there is no user {named(name)}" if name else f"the home folder, {shown(home)}, is no whole path"
        )
        raise UserError(
            f"{what} is {shown(path)} but {problem}; for what is called so itself, write ./{named(path)}"
        )
    return f"{home.rstrip('/')}{slash}{rest}" or "/"


def _near(name: str) -> str:
    names = difflib.get_close_matches(name[:100], os.environ, n=1, cutoff=0.75)
    return f"did you mean ${named(names[0])}? Or " if names else ""


def escaped(path: str) -> str:
    """Text that ``expanded`` gives back as it is, or as a path to the same place."""
    text = path.replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text
