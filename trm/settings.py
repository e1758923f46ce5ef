"""How every command reads its settings: flag beats environment beats file beats default.

A command declares one frozen subclass of `Settings`; field names become `--kebab-case`
flags and `TRM_UPPER_CASE` variables, and `--config FILE.yaml` (or `TRM_CONFIG`) names a
file with the same keys. An unknown flag or key, or a value out of range, ends the
command with one line and status 2.
"""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from trm import __version__
from trm.errors import ConfigError, TRMError

ENV_PREFIX = "TRM_"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FLAG = re.compile(r"^--[^=]+")


def flag_of(name: str) -> str:
    """What a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The words of a command line, by default this process's own, with their flags written as `flag_of` does."""
    words = sys.argv[1:] if argv is None else argv
    return [_FLAG.sub(lambda flag: flag[0].replace("_", "-"), word) for word in words]


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, beside `--help`."""
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")


class Settings(BaseSettings):
    """Base of the commands' settings. Subclasses name their command in `command`.

    `groups` puts fields under headings of `--help`; those that it does not name stand under "options".
    `elsewhere` says what takes the place of settings that similar commands of other projects have.
    The value of a field with `repr=False` is a secret: no message holds it.
    """

    command: ClassVar[str]
    groups: ClassVar[Mapping[str, Sequence[str]]] = {}
    elsewhere: ClassVar[Mapping[str, str]] = {}

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    config: Path | None = Field(None, description="YAML file with settings; its keys are these names with underscores")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values given in code, the environment, the file that either of them names."""
        named = init_settings().get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        if named is not None and not Path(named).is_file():
            raise ConfigError(f"--config {named}: no such file")
        try:
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=named)
        except (yaml.YAMLError, SettingsError, OSError, AttributeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--config {named}: not a YAML file with one setting a line: {reason}") from None

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """Read flags, environment and file. Flags may be written with underscores, as transformers takes its own.

        Raises ConfigError in one line; `--help` exits.
        """
        words = command_line(argv)
        _require_values(words)
        try:
            flags: CliSettingsSource[Any] = CliSettingsSource(
                cls,
                cli_prog_name=cls.command,
                cli_parse_args=words,
                cli_kebab_case=True,
                cli_implicit_flags=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_exit_on_error=False,
                add_argument_method=_Help(cls.groups),
            )
        except SettingsError as error:
            raise ConfigError(_misread(cls, str(error).removeprefix("error parsing CLI: "))) from None
        return cls.create(flags())

    @classmethod
    def create(cls, given: Mapping[str, Any]) -> Self:
        """Settings from values, environment and file. Raises ConfigError in one line."""
        try:
            return cls(**given)
        except SettingsError as error:
            raise ConfigError(str(error)) from None
        except ValidationError as error:
            raise ConfigError("; ".join(_describe(cls, problem) for problem in error.errors())) from None


class _Help:
    """Adds each argument to the heading that its field belongs to. An empty default goes without saying."""

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self.groups = groups
        self.heading = {name: heading for heading, names in groups.items() for name in names}
        self.sections: dict[str, Any] = {}

    def __call__(self, parser: Any, *flags: str, **details: Any) -> Any:
        self.sections = self.sections or {heading: parser.add_argument_group(heading) for heading in self.groups}
        section = self.sections.get(self.heading.get(details.get("dest", ""), ""), parser)
        for empty in ("None", "[]", ""):
            details["help"] = details["help"].removesuffix(f" (default: {empty})")
        if "metavar" in details:
            details["metavar"] = details["metavar"].removeprefix("list[").removesuffix("]")
        if details.get("nargs") == "*":
            details["action"] = _Once
        argument = argparse.ArgumentParser.add_argument(section, *flags, **details)
        if "--help" in flags:
            add_version(parser)
        return argument


class _Once(argparse.Action):
    """A flag that takes several values at once. Given twice it is refused: argparse would forget the first ones."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "is given twice; give it once, followed by all its values")
        setattr(namespace, self.dest, values)


def _require_values(words: Sequence[str]) -> None:
    """Raises ConfigError where a value is empty, as that of a shell variable is that was never set."""
    flag = ""
    for word in words:
        if found := _FLAG.match(word):
            flag = found[0]
        if word in ("", f"{flag}="):
            raise ConfigError(f"{flag} '': is empty; leave it out for the default".lstrip())


def _misread(cls: type[Settings], problem: str) -> str:
    """What argparse cannot read, in words, with the flag that may have been meant."""
    if not problem.startswith("unrecognized"):
        return problem
    word = problem.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]  # a value may be a secret
    if not word.startswith("-"):
        return f"{word}: belongs to no flag" + (f"; a model is --model {word}" if "model" in cls.model_fields else "")
    wanted = word.strip("-").replace("-", "_")
    if wanted in cls.elsewhere:
        return f"{word}: no such flag; {cls.elsewhere[wanted]}"
    near = difflib.get_close_matches(wanted, cls.model_fields, n=1)
    return f"{word}: no such flag" + (f"; did you mean {flag_of(near[0])}?" if near else "")


def _describe(cls: type[Settings], problem: Any) -> str:
    """One validation problem in words: which setting, what it was unless that is a secret, what is allowed."""
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name!r}"
    field = cls.model_fields.get(name)
    flag = flag_of(name) if field else name
    value = f" {problem['input']!r}" if field is None or field.repr else ""
    if field and problem["type"] == "string_pattern_mismatch":  # says more than the pattern
        return f"{flag}{value}: has the wrong form; it takes: {field.description}"
    return f"{flag}{value}: {problem['msg']}"


def run_command(main: Callable[[], None], command: str) -> None:
    """Run a command's body: a TRMError becomes one line on standard error, and status 1, or 2 for a wrong setting.

    A setting that names a file by a name that no file can have is a wrong one, whoever looks for that file. A full disk
    is no bug, either, whoever meets it.
    """
    try:
        main()
    except ConfigError as error:
        sys.stderr.write(f"{command}: {error} (see {command} --help)\n")
        sys.exit(2)
    except TRMError as error:
        sys.stderr.write(f"{command}: {error}\n")
        sys.exit(1)
    except OSError as error:
        if error.errno in DISK_FULL:
            sys.stderr.write(
                f"{command}: {error.filename or 'a file'} cannot be written: {error.strerror}; make room\n"
            )
            sys.exit(1)
        if error.errno != errno.ENAMETOOLONG:
            raise
        sys.stderr.write(f"{command}: no file can be called {str(error.filename)[:100]}…: the name is too long\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
