"""`quantd serve`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantd.daemon.cli.parser import model_flags, settings_flags
from quantd.daemon.cli.screen import LastLine, bar
from quantd.daemon.config import Environment, Settings, choose_models, load

if TYPE_CHECKING:
    from quantd.daemon.fleet import ModelStatus


def run(arguments: argparse.Namespace) -> int:
    environment = Environment.read()

    def read_settings() -> Settings:
        """Also what a reload does: the same file and flags again."""
        config = Path(arguments.config) if arguments.config else None
        settings = load(config, settings_flags(arguments), environment)
        return choose_models(settings, arguments.models, model_flags(arguments))

    settings = read_settings()
    # Imported when the configuration is known to be right: this takes most of the start.
    from quantd.daemon import service

    if not sys.stderr.isatty():
        return service.run(service.Service(settings, environment, read_settings))
    screen = LastLine(sys.stderr)

    def show(models: list[ModelStatus]) -> None:
        screen.show(progress_line(models))

    return service.run(service.Service(settings, environment, read_settings, screen, show))


def progress_line(models: list[ModelStatus]) -> str:
    """One line on the models that are loading; "" when none is."""
    return "   ".join(
        f"{model.name} {bar(model.progress)} {model.stage}"
        for model in models
        if model.state == "loading"
    )
