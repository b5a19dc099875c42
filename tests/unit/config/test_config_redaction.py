"""What of texts and of the environment is a secret."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path

import pytest

from megatron_lpa.config.redaction import Redaction


def redacted(text: str) -> str:
    """As the text, JSON and YAML of a snapshot are redacted."""
    return Redaction(os.environ).tree({"a": [text]})["a"][0]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "WANDB_API_KEY",
            "HF_TOKEN",
            "GH_PAT",
            "HF_AUTH",
            "DB_PWD",
            "my_password",
            "AUTH_HEADER",
            "SSHPASS",
        ),
        *("AZURE_STORAGE_CONN_STR", "CONNECTION_STRING", "SENTRY_DSN", "DATABASE_URL", "MYSQL_PWD", "NETRC"),
        *(
            "SLACK_WEBHOOK",
            "SLACK_WEBHOOK_URL",
            "SESSION_COOKIE",
            "API_BEARER",
            "REDIS_URL",
            "HTTPS_PROXY_URL",
        ),
    ],
)
def test_what_is_called_like_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/9j2kd83hs")
    assert redacted("a /9j2kd83hs b") == f"a <{name}> b"


@pytest.mark.parametrize("name", ["TOKENIZER", "PATH_TO_DATA", "AUTHOR", "SSH_KEY_FILE", "PWD"])
def test_a_path_is_no_secret(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a snapshot's config would name no data that exists."""
    monkeypatch.setenv(name, str(tmp_path))
    assert redacted(f"prefix: {tmp_path}") == f"prefix: {tmp_path}"


def test_the_longest_secret_is_removed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("A_TOKEN", "12345678"), ("B_TOKEN", "123456789abc"), ("C_TOKEN", "x12345678y")):
        monkeypatch.setenv(name, value)
    found = redacted("123456789abc 12345678 x12345678y 1234567")
    assert found == "<B_TOKEN> <A_TOKEN> <C_TOKEN> 1234567"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:p/a@ss@host/x", "https://<removed>@host/x"),
        ("https://user:p@ss/w@rd@host", "https://<removed>@host"),
        ("https://ghp_token@github.com/a/b.git", "https://<removed>@github.com/a/b.git"),
        ("postgres://u:p@h:5432/d?x=1", "postgres://<removed>@h:5432/d?x=1"),
        ("git+https://github.com/a/b@v1.0", "git+https://github.com/a/b@v1.0"),
        ("https://host/@scope/p", "https://host/@scope/p"),
        ("https://host:8080/x", "https://host:8080/x"),
        ("https://h/x?sv=1&sig=aZ%2f9&se=2", "https://h/x?sv=1&sig=<removed>&se=2"),
        ("https://h/x?api_key=abc#part", "https://h/x?api_key=<removed>#part"),
        (
            "https://h/x?X-Amz-Signature=abc&x-amz-credential=d",
            "https://h/x?X-Amz-Signature=<removed>&x-amz-credential=<removed>",
        ),
        ("'https://u:p@h', 'a@b'", "'https://<removed>@h', 'a@b'"),
        ("https://bob:pa'ssw0rd@host/x", "https://<removed>@host/x"),
        ('https://bob:pa"ssw0rd@host/x', "https://<removed>@host/x"),
        ("https://bob:pa',`ssw0rd@host/x", "https://<removed>@host/x"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=<removed>"),
        ("https://h/x?a=b#id=1&access_token=abc", "https://h/x?a=b#id=1&access_token=<removed>"),
        ("https://h/x#part", "https://h/x#part"),
    ],
)
def test_secrets_of_a_url_are_removed(url: str, expected: str) -> None:
    assert redacted(f"x {url} y") == f"x {expected} y"


@pytest.mark.parametrize("password", ["pa'ss", 'pa"ss', "pa',s", 'pa",s', "p`a'\"s", "it's'", "'ab'"])
def test_a_quote_in_a_password_does_not_end_it(password: str) -> None:
    url = f"https://bob:{password}@host/x"
    assert Redaction({}).words([url]) == ["https://<removed>@host/x"]
    quoted = [
        shlex.quote(url),
        shlex.quote(f"--proxy={url}"),
        json.dumps(url),
        json.dumps({"a": url, "b": "c@d"}),
    ]
    for text in [*quoted, json.dumps(json.dumps({"a": url, "b": "c@d"}))]:
        found = Redaction({}).shell(f"run {text} 'a@b'")
        assert "https://<removed>@host/x" in found and found.endswith(" 'a@b'") and "bob" not in found, found
        assert ("c@d" in text) == ("c@d" in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("""f('https://u:p@h','a@b')""", """f('https://<removed>@h','a@b')"""),
        ("""{"a":"https://u:p@h","b":"c@d"}""", """{"a":"https://<removed>@h","b":"c@d"}"""),
        ("""<a href="https://h:80/x">c@d</a>""", """<a href="https://h:80/x">c@d</a>"""),
        ("""x=`curl https://u:p@h`;y=c@d""", """x=`curl https://<removed>@h`;y=c@d"""),
        ("""a: https://bob:pa'ss@h/x\nb: c@d""", """a: https://<removed>@h/x\nb: c@d"""),
        ("""a: 'https://bob:pa''ss@h/x'\nb: c@d""", """a: 'https://<removed>@h/x'\nb: c@d"""),
        ("""git clone https://bob:pa'ss@h/x""", """git clone https://<removed>@h/x"""),
    ],
)
def test_the_next_quoted_word_stays(text: str, expected: str) -> None:
    assert Redaction({}).text(text) == expected


def test_the_password_of_a_url_is_removed_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE", "https://user:pass/w@rd1@host/x")
    assert redacted("curl -u user:pass/w@rd1 x") == "curl -u user:<SERVICE> x"


@pytest.mark.parametrize(
    "line",
    [
        *("HF_TOKEN=$HF_TOKEN", "HF_TOKEN=${HF_TOKEN}", 'export A_KEY="$1" B=c', "HF_TOKEN=",
        "--train.tokens=51e9", "tokens: 51e9"),
        *("TOKENIZER=/t", "srun --nodes=2 --mpi=none", "FORWARD=a", "tiktoken==0.14.0", "OLDPWD=/a",
        "COMPASS=n", "BYPASS=1"),
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(line: str) -> None:
    assert Redaction({}).shell(line) == line


@pytest.mark.parametrize(
    "text",
    [
        "a=" * 10**5,
        "A_KEY=" * 10**5,
        "a" * 10**6,
        "A_KEY='" + "x" * 10**6,
        "\\\n" * 10**5,
        "(" * 10**5,
        '"a://b",' * 10**5,
        "'a://" + "'" * 10**6,
        "a://" * 10**5,
        "a://" + "\\" * 10**6,
        '\\"a://' + "\\" * 10**5,
        "a:b://#a=" * 10**5,
    ],
)
def test_the_time_grows_with_the_text(text: str) -> None:
    start = time.monotonic()
    Redaction({}).shell(text)
    assert time.monotonic() - start < 20


def test_a_secret_that_looks_like_a_path_too_long_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "/" + "x" * 5000)
    assert redacted("/" + "x" * 5000) == "<SOME_KEY>"
