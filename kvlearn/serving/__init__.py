"""One cache for many users: blocks and tenants (blocks.py), the engine that decodes with them (engine.py)."""

from kvlearn.serving.blocks import BlockPool, BlockTable, OutOfBlocks, Tenant, blocks_for, sha256
from kvlearn.serving.engine import Engine, Request

__all__ = [
    "BlockPool",
    "BlockTable",
    "Engine",
    "OutOfBlocks",
    "Request",
    "Tenant",
    "blocks_for",
    "sha256",
]
