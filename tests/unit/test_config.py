"""The loader: every key, every error with its place, and which source wins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from quantd.daemon.config import Environment, ModelSettings, Settings, load
from quantd.daemon.config.load import SAFETY, SECTIONS, key_lines, meanings, rules
from quantd.daemon.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "config.toml"
NOBODY = Environment(user_id=1000)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def fails(path: Path, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environment=NOBODY, **kwargs)
    return str(caught.value)


def uncommented(text: str) -> str:
    """The reference file with the example model's table switched on."""
    head, table, tail = text.partition('# [models."my-model"]')
    assert table
    return head + re.sub(r"^# ?", "", table + tail, flags=re.M)


def test_the_reference_file_is_the_defaults() -> None:
    reference = load(REFERENCE, environment=NOBODY)
    assert reference == Settings(models={})


def test_the_reference_file_has_every_key_and_no_other() -> None:
    document = tomllib.loads(uncommented(REFERENCE.read_text()))
    for section, struct in SECTIONS.items():
        assert list(document[section]) == list(rules(struct)), section
    model = document["models"]["my-model"]
    assert list(model) == [key for key in rules(ModelSettings) if key != "name"]


def test_the_reference_model_has_the_defaults(write) -> None:
    settings = load(write(uncommented(REFERENCE.read_text())), environment=NOBODY)
    path = Path("/srv/models/my-model")
    assert settings.models == {"my-model": ModelSettings(name="my-model", path=path)}


@pytest.mark.parametrize("kind", SAFETY)
def test_the_reference_safety_tables_have_every_key_with_its_default(kind: str, write) -> None:
    [table] = re.findall(rf"^# \[safety\.{kind}\..*\n(?:# .*\n)*", REFERENCE.read_text(), re.M)
    text = re.sub(r"^# ", "", table, flags=re.M)
    struct = SAFETY[kind]
    written = dict(re.findall(r"^([a-z_]+) = .*?  +# (.*)$", text, flags=re.M))
    assert written == {name: text for name, text in meanings(struct).items() if name != "name"}
    [[name, made]] = getattr(load(write(text), environment=NOBODY).safety, kind).items()
    needed = {"model": "my-model"} if kind == "guards" else {}
    assert made == struct(name=name, **needed)


