"""Whether a controller's saved state belongs to this version and configuration."""

from __future__ import annotations

from typing import Any

from autotune.errors import StateError


def stamp(version: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a saved state says of its origin."""
    return {"version": version, "settings": settings}


def check_origin(controller: str, version: int, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """Compares a saved state's :func:`stamp` with the present.

    Raises:
        StateError: Naming the version, or each setting that differs, and what to do.
    """
    if saved.get("version") != version:
        raise StateError(
            f"the checkpoint holds {controller} state of version {saved.get('version')!r}, this is version {version}: "
            "resume with the version of lightning-autotune that wrote it, or start a new fit"
        )
    theirs = saved["settings"]
    different = [name for name in settings if settings[name] != theirs.get(name)]
    if different:
        said = ", ".join(f"{name}={settings[name]!r} (the checkpoint has {theirs.get(name)!r})" for name in different)
        raise StateError(
            f"{controller} was resumed with other settings: {said}; use the checkpoint's, or start a new fit"
        )
