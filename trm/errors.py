"""The errors that users meet. Only the HTTP layer knows status codes."""


class TRMError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(TRMError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(TRMError):
    """A model directory that is missing, truncated, foreign or inconsistent."""


class BadRequest(TRMError):
    """A request that can never be served. `param` names the field, `code` the kind if it has one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(BadRequest):
    """A model that nobody has, or has any more."""

    def __init__(self, message: str, param: str = "model") -> None:
        super().__init__(message, param, "model_not_found")


class Overloaded(TRMError):
    """No room in the queue now; the same request may be sent again, best after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeviceError(TRMError):
    """The device failed in a call of the model or has no memory left, or the model gave numbers that are not finite."""


class InternalError(TRMError):
    """A bug of ours met a request: an exception that nobody expected. The log has its traceback."""
