"""Where settings come from, and that mistakes end the command with status 2."""

import re
from pathlib import Path

import pytest

from server.settings import ELSEWHERE, ServeSettings
from trm.engine.engine import EngineConfig
from trm.errors import ConfigError
from trm.settings import flag_of


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"TRM_{name.upper()}", raising=False)


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flag_beats_environment_beats_file_beats_default(monkeypatch, yaml):
    file = yaml("port: 1\nmax_rows: 1\nhost: file\n")
    monkeypatch.setenv("TRM_PORT", "2")
    monkeypatch.setenv("TRM_MAX_ROWS", "2")

    settings = ServeSettings.from_command_line(["--config", file, "--port", "3"])

    assert (settings.port, settings.max_rows, settings.host, settings.max_queue) == (3, 2, "file", 256)


def test_defaults_serve_the_bundled_model_to_this_machine_only():
    settings = ServeSettings.from_command_line([])

    assert (settings.model, settings.model_id, settings.host, settings.port) == (None, "qwen-trm", "127.0.0.1", 8000)
    assert settings.api_key == []


def test_defaults_of_the_engines_sizes_are_the_engines_own():
    settings, sizes = ServeSettings.from_command_line([]), EngineConfig()

    for name in ("max_rows", "max_model_len", "max_queue", "kv_cache_bytes", "prefill_chunk", "max_draft_tokens"):
        assert getattr(settings, name) == getattr(sizes, name)
    assert (settings.row_buckets, sizes.row_buckets) == ([], None)


@pytest.mark.parametrize("value", ["1,x", "0", "1,,2"])
def test_row_buckets_are_numbers_of_rows(monkeypatch, value):
    monkeypatch.setenv("TRM_ROW_BUCKETS", "1, 8,32")
    assert ServeSettings.from_command_line([]).row_buckets == [1, 8, 32]
    assert ServeSettings.from_command_line(["--row-buckets", "4", "2"]).row_buckets == [4, 2]

    with pytest.raises(ConfigError, match="--row-buckets"):
        ServeSettings.from_command_line(["--row-buckets", value])


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "qwen-trm"),
        (["--model", "runs/1/checkpoint-5"], "runs/1/checkpoint-5"),
        (["--model", "runs/1", "--served-model-name", "mine"], "mine"),
    ],
)
def test_the_model_id_is_the_given_name_else_the_path_else_the_bundled_models(argv, name):
    assert ServeSettings.from_command_line(argv).model_id == name


def test_several_keys_on_the_command_line():
    settings = ServeSettings.from_command_line(["--api-key", "a", "b", "--port", "1"])

    assert (settings.api_key, settings.port) == (["a", "b"], 1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key"],
        ["--api-key", ""],
        ["--api-key="],
        ["--api-key", "--port", "1"],
        ["--api-key", "a", ""],
        ["--api-key", "a", "--api-key", "b"],
        ["--api_key"],
        ["--api-key", "a", "--api_key", "b"],
    ],
    ids=str,
)
def test_a_key_that_the_shell_left_empty_or_that_would_be_lost_is_refused(argv):
    with pytest.raises(ConfigError, match="--api-key"):
        ServeSettings.from_command_line(argv)


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        (["a=/x,y"], {"a": "/x,y"}),
        (["a=/x,", "b=y,z"], {"a": "/x,", "b": "y,z"}),
        (["a=/x, y ,b=/z"], {"a": "/x, y", "b": "/z"}),
    ],
    ids=str,
)
def test_commas_in_the_directory_of_a_decoder(monkeypatch, given, sources):
    flags = [word for one in given for word in ("--decoder", one)]
    assert ServeSettings.from_command_line(flags).decoder_sources() == sources

    monkeypatch.setenv("TRM_DECODER", ",".join(given))
    assert ServeSettings.from_command_line([]).decoder_sources() == sources


@pytest.mark.parametrize(("value", "keys"), [("a", ["a"]), ("a,b", ["a", "b"]), ("sk-1, sk-2", ["sk-1", "sk-2"])])
def test_keys_from_the_environment_are_plain_text(monkeypatch, value, keys):
    monkeypatch.setenv("TRM_API_KEY", value)

    assert ServeSettings.from_command_line([]).api_key == keys


@pytest.mark.parametrize("text", ["api_key: [a, b]", "api_key: a,b"])
def test_keys_from_the_file(yaml, text):
    assert ServeSettings.from_command_line(["--config", yaml(text)]).api_key == ["a", "b"]


