"""One loaded model at work."""

from quantd.daemon.engine.engine import Engine
from quantd.daemon.engine.stats import EngineStats, RequestState
from quantd.daemon.engine.stream import TokenStream

__all__ = ["Engine", "EngineStats", "RequestState", "TokenStream"]
