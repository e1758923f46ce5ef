"""A request's path as the routes know it."""

from starlette.types import Scope


def path_below(scope: Scope) -> str:
    """Without the prefix under which a proxy shows this server."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if path == prefix:
        return ""
    return path[len(prefix) :] if path.startswith(f"{prefix}/") else path
