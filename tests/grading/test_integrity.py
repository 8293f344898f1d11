"""Changes by an answer are seen, and cost points only if checks rely on the changed object."""

import asyncio
from pathlib import Path

import pytest
import small_unit as small

from kvlearn.grading.integrity import READING, STATE, changed, relied_on, request
from kvlearn.grading.sandbox import Limits, Sandbox

INNOCENT = [
    "torch.set_default_dtype(torch.float64)",
    "torch.Tensor.__repr__ = lambda x: 'mine'",
    "torch.nn.functional.softmax = print",
    "%load_ext autoreload\n%autoreload 2\n%precision 3",
    "import rich.pretty; rich.pretty.install()",
    "get_ipython().events.register('pre_run_cell', lambda info: None)",
    "get_ipython().display_formatter.mimebundle_formatter.for_type(list, repr)",
    "import torch._dynamo",
]
MEDDLING = {
    "kvlearn.check": "import kvlearn; kvlearn.check = print",
    "torch.isclose": "torch.isclose = lambda *a, **k: True",
    "torch.Tensor.__eq__": "torch.Tensor.__eq__ = lambda *a: True",
    "builtins.abs": "import builtins; builtins.abs = lambda x: 0",
    "kvlearn.grading.score.Score.to_json": "import kvlearn.grading as g; g.Score.to_json = print",
    f"kvlearn_units.u{small.UNIT}.checks.declare": "import sys\n"
    f"sys.modules['kvlearn_units.u{small.UNIT}.checks'].declare = print",
    "kvlearn.grading.judge": "import kvlearn.grading as g; g.judge.__code__ = (lambda *a: 0).__code__",
    "exercise 90.2": "import kvlearn.grading as g; g.find_exercise('90.2').requirements.pop()",
    "IPython's formatters of scores": "display = get_ipython().display_formatter\n"
    "display.mimebundle_formatter.for_type(float, repr)",
    "IPython's transformers": "get_ipython().ast_transformers.append(None)",
    "IPython's transformers ": "get_ipython().input_transformers_cleanup.append(lambda lines: lines)",
    "IPython's transformers  ": "get_ipython().input_transformer_manager.line_transforms.append(lambda x: x)",
    "ZMQInteractiveShell.run_cell": "get_ipython().run_cell = get_ipython().run_cell",
    "IPythonKernel.do_execute": "import ipykernel.ipkernel as k\nrun = k.IPythonKernel.do_execute\n"
    "k.IPythonKernel.do_execute = lambda *a, **k: run(*a, **k)",
    "kvlearn.grading.context.TOLERANCE[torch.float32]": "import kvlearn.grading.context as c\n"
    "c.TOLERANCE[torch.float32] = 1e9",
    f"kvlearn_units.u{small.UNIT}.checks.EXERCISES": "import sys\n"
    f"sys.modules['kvlearn_units.u{small.UNIT}.checks'].EXERCISES = ()",
    "kvlearn.grading.context.near": "import kvlearn.grading.context as c; c.near.__defaults__ = (1e9,)",
    "torch's modes": "torch.device('cpu').__enter__()",
    READING: "import os; open(os.path.join(os.environ['KVLEARN_SOLUTIONS'], '90_small/checks.py')).close()",
    "where exercises are found": "import os; os.environ['KVLEARN_SOLUTIONS'] = '.'",
}


@pytest.mark.slow
def test_only_a_change_of_what_checks_rely_on_costs_an_answer_points(tmp_path: Path) -> None:
    solutions = small.write_solutions(tmp_path)
    ask = request(small.UNIT)

    async def look() -> list[list[str]]:
        found = []
        async with Sandbox(Limits(), {"KVLEARN_SOLUTIONS": str(solutions)}) as box:
            await box.run(small.SETUP, 60)
            before = await box.ask(ask, STATE, 60)
            assert not changed(before, await box.ask(ask, STATE, 60))
            for code in [*INNOCENT, *MEDDLING.values()]:
                outputs = await box.run(code, 60)
                assert not [each for each in outputs if each["output_type"] == "error"], code
                after = await box.ask(ask, STATE, 60)
                found.append(changed(before, after))
                before = after
        return found

    found = asyncio.run(look())
    guilty = [[name for name in names if relied_on(name, solutions / small.UNIT)] for names in found]
    assert guilty[: len(INNOCENT)] == [[] for _ in INNOCENT]
    assert found[0], "what else changes is seen too: the kernel is not used again"
    for name, names in zip(MEDDLING, guilty[len(INNOCENT) :], strict=True):
        assert name.strip() in names
