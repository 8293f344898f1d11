"""Measuring: bytes, time, memory, rooflines, and where a measurement comes from.

cache_size   what a real model stores and reads: ``cache_bytes``, ``read_bytes``, ``weights_bytes``, ``users``
models       ``MODELS``: real shapes by name
calculator   ``calculator``: the same with sliders, in a notebook
budget       ``design``, ``budget_table``, ``budget``: a hybrid for a GPU, with the least time of a step
touched      ``touched``: bytes of a cache and of weights, and FLOPs, that a call really touches
growth       ``fit_exponent``: the exponent of a power law, with its error
cost         ``Load``, ``users_per_device``, ``dollars_per_million``, ``costs``: what serving costs
devices      ``DEVICES``: memory, bandwidth and peak of real devices, with their sources
table        ``Table`` for notebooks, and the course's ``running_table``
units        ``format_bytes`` (KiB, MiB, GiB), ``format_bytes_decimal`` (kB, MB, GB), rates and times
timing       ``measure_time``, ``compare`` interleaved; medians with ``Quartiles``
timers       short calls: CUDA graphs with a cold L2, or the wall clock
memory       ``peak_memory`` of a call
work         FLOPs and bytes by formula: ``attention_work``, ``attention_layer_work``, ``decoder_work``
roofline     ``measure_roofline``, ``read_bandwidth``, ``matmul_peak`` of this machine
provenance   ``collect_provenance``: date, commit, machine, versions
results      ``results.Row``, ``save``, ``load``, ``comparable``: recorded measurements in results/
doctor       ``kvlearn doctor``: what runs how on this machine
"""

from kvlearn.measure import results
from kvlearn.measure.budget import KINDS, budget, budget_table, design, step_seconds, step_work
from kvlearn.measure.cache_size import (
    LayerShape,
    ModelShape,
    cache_bytes,
    elements_per_token,
    index_key_bytes,
    read_bytes,
    state_bytes,
    users,
    weights_bytes,
)
from kvlearn.measure.calculator import calculator, memory_table
from kvlearn.measure.cost import Load, cost_table, costs, dollars_per_million, users_per_device
from kvlearn.measure.devices import DEVICES, Device, device_table
from kvlearn.measure.growth import Exponent, fit_exponent
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.models import MODELS
from kvlearn.measure.provenance import collect_provenance
from kvlearn.measure.roofline import Machine, Roofline, matmul_peak, measure_roofline, read_bandwidth
from kvlearn.measure.table import Table, running_table
from kvlearn.measure.timing import Comparison, Quartiles, compare, measure_time
from kvlearn.measure.touched import Touched, touched
from kvlearn.measure.units import (
    GB,
    GIB,
    KB,
    KIB,
    MB,
    MIB,
    TB,
    TIB,
    format_bytes,
    format_bytes_decimal,
    format_rate,
    format_seconds,
)
from kvlearn.measure.work import Work, attention_layer_work, attention_work, decoder_work, linear_work

__all__ = [
    "DEVICES",
    "GB",
    "GIB",
    "KB",
    "KIB",
    "KINDS",
    "MB",
    "MIB",
    "MODELS",
    "TB",
    "TIB",
    "Comparison",
    "Device",
    "Exponent",
    "LayerShape",
    "Load",
    "Machine",
    "ModelShape",
    "Quartiles",
    "Roofline",
    "Table",
    "Touched",
    "Work",
    "attention_layer_work",
    "attention_work",
    "budget",
    "budget_table",
    "cache_bytes",
    "calculator",
    "collect_provenance",
    "compare",
    "cost_table",
    "costs",
    "decoder_work",
    "design",
    "device_table",
    "dollars_per_million",
    "elements_per_token",
    "fit_exponent",
    "format_bytes",
    "format_bytes_decimal",
    "format_rate",
    "format_seconds",
    "index_key_bytes",
    "linear_work",
    "matmul_peak",
    "measure_roofline",
    "measure_time",
    "memory_table",
    "peak_memory",
    "read_bandwidth",
    "read_bytes",
    "results",
    "running_table",
    "state_bytes",
    "step_seconds",
    "step_work",
    "touched",
    "users",
    "users_per_device",
    "weights_bytes",
]
