"""The same MoE layer in plain PyTorch, to be timed beside ours in one run.

`loop`: a loop over the experts with index_select and index_add, as in most published code.
`grouped`: torch's grouped matmul over sorted rows, if this torch has one for the device.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence


def torch_seconds(
    shape: Sequence[int], tokens: int, dtype: str, repeats: int
) -> dict[str, float] | None:
    """Median seconds of forward + backward, on the GPU if torch sees one, else on the CPU.

    Returns {"torch_loop": s, "torch_grouped": s}, or None if torch is not installed.
    """
    if not importlib.util.find_spec("torch"):
        return None
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, hidden, num_experts, top_k = shape
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=kind, requires_grad=True)
    gate = torch.randn(width, num_experts, device=device) * width**-0.5
    sizes = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
    weights = {
        name: (torch.randn(num_experts, *size, device=device) * size[0] ** -0.5)
        .to(kind)
        .requires_grad_()
        for name, size in sizes.items()
    }

    def route():
        scores = torch.softmax(x.float() @ gate, dim=-1)
        return torch.topk(scores, top_k, dim=-1)

    def loop():
        weight, expert = route()
        y = torch.zeros_like(x)
        for e in range(num_experts):
            token, slot = torch.where(expert == e)
            rows = x[token]
            inner = torch.nn.functional.silu(rows @ weights["gate"][e]) * (rows @ weights["up"][e])
            out = (inner @ weights["down"][e]) * weight[token, slot, None].to(kind)
            y = y.index_add(0, token, out)
        return y

    def grouped():
        weight, expert = route()
        order = torch.argsort(expert.flatten(), stable=True)
        token = order // top_k
        ends = torch.bincount(expert.flatten(), minlength=num_experts).cumsum(0).to(torch.int32)
        rows = x[token]
        product = torch._grouped_mm
        inner = torch.nn.functional.silu(product(rows, weights["gate"], offs=ends))
        inner = inner * product(rows, weights["up"], offs=ends)
        out = product(inner, weights["down"], offs=ends) * weight.flatten()[order, None].to(kind)
        return torch.zeros_like(x).index_add(0, token, out)

    def seconds(layer):
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            layer().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    found = {"torch_loop": seconds(loop)}
    if device == "cuda" and dtype == "bfloat16" and hasattr(torch, "_grouped_mm"):
        found["torch_grouped"] = seconds(grouped)
    return found
