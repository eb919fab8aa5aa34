"""Train the target: `python train.py --minutes 90`. Run it again after an interruption and it continues."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import prepare
from .loop import Trainer, arguments, settings_from
from .loss import label_loss


class TargetTrainer(Trainer):
    """Plain next-token training."""

    name = "target"
    stages_key = "stage"
    optimizer_key = "optimizer"

    def slice_loss(self, part: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, with a small pull of the log partition function to zero."""
        hidden = self.model.hidden(part[:, :-1]).flatten(0, 1)
        labels = part[:, 1:].flatten()
        weights = torch.full(labels.shape, weight, device=self.device)
        head = self.model.model.embed_tokens.weight
        loss = label_loss(hidden, head, labels, weights, self.kernels, self.optim.z_loss)
        return loss, torch.zeros((), device=self.device)


def main() -> None:
    """Command line."""
    options = arguments(__doc__ or "", minutes=90.0).parse_args()
    settings = settings_from(options)
    prepare(options.data, options.work, settings.config)
    TargetTrainer(settings).run()


if __name__ == "__main__":
    main()
