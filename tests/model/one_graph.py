"""Decoders under torch.compile(fullgraph=True): a training pass, and decode steps with a cache.

    python tests/model/one_graph.py

Logits and gradients must be those without it. The backend is "eager": graphs are captured, nothing is
compiled to machine code. A process of its own, since the hook that checks shapes in the tests cannot be
traced.
"""

from typing import Any

import torch
from model_tools import decoder, prompt

from kvlearn.model import MoEConfig, Spec, balance_loss

CASES: dict[str, dict[str, Any]] = {
    "full attention, MHA": {"layers": ["full"]},
    "GQA, keys read by the next layer, soft caps": {
        "layers": ["gqa", Spec("gqa", reads=-1)],
        "logit_softcap": 5.0,
        "embed_scale": 4.0,
        "tied": False,
    },
    "a hybrid with all experts": {
        "layers": ["gated_delta", "full"],
        "experts": MoEConfig(3, 2, 16, d_ff_shared=8, bias=True, limit=2.0),
    },
    "windows, and experts of which a step reads some": {
        "layers": ["window", "gqa"],
        "experts": MoEConfig(12, 2, 16, "sigmoid", n_groups=3, topk_groups=2, correction=True),
        "dense_layers": (0,),
    },
}


def capture(fields: dict[str, Any]) -> None:
    """Raises where a graph breaks, or numbers differ."""
    torch.compiler.reset()
    model = decoder(**fields, n_layers=2).train()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    trained = []
    for module in (model, compiled):
        model.zero_grad()
        logits = module(prompt())
        loss = logits.square().mean()
        if "experts" in fields:
            loss = loss + balance_loss(model)
        loss.backward()
        trained.append([logits.detach(), *(weight.grad for weight in model.parameters())])
    for got, expected in zip(*trained, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    model.eval()
    caches = [model.new_cache(2, 12) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt()[:, :5], cache)  # prompts are fed uncompiled, as mechanisms want it
        for token in prompt()[:, 5:].split(1, dim=1):
            got, expected = compiled(token, caches[0]), model(token, caches[1])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    for name, fields in CASES.items():
        print(name, flush=True)
        capture(fields)
