"""Takes secrets out of what is written down about a run.

A secret is the value of an environment variable that is called like one, the password of a URL, and in shell scripts what
is given to a name that is called like one. No list of names is complete: what is recorded should be little, too.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_lpa.config.schema import CONFIG_KEYS

SECRET_NAME = re.compile(
    r"KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|SSHPASS|CREDENTIAL|COOKIE|BEARER|WEBHOOK|NETRC|AUTHORIZATION"
    r"|CONN(ECTION)?_?STR|_PWD$|(^|_)(PAT|AUTH|PASS|DSN|JWT|SAS)(_|$)"
    r"|(DATABASE|DB|SQL|REDIS|MONGO\w*|POSTGRES\w*|BROKER|AMQP|PROXY)_UR[IL]$",
    re.IGNORECASE,
)
"""Of a variable or an option."""

SHORTEST_SECRET = 8
"""Characters. A shorter value is part of too many words, and of no use as a secret."""

_URL = re.compile(r"(?P<scheme>\w://)(?P<rest>[^\s\"'`]+)")
_PASSWORD = re.compile(r"\w://[^\s/:@]*:(?P<password>\S+)@")
_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s;&|"'])+"""
_ASSIGNMENT = re.compile(rf"(?P<name>[A-Za-z_][\w.-]*)(?P<between>=)(?P<value>{_VALUE})")
_OPTION = re.compile(rf"(?P<name>(?<!\S)--?[A-Za-z_][\w.-]*)(?P<between>[ \t]+)(?P<value>(?!-){_VALUE})")


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option is called like a secret. No key of a configuration is one: ``train.tokens``."""
    return name.lstrip("-") not in CONFIG_KEYS and SECRET_NAME.search(name) is not None


class Redaction:
    """Removes the secrets of an environment, in whatever way their characters are quoted.

    Args:
        environment: names and values.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._names: dict[str, str] = {}
        for name, value in environment.items():
            secrets = [value] if is_secret_name(name) and not _names_a_file(value) else []
            secrets += [match["password"] for match in _PASSWORD.finditer(value)]
            for secret in secrets:
                if len(secret) >= SHORTEST_SECRET:
                    for form in _forms(secret):
                        self._names.setdefault(form, name)
        # The longest first: one secret may be the beginning of another.
        forms = sorted(self._names, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, forms))) if forms else None

    def text(self, text: str) -> str:
        """``text`` with ``<NAME>`` for each secret, and without user names and passwords in URLs."""
        if self._known is not None:
            text = self._known.sub(lambda match: f"<{self._names[match[0]]}>", text)
        return _URL.sub(lambda match: match["scheme"] + _without_password(match["rest"]), text)

    def shell(self, text: str) -> str:
        """The same for a shell script or a command line, where what is given to a name is known by the name."""
        for pattern in (_ASSIGNMENT, _OPTION):
            text = pattern.sub(_without_value, self.text(text))
        return text

    def words(self, words: Sequence[str]) -> list[str]:
        """The same for the words of a command, before they are quoted."""
        found: list[str] = []
        for word in words:
            name, equals, _ = word.partition("=")
            of_secret = bool(found) and found[-1].startswith("-") and is_secret_name(found[-1])
            if equals and is_secret_name(name):
                found.append(f"{name}=<removed>")
            elif of_secret and "=" not in found[-1] and not word.startswith("-"):
                found.append("<removed>")
            else:
                found.append(self.text(word))
        return found

    def tree(self, tree: Any) -> Any:
        """The same for every text in nested dictionaries and lists, before they are written as YAML or JSON."""
        if isinstance(tree, dict):
            return {self.tree(key): self.tree(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.tree(value) for value in tree]
        return self.text(tree) if isinstance(tree, str) else tree


def _names_a_file(value: str) -> bool:
    """A path is no secret; without paths, a record of a run would name no data."""
    return value.startswith("/") and os.path.exists(value)


def _forms(secret: str) -> set[str]:
    """How JSON, YAML, shells, Python and URLs write the same characters."""
    return {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        secret.replace("'", "''"),
        secret.replace("'", "\\'"),
        secret.replace("'", "'\"'\"'"),
        secret.replace("\\", "\\\\"),
        re.sub(r"([\"\\$`])", r"\\\1", secret),
        _in_yaml(secret, allow_unicode=False),
        _in_yaml(secret, allow_unicode=True),
        urllib.parse.quote(secret, errors="surrogateescape"),
        urllib.parse.quote(secret, safe="", errors="surrogateescape"),
        urllib.parse.quote_plus(secret, errors="surrogateescape"),
    }


def _in_yaml(secret: str, allow_unicode: bool) -> str:
    return str(yaml.safe_dump(secret, default_style='"', width=10**6, allow_unicode=allow_unicode)).strip()[
        1:-1
    ]


def _without_password(rest: str) -> str:
    """What follows ``://``. A password may have '/' and '@' in it: with a colon in front, it ends at the last '@'."""
    authority = rest.partition("/")[0]
    searched = rest if ":" in authority else authority
    head, at, tail = searched.rpartition("@")
    return f"<removed>@{tail}{rest[len(searched) :]}" if at and head else rest


def _without_value(match: re.Match[str]) -> str:
    value = match["value"].lstrip("\"'")
    known = value.startswith(("$", "<")) or not value or not is_secret_name(match["name"])
    return match[0] if known else f"{match['name']}{match['between']}<removed>"
