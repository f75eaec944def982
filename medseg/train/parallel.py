"""One batch on several cores of a CPU: each thread runs the network on samples of its own.

Threads inside an operation wait for each other at every layer, and on small patches that costs more than
the second core brings. Threads with samples of their own meet twice a step, where the loss is: it is
computed on the outputs of the whole batch, so nothing changes but the order in which gradients are summed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

R = TypeVar("R")
Outputs = tuple[Tensor, ...]


class SplitBatch(nn.Module):
    """Calls `network` on parts of a batch at the same time; outputs and gradients are the whole batch's.

    Parameters
    ----------
    network : a network of which :func:`is_per_sample` holds
    batch_size : usual samples a call, which decides how many threads a sample gets
    threads : threads over all
    """

    def __init__(self, network: nn.Module, batch_size: int, threads: int) -> None:
        super().__init__()
        self.network = network
        self.workers = min(batch_size, threads)
        self._pool = ThreadPoolExecutor(
            self.workers, "step", torch.set_num_threads, (max(1, threads // self.workers),)
        )

    def forward(self, images: Tensor) -> Any:
        """(n, channels, ...) to what the network returns: a tensor, or a list of them."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        outputs = cast(Outputs, _SplitCall.apply(self, images, *parameters))  # type: ignore[no-untyped-call]
        return outputs[0] if len(outputs) == 1 else list(outputs)

    def split(self, batch: Tensor) -> list[Tensor]:
        """Return a part for each worker, and if some samples are over, a last one with these."""
        workers = min(self.workers, len(batch))
        even = len(batch) // workers * workers
        parts = list(batch[:even].tensor_split(workers))
        return [*parts, batch[even:]] if even < len(batch) else parts

    def each(self, function: Callable[..., R], *arguments: Sequence[Any]) -> list[R]:
        """Call a function for every part at once; what is over comes after, with the caller's threads."""
        parts = list(zip(*arguments, strict=True))
        futures = [self._pool.submit(function, *part) for part in parts[: self.workers]]
        together = [future.result() for future in futures]
        return together + [function(*part) for part in parts[self.workers :]]


class _SplitCall(torch.autograd.Function):
    """The network's graph in parts: built in threads, and walked back in threads."""

    @staticmethod
    def forward(ctx: Any, split: SplitBatch, images: Tensor, *parameters: Tensor) -> Outputs:
        ctx.set_materialize_grads(False)  # an output without a weight in the loss has no gradient
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

        def call(part: Tensor) -> Outputs:
            # both contexts belong to a thread
            with torch.enable_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs = split.network(part)
            return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

        ctx.split, ctx.parameters = split, parameters
        ctx.parts = split.each(call, split.split(images))
        return tuple(torch.cat([part.detach() for part in level]) for level in zip(*ctx.parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [k for k, gradient in enumerate(gradients) if gradient is not None]
        parts = zip(*(ctx.split.split(gradients[k]) for k in used), strict=True)

        def walk_back(outputs: Outputs, part: Outputs) -> tuple[Tensor | None, ...]:
            wanted = [outputs[k] for k in used]
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                wanted, ctx.parameters, part, allow_unused=True
            )
            return found

        summands = ctx.split.each(walk_back, ctx.parts, list(parts))
        ctx.parts = None  # frees the graphs
        return (None, None, *[_sum(of_one) for of_one in zip(*summands, strict=True)])


def is_per_sample(network: nn.Module) -> bool:
    """Return whether a sample's output depends on that sample alone: no batch statistics, no dropout."""
    return not any(
        isinstance(module, _BatchNorm)
        or (isinstance(module, _DropoutNd) and module.p > 0)
        or getattr(module, "drop_prob", 0.0) > 0  # MONAI's DropPath
        for module in network.modules()
    )


def _sum(summands: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum in the order given, so that a resumed run stays equal to the bit."""
    total, *others = summands  # a parameter that is unused in one part is unused in all
    for other in others:
        total = None if total is None or other is None else total + other
    return total
