"""What may not be said: rules, policies, guards. Text in, findings out; no HTTP, no JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantd.daemon.config import Settings
    from quantd.daemon.safety.policy import Policies


def read_policies(settings: Settings) -> Policies | None:
    """Compiled; None: there are none. Raises ConfigError."""
    safety = settings.safety
    if not (safety.rules or safety.guards or safety.policies):
        return None
    from quantd.daemon.safety.policy import compile_policies  # most daemons have none

    return compile_policies(settings)
