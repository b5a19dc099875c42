"""Takes secrets out of what is written down about a run.

A secret is the value of an environment variable that is called like one, the password of a URL, and in shell
scripts what is given to a name that is called like one. No list of names is complete: what is recorded should
be little, too.
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
    r"KEY|TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|SSHPASS|CREDENTIAL|CREDS$|COOKIE|BEARER|WEBHOOK|NETRC|AUTHORIZATION"
    r"|CONN(ECTION)?_?STR|(?<!^)(?<!OLD)PWD?$|(?<!^BY)(?<!COM)PASS$|(^|[_.-])(PAT|AUTH|PASS|CREDS?|DSN|JWT|SAS)([_.-]|$)"
    r"|(DATABASE|DB|SQL|REDIS|MONGO\w*|POSTGRES\w*|BROKER|AMQP|PROXY)_UR[IL]$",
    re.IGNORECASE,
)
"""Of a variable or an option."""

SHORTEST_SECRET = 8
"""Characters. A shorter value is part of too many words, and of no use as a secret."""

_URL = re.compile(r"\w://")
_OPENING = re.compile(r"""(\\*)(["'`])[\w+.=-]*\Z""")
_MOST_BEFORE = 60
"""Characters between a quote and a URL's ``://``: an option and a scheme."""
_BEHIND = r"(?=[\s,;:()\[\]{}<>|&+]|\Z)"
"""What follows a quote that ends a text. A quote with a letter behind it may belong to a password."""
_ESCAPED = r"""'"'"'|'\\''|\\\S"""
"""How shells, JSON and Python write a quote between quotes."""
_TO_BLANK = re.compile(r"\S*")
_TO_QUOTE = {
    "": re.compile(rf"""(?:{_ESCAPED}|[^\s"'`]|["'`](?!{_BEHIND}))*"""),
    "'": re.compile(rf"""(?:{_ESCAPED}|''(?!{_BEHIND})|[^\s']|'(?!{_BEHIND}))*"""),
    '"': re.compile(rf"""(?:{_ESCAPED}|[^\s"]|"(?!{_BEHIND}))*"""),
    "`": re.compile(rf"""(?:{_ESCAPED}|[^\s`]|`(?!{_BEHIND}))*"""),
    "\\": re.compile(rf"""(?:\\\\\\["'`]|\\\\|['`]|(?:"|\\["'`])(?!{_BEHIND})|\\(?!["'`\\])|[^\s"'`\\])*"""),
}
"""What follows ``://``, by the quote before the URL; the last one for a quote that is itself escaped."""
_PASSWORD = re.compile(r"\w://[^\s/:@]*:(?P<password>\S+)@")
_QUERY = re.compile(r"(?P<head>[?&;#](?P<name>[\w.-]+)=)[^&;#\s]+")
_SIGNATURE = re.compile(r"(^|[_-])sig(nature)?$", re.IGNORECASE)
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")

# A word of a shell, whatever it is put together from; the last two stand for quotes that nothing closes.
_VALUE = re.compile(
    r"""(?:\$?"(?:[^"\\]|\\.)*"|\$'(?:[^'\\]|\\.)*'|'[^']*'|\$?\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}|`[^`]*`|\\.|[^\s;&|"'])+"""
    r"""|["'][^\n]*""",
    re.DOTALL,
)
# What "key: value" gives, up to the end of the line or of the quotes around both; a block of YAML in whole.
_TEXT = re.compile(
    r"""[|>][-+\d]*[ \t]*\n(?:[+ \t][^\n]*\n?)+|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.|'')*'|[^\n"']+|["'][^\n]*""",
    re.DOTALL,
)
_BLANK = r"(?:[ \t]|\\\n)"
_GIVEN = re.compile(
    rf"""(?<![\w.-])(?P<name>[\w.-]+)(?:["']?{_BLANK}*(?:(?P<colon>:[ \t]+)|(?:\+?=(?!=)|:=?){_BLANK}*|<<<{_BLANK}*))"""  # noqa: E501
    rf"|(?<!\S)(?P<option>--?[A-Za-z_][\w.-]*){_BLANK}+(?!-)"
    rf"|\b(?:setenv|printf{_BLANK}+-v|set(?:{_BLANK}+-\w+)+){_BLANK}+(?P<variable>\w+){_BLANK}+"
)
"""A name and what stands between it and its value."""
_ALWAYS = re.compile(
    rf"(?P<head>\b(?:wandb|huggingface-cli|hf{_BLANK}+auth){_BLANK}+login(?:{_BLANK}+-\S+)*{_BLANK}+(?!-)"
    rf"|\bsshpass{_BLANK}+-p{_BLANK}*|\blogin{_BLANK}[^\n;&|]*?(?<=\s)-p{_BLANK}*|\blogin{_BLANK}+\S+{_BLANK}+password{_BLANK}+"
    rf"|(?<!\S)(?:-u|-U|--user|--proxy-user)(?:{_BLANK}+|=|(?=[^\s-]))(?=[^\s:]+:)|\b(?:Bearer|Basic)[ \t]+(?=[^\s\"']))"  # noqa: E501
    rf"(?P<value>{_VALUE.pattern})",
    re.DOTALL,
)
"""What commands and headers take as a secret without a name."""
_KNOWN = re.compile(r"""(["']?)(?:\$(?:\w+|\{\w+\}|[@*#?!-])|<\w+>)?\1""")
"""A value that tells nothing: another variable's as it is, what has been removed already, or none."""


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option is called like a secret. No key of a configuration is one:
    ``train.tokens``."""
    name = name.lstrip("-")
    return name not in CONFIG_KEYS and name not in _LEAVES and SECRET_NAME.search(name) is not None


_LEAVES = frozenset(name.rpartition(".")[2] for name in CONFIG_KEYS)
"""As a YAML file of the configuration has them."""


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
                        self._names.setdefault(_upper_escapes(form), name)
        # The longest first: one secret may be the beginning of another.
        forms = sorted(self._names, key=len, reverse=True)
        self._known = re.compile("|".join(map(_pattern_of, forms))) if forms else None

    def text(self, text: str) -> str:
        """``text`` with ``<NAME>`` for each secret, and without user names, passwords and signatures in
        URLs."""
        return _without_passwords(self._without_known(text), quoted=True)

    def _without_known(self, text: str) -> str:
        if self._known is None:
            return text
        return self._known.sub(lambda match: f"<{self._names[_upper_escapes(match[0])]}>", text)

    def _value(self, text: str) -> str:
        """The same for a text without quotes of its own: up to the next blank, those in a URL are the
        URL's."""
        return _without_passwords(self._without_known(text), quoted=False)

    def shell(self, text: str) -> str:
        """The same for shell scripts, command lines, YAML and JSON, where a value is known by the name it is
        given to."""
        return _without_values(_ALWAYS.sub(_without_word, self.text(text)))

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
                found.append(self._value(word))
        return found

    def tree(self, tree: Any) -> Any:
        """The same for every text in nested dictionaries and lists, before they are written as YAML or
        JSON."""
        if isinstance(tree, dict):
            return {self.tree(key): self.tree(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.tree(value) for value in tree]
        return self._value(tree) if isinstance(tree, str) else tree


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


def _upper_escapes(text: str) -> str:
    return _ESCAPE.sub(lambda match: match[0].upper(), text)


def _pattern_of(form: str) -> str:
    """What finds a form, its percent escapes in upper or lower case."""
    return _ESCAPE.sub(lambda match: f"%(?i:{match[0][1:]})", re.escape(form))


def _without_passwords(text: str, quoted: bool) -> str:
    parts: list[str] = []
    place = 0
    while found := _URL.search(text, place):
        start = found.end()
        pattern = _TO_BLANK
        if quoted:
            opening = _OPENING.search(text[max(place, start - _MOST_BEFORE) : start - len("://")])
            pattern = _TO_QUOTE[opening[1][:1] or opening[2] if opening else ""]
        rest = pattern.match(text, start)
        assert rest is not None
        parts += [text[place:start], _without_password(rest[0])]
        place = rest.end()
    return "".join([*parts, text[place:]])


def _without_password(rest: str) -> str:
    """What follows ``://``. A password may have '/' and '@' in it: with a colon in front, it ends at the last
    '@'."""
    authority = rest.partition("/")[0]
    searched = rest if ":" in authority else authority
    head, at, tail = searched.rpartition("@")
    found = f"<removed>@{tail}{rest[len(searched) :]}" if at and head else rest
    return _QUERY.sub(_without_parameter, found)


def _without_parameter(match: re.Match[str]) -> str:
    secret = is_secret_name(match["name"]) or _SIGNATURE.search(match["name"])
    return f"{match['head']}<removed>" if secret else match[0]


def _without_word(match: re.Match[str]) -> str:
    return match[0] if _KNOWN.fullmatch(match["value"]) else f"{match['head']}<removed>"


def _without_values(text: str) -> str:
    """What is given to another name is looked through too: ``--export=ALL,A_TOKEN=...``."""
    parts: list[str] = []
    kept, place = 0, 0
    while given := _GIVEN.search(text, place):
        place = given.end()
        if not is_secret_name(given["name"] or given["option"] or given["variable"]):
            # The name alone is done with: what stands behind it may be a name as well.
            place = max(given.end(last) for last in ("name", "option", "variable"))
            continue
        value = (_TEXT if given["colon"] else _VALUE).match(text, place)
        if value is None or _KNOWN.fullmatch(value[0].strip()):
            continue
        parts += [text[kept:place], "<removed>"]
        kept = place = value.end()
    return "".join([*parts, text[kept:]])
