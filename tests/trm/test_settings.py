"""Settings: flag beats environment beats file beats default, and every mistake is one line that names it."""

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field
from pydantic_settings import CliVariadicArg, NoDecode

from trm.errors import CheckpointError, ConfigError
from trm.settings import Settings, run_command


class Example(Settings):
    """Settings of an example command."""

    command: ClassVar[str] = "trm-example"

    max_rows: int = Field(32, ge=1, description="rows decoded together")
    name: str | None = Field(None, description="a name")
    device: Literal["auto", "cpu"] = Field("auto", description="where to run")
    quiet: bool = Field(False, description="say less")
    paths: Annotated[CliVariadicArg[list[str]], NoDecode] = Field([], description="where to look")


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "MAX_ROWS", "NAME", "DEVICE", "QUIET", "PATHS"):
        monkeypatch.delenv(f"TRM_{name}", raising=False)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(content: str) -> Path:
        (tmp_path / "settings.yaml").write_text(content)
        return tmp_path / "settings.yaml"

    return write


def read(*argv: str) -> Example:
    return Example.from_command_line(argv)


# Precedence


def test_defaults():
    settings = read()

    assert (settings.max_rows, settings.name, settings.device, settings.quiet) == (32, None, "auto", False)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (("flag", "environment", "file"), 1),
        (("flag", "file"), 1),
        (("environment", "file"), 2),
        (("flag", "environment"), 1),
        (("file",), 3),
        ((), 32),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_flag_beats_environment_beats_file_beats_default(sources, expected, yaml_file, monkeypatch):
    argv: Sequence[str] = ["--name", "other"]
    if "flag" in sources:
        argv = [*argv, "--max-rows", "1"]
    if "environment" in sources:
        monkeypatch.setenv("TRM_MAX_ROWS", "2")
    if "file" in sources:
        argv = [*argv, "--config", str(yaml_file("max_rows: 3\nname: from the file"))]

    settings = read(*argv)

    assert settings.max_rows == expected
    assert settings.name == "other"


def test_sources_add_up(yaml_file, monkeypatch):
    monkeypatch.setenv("TRM_DEVICE", "cpu")

    settings = read("--quiet", "--config", str(yaml_file("max_rows: 3")))

    assert (settings.max_rows, settings.device, settings.quiet) == (3, "cpu", True)


def test_file_may_be_named_by_the_environment(yaml_file, monkeypatch):
    monkeypatch.setenv("TRM_CONFIG", str(yaml_file("max_rows: 3")))

    assert read().max_rows == 3


def test_file_of_the_flag_beats_file_of_the_environment(yaml_file, tmp_path, monkeypatch):
    (tmp_path / "other.yaml").write_text("max_rows: 4\nname: other")
    monkeypatch.setenv("TRM_CONFIG", str(tmp_path / "other.yaml"))

    settings = read("--config", str(yaml_file("max_rows: 3")))

    assert (settings.max_rows, settings.name) == (3, None)


def test_empty_variable_is_no_setting(monkeypatch):
    """Compose files and units pass variables on that nobody has set."""
    monkeypatch.setenv("TRM_MAX_ROWS", "")

    assert read().max_rows == 32


def test_empty_file_sets_nothing(yaml_file):
    assert read("--config", str(yaml_file("# nothing here\n"))).max_rows == 32


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        read().max_rows = 5  # type: ignore[misc]


# Mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_row: 3", "unknown setting 'max_row'"),
        ("max-rows: 3", "unknown setting 'max-rows'"),
        ("max_rows: 0", "--max-rows 0: .*greater than or equal to 1"),
        ("max_rows: many", "--max-rows 'many'"),
        ("device: tpu", "--device 'tpu': .*auto.*cpu"),
    ],
)
def test_mistakes_in_the_file_are_one_line(content, message, yaml_file):
    with pytest.raises(ConfigError, match=message) as caught:
        read("--config", str(yaml_file(content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["max_rows: [", "- max_rows\n- 3", "just words", "\t", "max_rows: !!python/object/apply:os.getcwd []"],
    ids=["unclosed", "list", "words", "tab", "python-object"],
)
def test_file_that_is_no_mapping_is_named(content, yaml_file):
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        read("--config", str(yaml_file(content)))


def test_file_that_is_not_text_is_named(yaml_file):
    path = yaml_file("")
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        read("--config", str(path))


def test_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: no such file"):
        read("--config", str(tmp_path / "none.yaml"))


def test_file_of_the_environment_that_is_missing_is_named(tmp_path, monkeypatch):
    """Silence would start the server with defaults."""
    monkeypatch.setenv("TRM_CONFIG", str(tmp_path / "none.yaml"))

    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-rows", "0"], "--max-rows .*0.*: .*greater than or equal to 1"),
        (["--max-rows", "many"], "--max-rows 'many'"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--max-rows", "0", "--device", "tpu"], "--max-rows.*; --device"),
    ],
    ids=" ".join,
)
def test_values_out_of_range_name_flag_value_and_limit(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


def test_variable_out_of_range_names_the_setting(monkeypatch):
    monkeypatch.setenv("TRM_MAX_ROWS", "-1")

    with pytest.raises(ConfigError, match="--max-rows '-1'"):
        read()


@pytest.mark.parametrize("argv", [["--max_rows", "3"], ["--max_rows=3"], ["--max-rows=3"]], ids=" ".join)
def test_a_flag_may_be_written_with_underscores(argv):
    assert read(*argv, "--name", "a_b") == Example(max_rows=3, name="a_b")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-row", "3"], r"--max-row: no such flag; did you mean --max-rows\?"),
        (["--nonsense"], "--nonsense: no such flag"),
        (["--nonsense=secret"], "--nonsense: no such flag"),
        (["--name", "a", "word"], "word: belongs to no flag"),
        (["--max-rows"], "argument --max-rows: expected one argument"),
        (["--max-rows", ""], "--max-rows '': is empty; leave it out for the default"),
        (["--name="], "--name '': is empty; leave it out for the default"),
        (["--quiet", "--paths", "a", ""], "--paths '': is empty; leave it out for the default"),
        ([""], "'': is empty; leave it out for the default"),
        (["--paths", "a", "--paths=b"], "argument --paths: is given twice; give it once, followed by all its values"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_one_line_that_names_it(argv, message):
    """A prefix of a flag is unknown too: it would change its meaning when a new flag is added."""
    with pytest.raises(ConfigError, match=f"^{message}$"):
        read(*argv)


def test_a_value_may_end_like_a_flag():
    assert read("--name=--max-rows=").name == "--max-rows="


def test_a_model_without_its_flag_is_told_of_it():
    class Serving(Example):
        model: str | None = Field(None, description="what to serve")

    with pytest.raises(ConfigError, match=r"^mine: belongs to no flag; a model is --model mine$"):
        Serving.from_command_line(["mine"])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")

    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "trm-example" in out
    for text in ("--max-rows", "rows decoded together", "--config", "--device", "--quiet", "--paths [str ...]"):
        assert text in out
    assert "(default: 32)" in out
    for noise in ("default: None", "default: []", "list["):
        assert noise not in out


def test_every_command_says_its_version(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--version")

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"trm-example {metadata.version('qwen-trm')}\n"


# Commands


def test_configuration_error_is_one_line_and_status_2(capsys):
    def main() -> None:
        raise ConfigError("--max-rows 0: too few")

    with pytest.raises(SystemExit) as caught:
        run_command(main, "trm-example")

    assert caught.value.code == 2
    assert capsys.readouterr().err == "trm-example: --max-rows 0: too few (see trm-example --help)\n"


def test_other_errors_of_ours_are_one_line_and_a_failure(capsys):
    def main() -> None:
        raise CheckpointError("model: no such directory")

    with pytest.raises(SystemExit) as caught:
        run_command(main, "trm-example")

    code = caught.value.code
    printed = capsys.readouterr().err if isinstance(code, int) else code  # sys.exit prints a text, with status 1
    assert code
    assert printed.strip().splitlines() == ["trm-example: model: no such directory"]


def test_a_name_that_no_file_can_have_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: print(Path("a" * 5000).is_dir()), "trm-example")

    assert caught.value.code == 2
    assert capsys.readouterr().err == f"trm-example: no file can be called {'a' * 100}…: the name is too long\n"


def test_a_full_disk_is_one_line_and_status_1(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def main() -> None:
        with open("/dev/full", "w") as file:
            file.write("a line")

    with pytest.raises(SystemExit) as caught:
        run_command(main, "trm-example")

    assert caught.value.code == 1
    assert capsys.readouterr().err == "trm-example: a file cannot be written: No space left on device; make room\n"


def test_bugs_keep_their_traceback():
    def main() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_command(main, "trm-example")


def test_interrupt_is_quiet():
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_command(main, "trm-example")

    assert caught.value.code == 130
