"""One loaded model at work."""

from quantd.daemon.engine.engine import Engine, EngineStats
from quantd.daemon.engine.stream import TokenStream

__all__ = ["Engine", "EngineStats", "TokenStream"]
