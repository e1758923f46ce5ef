"""The decoding engine: continuous batching in depth, exact for every request."""

from trm.engine.engine import Engine, EngineConfig
from trm.engine.handle import Handle
from trm.engine.request import Event, Reply, Request, SamplingParams, Stats, Usage

__all__ = ["Engine", "EngineConfig", "Event", "Handle", "Reply", "Request", "SamplingParams", "Stats", "Usage"]
