"""One cache for many users: blocks and tenants, the engine that decodes with them, the leak, a simulation."""

from kvlearn.serving.blocks import BlockPool, BlockTable, OutOfBlocks, Tenant, blocks_for, sha256
from kvlearn.serving.engine import Engine, Request
from kvlearn.serving.leak import Attack, Noise, Template, attack, noise, recover, response_times
from kvlearn.serving.simulate import Mix, Report, simulate
from kvlearn.serving.states import StatePrefixes

__all__ = [
    "Attack",
    "BlockPool",
    "BlockTable",
    "Engine",
    "Mix",
    "Noise",
    "OutOfBlocks",
    "Report",
    "Request",
    "StatePrefixes",
    "Template",
    "Tenant",
    "attack",
    "blocks_for",
    "noise",
    "recover",
    "response_times",
    "sha256",
    "simulate",
]
