"""Which models are in memory, and who may use them."""

from quantd.daemon.fleet.fleet import Fleet
from quantd.daemon.fleet.lease import Lease
from quantd.daemon.fleet.model import ModelStatus, Timing

__all__ = ["Fleet", "Lease", "ModelStatus", "Timing"]
