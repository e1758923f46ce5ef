"""What a run that goes on takes from its checkpoint: settings, backbone, and files that must still be there."""

import os
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from training import checkpoints
from training.checkpoints import FREE_ON_RESUME, STATE_JSON
from training.config import TrainSettings
from training.problems.data import is_named
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError

MOVABLE = ("dataset", "validation", "backbone")  # settings that may name a file or directory


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Data and backbone named so that a resumed run finds them from any directory."""
    given = {name: getattr(settings, name) for name in MOVABLE}
    named = {name for name, value in given.items() if name != "backbone" and value and is_named(value)}
    absolute = {
        name: os.path.realpath(value)
        for name, value in given.items()
        if value and name not in named and os.path.exists(value)
    }
    return settings.model_copy(update=absolute)


def resumed_settings(settings: TrainSettings, resume: Path) -> TrainSettings:
    """The settings of the checkpoint that `--resume` means, and the few that may differ now.

    The run goes on in the checkpoint's own run directory unless another is asked for.
    Raises ConfigError for a setting given now that contradicts the run.
    """
    checkpoint_dir = checkpoints.find(resume)
    defaults = TrainSettings.model_construct().model_dump(mode="json", exclude={"config", "resume"})
    stored = defaults | checkpoints.read_state(checkpoint_dir)["settings"]  # an older program knew fewer settings
    now = settings.model_dump(mode="json", exclude={"config", "resume"})
    given = {name: value for name, value in now.items() if name in settings.model_fields_set}
    free = FREE_ON_RESUME if stored["validation"] else FREE_ON_RESUME - {"validation"}  # no file, so none has moved
    for name, value in given.items():
        if name not in free and stored.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value}: the run to resume has {stored.get(name)}; leave {flag} out, or start a new run"
            )
    merged = {"output_dir": str(checkpoint_dir.resolve().parent)}
    merged = stored | merged | {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    try:
        return TrainSettings(**merged, resume=checkpoint_dir)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint_dir / STATE_JSON}: settings that this program does not know: {error}"
        ) from error


def resumed_backbone(
    settings: TrainSettings, checkpoint_dir: Path, given: Collection[str], source: str, revision: str | None
) -> tuple[str, str | None]:
    """Directory or hub id, and revision, of what the run has used all along: a copy, or one commit of the hub.

    `source` and `revision` are what a new run would use; `given` names the settings that this start was given.
    Raises ConfigError for a file of the run that is gone.
    """
    copied = (checkpoint_dir / checkpoint.BACKBONE_DIR).is_dir()
    if copied and "backbone" not in given:
        source, revision = str(checkpoint_dir), None
    elif not copied:
        revision = checkpoint.read_config(checkpoint_dir).backbone_revision
    for name in MOVABLE:
        value = getattr(settings, name)
        wanted = value and Path(value).is_absolute() and not (copied and name == "backbone")
        if wanted and not Path(value).exists():
            raise ConfigError(
                f"--{name} {value}: the run to resume was started with it, and it is gone; "
                f"say with --{name} where it is now"
            )
    return source, revision
