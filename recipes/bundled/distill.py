"""Train the draft against the finished target: `python distill.py --minutes 20`.

The draft learns the target's whole next-token distribution, blended with a little of the true next token, on the
training text and on text the target wrote itself (what it will be asked to predict when it serves). Its embedding
starts as the target's, projected on its leading principal directions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .budget import load_checkpoint
from .export import export_model
from .generate import write_generated
from .loop import Settings, Trainer, arguments, settings_from
from .loss import teacher_loss
from .model import TinyLlama, config_from


def load_teacher(settings: Settings) -> TinyLlama:
    """The trained target, without gradients, in bfloat16."""
    saved = load_checkpoint(settings.work / "target.pt")
    if saved is None:
        raise FileNotFoundError(f"no trained target in {settings.work}: run train.py first")
    teacher = TinyLlama(config_from(saved["shape"]))
    teacher.load_state_dict(saved["model"])
    teacher.requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16()
    return teacher


def leading_directions(table: Tensor, width: int) -> Tensor:
    """The rows of `table` [V, D] in the basis of its `width` strongest right singular vectors: [V, width]."""
    wide = table.float()
    _, vectors = torch.linalg.eigh(wide.t() @ wide)
    return wide @ vectors[:, -width:].flip(1)


class DraftTrainer(Trainer):
    """Distillation."""

    name = "draft"
    stages_key = "draft_stage"
    optimizer_key = "draft_optimizer"

    def __init__(self, settings: Settings) -> None:
        self.teacher = load_teacher(settings)
        self.blend = float(settings.config["distill"]["blend"])
        super().__init__(settings)
        self.teacher.to(self.device)
        if settings.compiled:
            self.teacher.use_compiled_blocks()

    def prepare_model(self) -> None:
        """Start the embedding from the target's, with a final gain that makes the first logits of unit size."""
        table = leading_directions(self.teacher.model.embed_tokens.weight, self.shape.hidden_size)
        self.model.model.embed_tokens.weight.data.copy_(table)
        self.model.model.norm.weight.data.fill_(1.0 / float(table.norm(dim=1).mean()))

    def slice_loss(self, part: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy against the blended target; counts the rows where both models' first choices are equal."""
        inputs, labels = part[:, :-1], part[:, 1:].flatten()
        with torch.no_grad():
            taught = self.teacher.hidden(inputs).flatten(0, 1)
        table = self.teacher.model.embed_tokens.weight
        weights = torch.full(labels.shape, weight, device=self.device)

        def logits(start: int, stop: int) -> Tensor:
            return taught[start:stop] @ table.t()

        hidden = self.model.hidden(inputs).flatten(0, 1)
        head = self.model.model.embed_tokens.weight
        return teacher_loss(hidden, head, labels, weights, self.kernels, logits, self.blend)


def make_generated(settings: Settings) -> None:
    """Let the target write the text the draft also learns from, once."""
    path = settings.work / "streams" / "generated.train.npy"
    if path.exists():
        return
    plan = settings.config["distill"]
    folder = settings.work / "export" / "target"
    export_model(settings.work / "target.pt", settings.work / "tokenizer", folder)
    stream = write_generated(folder, settings.work, plan, settings.config["seed"])
    partial = path.with_suffix(".partial.npy")
    np.save(partial, stream)
    partial.replace(path)


def main() -> None:
    """Command line."""
    settings = settings_from(arguments(__doc__ or "", minutes=20.0).parse_args())
    make_generated(settings)
    DraftTrainer(settings).run()


if __name__ == "__main__":
    main()