def test_the_reference_file_says_what_the_flags_help_says() -> None:
    document = uncommented(REFERENCE.read_text())
    written = dict(re.findall(r"^([a-z_]+) = .*?  ?# (.*)$", document, flags=re.M))
    known: dict[str, str] = {}
    for struct in (*SECTIONS.values(), ModelSettings):
        known.update(meanings(struct))
    del known["name"]
    assert written == known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n[server]\nprt = 1", ":3: unknown key server.prt; did you mean 'port'?"),
        ("[sevrer]\nport = 1", ":1: unknown key sevrer; did you mean 'server'?"),
        ("[log]\ncolour = 1", ":2: unknown key log.colour; known here: level, format"),
        ("[safety]\nrule = 1", ":2: unknown key safety.rule; did you mean 'rules'?"),
        ("[safety]\nrules = 1", ":2: safety.rules must be tables: [safety.rules.NAME]"),
        ("[safety.guards.g]", ":1: safety.guards.g: `model` is missing"),
        ('[safety.rules."a b"]', ':1: safety.rules.a b = "a b": must be a category'),
        ('[safety.rules.a]\npii = ["mail"]', ":2: safety.rules.a.pii = ['mail']: must be a list"),
        (
            '[safety.policies.p]\ninput = { a = "drop" }',
            ":2: safety.policies.p.input = {'a': 'drop'}: must be a table like",
        ),
        ("server.port = 70000", ":1: server.port = 70000: must be an integer from 0 to 65535"),
        ('[server]\nport = "80"', ':2: server.port = "80": must be an integer'),
        ("[server]\nport = true", ":2: server.port = true: must be an integer"),
        ("server = { port = 1.5 }", ":1: server.port = 1.5: must be an integer"),
        ("server = 3", ":1: server = 3: must be a table of keys"),
        ("[server]\ndrain_seconds = inf", "server.drain_seconds = inf: must be seconds from 0"),
        ("[server]\ndrain_seconds = nan", "server.drain_seconds = nan: must be seconds from 0"),
        ('[server]\nallowed_hosts = "a"', 'server.allowed_hosts = "a": must be a list'),
        ('[server]\nallowed_hosts = ["a", "a"]', "must be a list without repeats"),
        ("[server]\nallowed_hosts = [1]", "server.allowed_hosts = [1]: must be a list"),
        ('[server]\nallowed_origins = ["localhost"]', 'each "*" or "scheme://host[:port]"'),
        ("[server]\nsocket_mode = 0o1777", "must be permission bits from 0o000 to 0o777"),
        ("[server]\nsocket = 1", 'server.socket = 1: must be a path, "auto", or "" for none'),
        ('[server]\nbody_limit_bytes = "2GB"', 'server.body_limit_bytes = "2GB": must be bytes'),
        ('[server]\nbody_limit_bytes = "1.0000001MiB"', "must be bytes"),
        ("[server]\nbody_limit_bytes = 10", "must be bytes, at least 1024"),
        ('[scheduler]\npolicy = "lifo"', 'must be one of "fcfs", "priority", "sjf"'),
        ("[scheduler]\ncaller_weights = 2", ":2: scheduler.caller_weights = 2: must be a table of"),
        (
            "[scheduler]\ncaller_weights = { a = 0 }",
            "numbers above 0 and at most 1e6",
        ),
        ("[scheduler]\ncaller_weights = { a = true }", "must be a table of names and numbers"),
        ('[scheduler]\ncaller_weights = { a = "2" }', "must be a table of names and numbers"),
        ("[scheduler]\ncaller_weights = { a = inf }", "must be a table of names and numbers"),
        ("[scheduler]\ncaller_weights = { '' = 1 }", "must be a table of names and numbers"),
        ("[scheduler.caller_weights]\na = -1", ":1: scheduler.caller_weights = "),
        ("[scheduler]\nmax_running = 0", "must be an integer from 1 to 4096"),
        ('models = "x"', ":1: models must be tables: [models.NAME]"),
        ("[models.a]\ndtype = 'auto'", ":1: models.a: `path` is missing"),
        ("[models.a]\npath = ''", ':2: models.a.path = "": must be a path'),
        ("[models.a]\npath = 'embedded:nothing'", 'must be a path or "embedded:NAME"'),
        ("[models.a]\npath='x'\nthread = 2", ":3: unknown key models.a.thread; did you mean 'thr"),
        ("[models.'a b']\npath='x'", ':1: models.a b = "a b": must be a name without spaces'),
        ("[models.a]\npath='x'\ndevice='gpu'", 'must be "auto", "cpu", "cuda" or "cuda:N"'),
        ("[models.a]\npath='x'\nkeep_alive=-2", "seconds from 0 to 31536000, or -1 for never"),
        ("[models.a]\npath='x'\nprefix_cache=1", "prefix_cache = 1: must be true or false"),
        ("[models.a]\npath='x'\naliases=['a']", ":3: models.a.aliases: 'a' is already a name"),
        (
            "[models.a]\npath='x'\naliases=['c']\n[models.b]\npath='y'\naliases=['c']",
            ":6: models.b.aliases: 'c' is already a name of the model 'a'",
        ),
        ("[server", "not valid TOML: "),
        ("a = 1\na = 2", "not valid TOML: "),
    ],
)
def test_wrong_values_name_file_line_key_and_what_is_allowed(write, text, message) -> None:
    path = write(text)
    error = fails(path)
    assert error.startswith(str(path))
    assert message in error


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"a = '\xff'")
    assert fails(path) == f"{path}: not UTF-8 at byte 5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ('"4096"', 4096),
        ('"4KiB"', 4096),
        ('"1.5 MiB"', 3 << 19),
        ('"2gib"', 2 << 30),
    ],
)
def test_sizes(write, text: str, value: int) -> None:
    settings = load(write(f"[server]\nbody_limit_bytes = {text}"), environment=NOBODY)
    assert settings.server.body_limit_bytes == value


