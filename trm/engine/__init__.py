"""The decoding engine: continuous batching in depth, exact for every request."""

from trm.engine.engine import Engine, EngineConfig
from trm.engine.handle import Handle, Reservation
from trm.engine.request import Event, Reply, Request, SamplingParams, Stats, Usage

__all__ = [
    "Engine",
    "EngineConfig",
    "Event",
    "Handle",
    "Reply",
    "Request",
    "Reservation",
    "SamplingParams",
    "Stats",
    "Usage",
]
