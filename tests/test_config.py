from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mabridge.config import Config, ProviderConfig, load_config, parse_config
from mabridge.config_problems import line_of
from mabridge.errors import ConfigError
from mabridge.routing import Route
from mabridge.sandbox import EnvVar

WHOLE = """\
[worker]
environment_id = "env_1"
environment_key = { env = "THE_KEY" }
base_url = "https://api.example.com"
max_sessions = 3
max_idle = 5
workdir = "/work"

[providers.small]
type = "docker"
image = "python:3.12-slim"
memory = "512m"
when_done = "teardown"
ttl = 600

[providers.here]
type = "local"

[[routes]]
metadata = { team = "data-*" }
agent = "research-*"
providers = ["here", "small"]

[[routes]]
providers = ["small"]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, file="f.toml")
    return str(caught.value).splitlines()


def test_whole_file_is_read() -> None:
    config = parse_config(WHOLE)
    assert config.worker.environment_key == EnvVar(env="THE_KEY")
    assert config.worker.read_environment_id() == "env_1"
    assert (config.worker.max_sessions, config.worker.max_idle, config.worker.workdir) == (3, 5.0, "/work")
    assert config.providers["small"] == ProviderConfig(
        type="docker", options={"image": "python:3.12-slim", "memory": "512m"}, when_done="teardown", ttl=600
    )
    assert list(config.providers) == ["small", "here"]
    assert config.routes == (
        Route(metadata={"team": "data-*"}, agent="research-*", providers=("here", "small")),
        Route(providers=("small",)),
    )


def test_least_file_has_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config('[providers.b]\ntype = "local"\n[providers.a]\ntype = "local"\n')
    assert config.worker.environment_key == EnvVar(env="ANTHROPIC_ENVIRONMENT_KEY")
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_ID", "env_2")
    assert config.worker.read_environment_id() == "env_2"
    assert config.worker.max_sessions == 20
    assert config.providers["a"] == ProviderConfig(type="local", options={}, when_done="keep", ttl=3600)
    assert config.routes == (Route(providers=("b", "a")),)


def test_models_cannot_be_changed() -> None:
    config = parse_config(WHOLE)
    with pytest.raises(ValidationError):
        config.worker.max_sessions = 4


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_sessions", "max_sesions", "5: worker.max_sesions: NO KEY 'max_sessions'?"),
        ("[worker]", "[wroker]", "1: wroker: NO KEY 'worker'?"),
        ("memory", "memry", "12: providers.small.memry: NO KEY 'memory'?"),
        ("when_done =", "when_don =", "13: providers.small.when_don: NO KEY 'when_done'?"),
        (
            '"teardown"',
            '"suspend"',
            "13: providers.small.when_done: with these options, docker cannot suspend a sandbox; "
            "'keep' leaves it as it is",
        ),
        ('"teardown"', '"burn"', "13: providers.small.when_done: Input should be 'keep', 'suspend' or 'teardown'"),
        ('"docker"', '"dokcer"', "10: providers.small.type: NO TYPE 'dokcer'; did you mean 'docker'?"),
        ('type = "docker"\n', "", "9: providers.small.type: it is missing"),
        (
            '["small"]',
            '["smal"]',
            "25: routes[2].providers: there is no provider 'smal' in [providers]; did you mean 'small'?",
        ),
        ('["small"]', "[]", "25: routes[2].providers: name at least one provider"),
        ("agent =", "agnt =", "21: routes[1].agnt: NO KEY 'agent'?"),
        ('"/work"', '"work"', "7: worker.workdir: an absolute path without '..' is wanted"),
        ('"/work"', '"/work/../etc"', "7: worker.workdir: an absolute path without '..' is wanted"),
        ('"https:', '"htps:', "4: worker.base_url: a URL that begins with https:// is wanted"),
        ("= 3", "= 0", "5: worker.max_sessions: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_mistake_is_told_with_its_line_and_what_would_be_right(old: str, new: str, expected: str) -> None:
    expected = expected.replace("NO KEY", "there is no such key; did you mean")
    expected = expected.replace("NO TYPE", "there is no provider type")
    assert WHOLE.count(old) == 1
    assert problems(WHOLE.replace(old, new)) == [f"f.toml:{expected}"]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    text = WHOLE.replace("max_idle", "maxidle").replace("image", "imagee").replace('["small"]', '["other"]')
    told = problems(text)
    assert [line.split(":")[1] for line in told if "missing" not in line] == ["6", "11", "25"]


@pytest.mark.parametrize("secret", ['"sk-ant-oat01-x"', "5", '{ env = "A", value = "sk-ant-oat01-x" }'])
def test_secret_in_the_file_is_refused_and_not_shown(secret: str) -> None:
    told = problems(WHOLE.replace('{ env = "THE_KEY" }', secret))
    assert all(line.startswith("f.toml:3: worker.environment_key") for line in told)
    assert "sk-ant" not in "".join(told)


def test_secret_in_the_file_is_told_where_to_go() -> None:
    assert problems(WHOLE.replace('{ env = "THE_KEY" }', '"sk-ant-oat01-x"')) == [
        "f.toml:3: worker.environment_key: a secret never stands in the file: put it into an environment variable and "
        'write { env = "NAME" }'
    ]


def test_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable THE_KEY is not set"):
        parse_config(WHOLE).worker.environment_key.read()


@pytest.mark.parametrize("text", ["", "[worker]\n", "[providers]\n"])
def test_file_without_providers_is_told_how_to_add_one(text: str) -> None:
    (told,) = problems(text)
    assert "there is no provider: add a table such as [providers.main]" in told


def test_text_that_is_not_toml_is_told_with_its_line() -> None:
    (told,) = problems("[worker]\nmax_sessions = = 3\n")
    assert told.startswith("f.toml is not valid TOML")
    assert "line 2" in told


@pytest.mark.parametrize(
    "text", ["providers = 3", "providers = [1]", "routes = 3", "[providers]\na = 3", "worker = []"]
)
def test_wrong_shapes_are_told_and_nothing_breaks(text: str) -> None:
    assert problems(text)


def test_file_is_the_argument_else_the_variable_else_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sessions in (("argument", 1), ("variable", 2), ("mabridge", 3)):
        text = f'[worker]\nmax_sessions = {sessions}\n[providers.here]\ntype = "local"\n'
        (tmp_path / f"{name}.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MABRIDGE_CONFIG", raising=False)
    assert load_config().worker.max_sessions == 3
    monkeypatch.setenv("MABRIDGE_CONFIG", "variable.toml")
    assert load_config().worker.max_sessions == 2
    assert load_config("argument.toml").worker.max_sessions == 1
    with pytest.raises(ConfigError, match=r"no configuration file absent\.toml"):
        load_config("absent.toml")


def test_library_users_get_the_same_without_a_file() -> None:
    config = Config(providers={"small": ProviderConfig(type="docker", options={"image": "x"})})
    assert config.routes == (Route(providers=("small",)),)


key = st.text(alphabet="abc-_ .", min_size=1, max_size=4)


@given(st.lists(st.tuples(key, st.integers()), min_size=1, max_size=6, unique_by=lambda pair: pair[0]), st.data())
def test_line_of_finds_every_key(pairs, data) -> None:
    text = "# head\n[a.b]\n" + "".join(f'"{name}" = {value}\n' for name, value in pairs)
    index = data.draw(st.integers(0, len(pairs) - 1))
    assert line_of(text, ("a", "b", pairs[index][0])) == 3 + index


@given(st.text(alphabet="ab[]=\". \n#'", max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)