@pytest.mark.parametrize(
    "text",
    [
        "[scheduler]\ncaller_weights = { alice = 2, bob = 0.5 }",
        "[scheduler.caller_weights]\nalice = 2\nbob = 0.5",
        "scheduler.caller_weights.alice = 2\nscheduler.caller_weights.bob = 0.5",
    ],
)
def test_weights_of_callers(write, text: str) -> None:
    settings = load(write(text), environment=NOBODY)
    assert settings.scheduler.caller_weights == {"alice": 2.0, "bob": 0.5}
    flags = {"scheduler.caller_weights": "carol=3"}
    flagged = load(write(text), flags, environment=NOBODY)
    assert flagged.scheduler.caller_weights == {"carol": 3.0}


def test_model_paths_are_relative_to_the_file(write, tmp_path: Path) -> None:
    settings = load(
        write("[models.a]\npath = 'x/y'\n[models.'org/b']\npath = '/z'"), environment=NOBODY
    )
    assert settings.models["a"].path == tmp_path / "x/y"
    assert settings.models["org/b"].path == Path("/z")
    assert list(settings.models) == ["a", "org/b"]


def test_auto_stands_for_the_programs_choice(write) -> None:
    text = "[models.a]\npath='x'\nkv_bytes='auto'\nmax_context='auto'\nthreads='auto'"
    model = load(write(text), environment=NOBODY).models["a"]
    assert (model.kv_bytes, model.max_context, model.threads) == (None, None, None)


def test_flags_win_over_the_environment_over_the_file(write) -> None:
    path = write("[log]\nlevel = 'error'\n[server]\nport = 1\nhost = '::1'")
    environment = Environment(user_id=1000, log_level="debug")
    settings = load(path, {"server.port": "2"}, environment)
    assert (settings.server.port, settings.server.host) == (2, "::1")
    assert settings.log.level == "debug"
    assert settings.origin["server.port"] == "--port"
    assert settings.origin["server.host"] == f"{path}:5"
    assert settings.origin["log.level"] == "$QUANTD_LOG"
    assert settings.origin["log.format"] == "default"
    assert load(path, {"log.level": "info"}, environment).log.level == "info"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.socket_mode", "600", 0o600),
        ("server.socket_mode", "0o600", 0o600),
        ("server.allowed_hosts", "a, b", ("a", "b")),
        ("server.allowed_hosts", "", ()),
        ("server.drain_seconds", "2.5", 2.5),
        ("server.socket", "", None),
        ("server.body_limit_bytes", "1MiB", 1 << 20),
    ],
)
def test_flags_are_text(write, key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    settings = load(write(""), {key: text}, NOBODY)
    assert getattr(getattr(settings, section), name) == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("server.port", "http", '--port: server.port = "http": must be an integer from 0'),
        ("server.port", "１", "must be an integer"),
        ("server.socket_mode", "999", '--socket-mode: server.socket_mode = "999": must be'),
        ("server.drain_seconds", "soon", '--drain-seconds: server.drain_seconds = "soon": must'),
        ("server.drain_seconds", "nan", "must be seconds from 0 to 3600"),
    ],
)
def test_wrong_flags_name_the_flag(write, key: str, text: str, message: str) -> None:
    assert message in fails(write(""), flags={key: text})


def test_a_wrong_environment_names_the_variable(write) -> None:
    with pytest.raises(ConfigError, match=r'^\$QUANTD_LOG: log.level = "loud": must be one of'):
        load(write(""), environment=Environment(log_level="loud"))


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert fails(missing) == f"--config: {missing} does not exist"
    assert fails(tmp_path) == f"--config: {tmp_path} is a folder, not a file"
    with pytest.raises(ConfigError, match=r"^\$QUANTD_CONFIG: .* does not exist"):
        load(environment=Environment(config=missing))


