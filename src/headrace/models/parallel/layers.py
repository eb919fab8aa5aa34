"""The layers of one rank: plain modules over plain tensors, made of what transformers loaded and split.

transformers reads each rank's share of the checkpoint into distributed tensors and wraps every module's forward to redistribute
them. That is exact and general, and at a few tokens a step the wrapping costs more than the products. Inference needs three
things only: column-wise linears are ordinary linears with fewer rows, row-wise ones end in a sum over ranks, and an embedding cut by
tokens looks up what it has and sums. So those are put in place here; experts keep transformers' own wrapping.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headrace.core.errors import UnsupportedModel
from headrace.models.parallel.group import Group
from headrace.models.parallel.plan import gathers, splits_input, style_of


class SumLinear(nn.Module):
    """A linear cut along its input: each rank multiplies its part, the sum over ranks is the result.

    Args:
        local: this rank's part of the product, without a bias.
        bias: float[out_features], added once, after the sum.
        split: the input is whole, and this rank takes its own part of it; else it gets that part alone.
    """

    bias: Tensor | None

    def __init__(self, local: nn.Linear, bias: Tensor | None, group: Group, *, split: bool) -> None:
        super().__init__()
        self.local, self.group, self.split = local, group, split
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., out_features] on every rank."""
        if self.split:
            x = x.chunk(self.group.size, -1)[self.group.rank].contiguous()
        out = self.group.sum_(self.local(x))
        return out if self.bias is None else out + self.bias


class GatherLinear(nn.Module):
    """A linear cut along its output whose whole output is needed: on every rank, or on rank 0 alone.

    Args:
        local: this rank's rows, with their bias.
        everywhere: every rank goes on with the output; else it is the model's last, of use to rank 0.
    """

    def __init__(self, local: nn.Linear, group: Group, *, everywhere: bool) -> None:
        super().__init__()
        self.local, self.group, self.everywhere = local, group, everywhere

    def forward(self, x: Tensor) -> Tensor:
        """float[..., out_features]; where it is of no use, this rank's columns."""
        out = self.local(x)
        return self.group.gather(out) if self.everywhere else self.group.gather_first(out)


class SumEmbedding(nn.Module):
    """An embedding cut by tokens: a rank that does not hold a token's row contributes zeros.

    Args:
        local: this rank's rows under the checkpoint's own class, which may scale what it finds.
    """

    def __init__(self, local: nn.Embedding, group: Group) -> None:
        super().__init__()
        self.local, self.group = local, group
        self.first, self.count = group.rank * local.weight.shape[0], local.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """float[..., h] of int[...] ids."""
        own = ids - self.first
        here = (own >= 0) & (own < self.count)
        found = self.local(own.clamp(0, self.count - 1))
        return self.group.sum_(found * here.unsqueeze(-1))


def settle(module: Any, plan: dict[str, str], group: Group) -> None:
    """Replace the distributed tensors of ``module`` by this rank's own and its wrapped linears and embeddings by plain ones.

    Args:
        module: what ``from_pretrained`` gave with a distributed configuration; changed in place.
        plan: transformers' plan for it.

    Raises:
        UnsupportedModel: a linear or an embedding is cut in a way that is not known here.
    """
    head = module.get_output_embeddings()
    settler = _Settler(group)
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and _is_cut(child):
            module.set_submodule(path, settler.linear(child, path, style_of(plan, path), last=child is head))
        elif isinstance(child, nn.Embedding) and _is_cut(child):
            settler.unwrap(child, path, dim=0)
            module.set_submodule(path, SumEmbedding(child, group))


def is_shared(module: nn.Module) -> bool:
    """Whether ``module`` holds one rank's part of a model."""
    return any(isinstance(child, SumLinear | GatherLinear | SumEmbedding) for child in module.modules())


class _Settler:
    """Unwraps modules; tensors that modules share stay shared."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._plain: dict[int, tuple[Any, nn.Parameter]] = {}  # by id of the distributed one, which is kept alive

    def linear(self, linear: nn.Linear, path: str, style: str | None, *, last: bool) -> nn.Module:
        """What stands for ``linear``, itself changed to this rank's part."""
        weight: Any = linear.weight
        if weight.placements[0].is_shard(0):
            self.unwrap(linear, path, dim=0)
            linear.out_features = linear.weight.shape[0]
            return GatherLinear(linear, self.group, everywhere=not last) if gathers(style) else linear
        bias = None if linear.bias is None else self._local(linear.bias)
        linear.register_parameter("bias", None)
        self.unwrap(linear, path, dim=1)
        linear.in_features = linear.weight.shape[1]
        return SumLinear(linear, bias, self.group, split=splits_input(style))

    def unwrap(self, module: Any, path: str, dim: int) -> None:
        """Give ``module`` its own forward and plain parameters back, checking that its weight is cut along ``dim``."""
        placement = module.weight.placements[0]
        if not placement.is_shard(dim):
            raise UnsupportedModel(
                f"{path} is split as {placement}, which is not known here: serve this model with tp 1", field="tp"
            )
        module.__dict__.pop("forward", None)  # transformers' wrapper, which hides the class's own
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, self._local(parameter))

    def _local(self, parameter: Any) -> nn.Parameter:
        if id(parameter) not in self._plain:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            plain = nn.Parameter(local.detach().contiguous(), requires_grad=False)
            self._plain[id(parameter)] = (parameter, plain)
        return self._plain[id(parameter)][1]


def _is_cut(module: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(module.weight, DTensor)