def test_keys_of_a_file_are_added(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may\n\n  sk-1  \nsk-2#not a comment\r\n")

    settings = ServeSettings.from_command_line(["--api-key", "a", "--api-key-file", str(file)])

    assert settings.keys() == ["a", "sk-1", "sk-2#not a comment"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"# nobody\n\n", "holds no key"), (b"\xff\xfe", "not a text file")],
    ids=["missing", "empty", "binary"],
)
def test_a_file_without_keys_does_not_open_the_server(tmp_path, content, message):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=f"--api-key-file .*keys: {message}"):
        ServeSettings.from_command_line(["--api-key-file", str(file)])


@pytest.mark.parametrize("name", ["public_paths", "cors_origins"])
def test_other_lists_come_from_flags_and_environment_too(monkeypatch, name):
    values = {"public_paths": ["/metrics", "/", "/playground/*"], "cors_origins": ["https://a.org:8080", "null://x"]}[
        name
    ]
    flag = f"--{name.replace('_', '-')}"

    assert getattr(ServeSettings.from_command_line([flag, *values]), name) == values
    with pytest.raises(ConfigError, match=f"{flag}: is given twice"):
        ServeSettings.from_command_line([flag, values[0], flag, values[1]])
    with pytest.raises(ConfigError, match=f"{flag} has no value"):
        ServeSettings.from_command_line([flag])
    monkeypatch.setenv(f"TRM_{name.upper()}", ", ".join(values))
    assert getattr(ServeSettings.from_command_line([]), name) == values


def test_every_setting_has_its_place_in_the_help():
    placed = [name for names in ServeSettings.groups.values() for name in names]

    assert sorted([*placed, "config"]) == sorted(ServeSettings.model_fields)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "70000"], "--port '70000': .*65535"),
        (["--max-rows", "0"], "--max-rows '0'"),
        (["--max-draft-tokens", "-1"], "--max-draft-tokens '-1'"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--drain-seconds", "-1"], "--drain-seconds '-1'"),
        (["--body-timeout-seconds", "0"], "--body-timeout-seconds '0'"),
        (["--public-paths", "metrics"], "--public-paths 'metrics': .*such as /metrics"),
        (["--public-paths", "/*/x"], r"--public-paths '/\*/x'"),
        (["--cors-origins", "example.org"], "--cors-origins 'example.org': .*such as https://example.org"),
        (["--root-path", "trm"], "--root-path 'trm': .*such as /trm"),
        (["--cors-origins", "https://example.org/"], "--cors-origins 'https://example.org/'"),
        (["--log-format", "xml"], "--log-format 'xml'"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        ServeSettings.from_command_line(argv)


def test_an_unknown_key_in_the_file_is_named(yaml):
    with pytest.raises(ConfigError, match="unknown setting 'max_rowz'"):
        ServeSettings.from_command_line(["--config", yaml("max_rowz: 3")])


def test_an_unknown_flag_is_refused():
    with pytest.raises(ConfigError, match=r"^--max-rowz: no such flag; did you mean --max-rows\?$"):
        ServeSettings.from_command_line(["--max-rowz", "3"])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_flag_of_another_server_is_told_what_takes_its_place(name):
    """The likeliest name may do harm: --ssl-keyfile is near --api-key-file, which would take a key's lines for keys."""
    with pytest.raises(ConfigError, match=f"^{flag_of(name)}: no such flag; {re.escape(ELSEWHERE[name])}$"):
        ServeSettings.from_command_line([flag_of(name), "4"])


def test_what_takes_the_place_of_other_flags_exists():
    assert not ELSEWHERE.keys() & ServeSettings.model_fields.keys()
    named = re.findall(r"--[a-z-]+", " ".join(ELSEWHERE.values()))
    assert set(named) <= {flag_of(name) for name in ServeSettings.model_fields}
    assert all(Path(page).is_file() for page in re.findall(r"docs/\w+\.md", " ".join(ELSEWHERE.values())))


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        ServeSettings.from_command_line(["--help"])

    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in ServeSettings.model_fields)


@pytest.mark.parametrize("keys", ["{sesame: 1}", "[sesame, {sesame: 1}]", '[sesame, ""]', "sesame: [x", "[sesame"])
def test_a_key_that_cannot_be_used_is_not_printed(yaml, keys):
    with pytest.raises(ConfigError) as error:
        ServeSettings.from_command_line(["--config", yaml(f"api_key: {keys}\n")])

    assert "sesame" not in str(error.value)


def test_settings_can_be_printed_without_their_keys():
    assert "sesame" not in repr(ServeSettings.from_command_line(["--api-key", "sesame"]))
