"""Typed, validated settings. This room is the only reader of `os.environ`.

`load` gives `Settings`, or raises `ConfigError` naming file, line, key, value and what is allowed.
"""

from quantd.daemon.config.changes import Changes, diff, in_force
from quantd.daemon.config.environment import Environment
from quantd.daemon.config.load import load
from quantd.daemon.config.models import choose_models
from quantd.daemon.config.safety import (
    GuardSettings,
    PolicySettings,
    RuleSettings,
    SafetySettings,
)
from quantd.daemon.config.settings import (
    LogSettings,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
)

__all__ = [
    "Changes",
    "Environment",
    "GuardSettings",
    "LogSettings",
    "ModelSettings",
    "PolicySettings",
    "RuleSettings",
    "SafetySettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "WebhookSettings",
    "choose_models",
    "diff",
    "in_force",
    "load",
]