def test_the_usual_places(tmp_path: Path) -> None:
    assert load(environment=Environment(config_home=tmp_path)).file is None
    (tmp_path / "quantd").mkdir()
    (tmp_path / "quantd/config.toml").write_text("[server]\nport = 5")
    settings = load(environment=Environment(config_home=tmp_path))
    assert settings.server.port == 5
    assert settings.file == tmp_path / "quantd/config.toml"
    assert Environment(config_home=tmp_path).config_files()[0] == Path("/etc/quantd/config.toml")


def test_the_default_socket_is_the_users(write) -> None:
    path = write("[server]\nsocket = 'auto'")

    def socket(environment: Environment) -> Path | None:
        return load(path, environment=environment).server.socket

    assert socket(Environment(user_id=0)) == Path("/run/quantd.sock")
    session = Path("/run/user/1000")
    assert socket(Environment(user_id=1000, session_runtime=session)) == session / "quantd.sock"
    assert socket(NOBODY) is None


def test_api_keys_come_from_the_credential_unless_the_file_says_otherwise(
    write, tmp_path: Path
) -> None:
    environment = Environment(user_id=1000, credentials=tmp_path)
    assert load(write(""), environment=environment).server.api_keys_file is None
    (tmp_path / "api-key").write_text("none")
    assert load(write(""), environment=environment).server.api_keys_file is None
    (tmp_path / "api-key").write_text("secret\n")
    settings = load(write(""), environment=environment)
    assert settings.server.api_keys_file == tmp_path / "api-key"
    assert settings.origin["server.api_keys_file"] == "credential"
    none = load(write("[server]\napi_keys_file = ''"), environment=environment)
    assert none.server.api_keys_file is None


def test_key_lines_see_through_every_spelling() -> None:
    lines = key_lines(
        "# [not.a.table]\n"  # 1
        "top = 1\n"
        "[a]\n"
        'text = """\n'
        "b = 1\n"
        '"""\n'
        "c = [\n"  # 7
        "  1,\n"
        "]\n"
        "d.e = 1\r\n"  # 10
        '[models."x/y"]\n'
        "path = 'a'\n"
        "inline = { f = 1 }\n"
    )
    assert lines == {
        ("top",): 2,
        ("a",): 3,
        ("a", "text"): 4,
        ("a", "c"): 7,
        ("a", "d"): 10,
        ("a", "d", "e"): 10,
        ("models",): 11,
        ("models", "x/y"): 11,
        ("models", "x/y", "path"): 12,
        ("models", "x/y", "inline"): 13,
        ("models", "x/y", "inline", "f"): 13,
    }


def test_a_wrong_value_in_the_file_is_an_error_also_where_a_flag_overrides_it(write) -> None:
    path = write("[server]\nport = 70000\n[log]\nlevel = 7")
    allowed = "must be an integer from 0 to 65535"
    assert f"{path}:2: server.port = 70000: {allowed}" in fails(path, flags={"server.port": "80"})
    environment = Environment(user_id=1000, log_level="debug")
    path = write("[log]\nlevel = 7")
    with pytest.raises(ConfigError, match=r":2: log\.level = 7: must be one of"):
        load(path, environment=environment)


@pytest.mark.parametrize("text", ["int8", "lm_head=dense,*=int4", "*.mlp.*=int8, gptq"])
def test_quantization_may_be_given_by_layer(write, text: str) -> None:
    file = write(f"[models.m]\npath = 'x'\nquantization = '{text}'")
    assert load(file, environment=NOBODY).models["m"].quantization == text


@pytest.mark.parametrize("text", ["", "*=", "a=b=c", "INT8"])
def test_quantization_that_is_no_rule_is_refused(write, text: str) -> None:
    file = write(f"[models.m]\npath = 'x'\nquantization = '{text}'")
    with pytest.raises(ConfigError, match="quantization"):
        load(file, environment=NOBODY)
