"""The cost of compression in quality: every mechanism trained on one budget, with error bars. Chapter 10.

    from kvlearn.study import quality

    rows = quality.recorded()
    for item in quality.compare(rows):
        print(item.design, item.summary, item.pooled)

plan         designs, budgets, presets, tiers, parts, runs
run          runs a part: resumable, one row per finished run
evaluate     loss by position, on repeated text, at longer contexts; bytes stored and read
statistics   mean, spread, paired differences with intervals, the smallest difference that n seeds show
compare      recorded rows: designs beside full attention; runs that are missing
report       the tables of ``kvlearn study quality``, which command.py runs
"""

from kvlearn.study.quality.compare import (
    Compared,
    best_recall,
    compare,
    far_loss,
    final_runs,
    loss,
    progress,
    visible_difference,
)
from kvlearn.study.quality.evaluate import (
    TrainingText,
    by_position,
    evaluate_language,
    memory,
    repetition_slices,
    slice_losses,
)
from kvlearn.study.quality.plan import (
    BUDGETS,
    CPU,
    GPU,
    ConversionRun,
    LanguageRun,
    Part,
    RecallRun,
    designs,
    matched,
    parts,
    tiers,
)
from kvlearn.study.quality.run import OutOfTime, Session, calibrate, recorded, run_part
from kvlearn.study.quality.statistics import (
    Difference,
    Summary,
    bootstrap_difference,
    paired_difference,
    paired_values,
    pooled_spread,
    smallest_difference,
    summarise,
)

__all__ = [
    "BUDGETS",
    "CPU",
    "GPU",
    "Compared",
    "ConversionRun",
    "Difference",
    "LanguageRun",
    "OutOfTime",
    "Part",
    "RecallRun",
    "Session",
    "Summary",
    "TrainingText",
    "best_recall",
    "bootstrap_difference",
    "by_position",
    "calibrate",
    "compare",
    "designs",
    "evaluate_language",
    "far_loss",
    "final_runs",
    "loss",
    "matched",
    "memory",
    "paired_difference",
    "paired_values",
    "parts",
    "pooled_spread",
    "progress",
    "recorded",
    "repetition_slices",
    "run_part",
    "slice_losses",
    "smallest_difference",
    "summarise",
    "tiers",
    "visible_difference",
]
