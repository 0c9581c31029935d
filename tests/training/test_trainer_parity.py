"""On the same batches the transformers Trainer, with or without PEFT's adapters, has the losses of this project."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from lorabench.config.experiments import Protocol
from lorabench.training.batches import data_order

from .lanes import DENSE, base_of, padded, run_of, series, train_together, with_peft

LRS = {"lora": (3e-4, 1e-3), "fullft": (5e-5, 2e-4)}
# Beside the protocol's 1e-8, entries of the gradient that are nothing but rounding move weights by a whole LR, so that
# losses depend on the order in which a processor adds.
EPS = 1e-5


class InOrder(Trainer):
    """A Trainer that takes examples in order and keeps the loss of every batch, which its log would round."""

    def __init__(self, *arguments, **changes):
        super().__init__(*arguments, **changes)
        self.losses = []

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *arguments, **changes):
        loss = super().compute_loss(*arguments, **changes)
        self.losses.append(loss.item())
        return loss


def trainer_losses(base, run, data, folder):
    """Train one run by the Trainer with the optimizer of the protocol and return its losses."""
    condition, protocol = run.condition, Protocol()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=condition.steps,
        per_device_train_batch_size=condition.batch_size,
        learning_rate=run.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=protocol.betas[0],
        adam_beta2=protocol.betas[1],
        adam_epsilon=condition.eps,
        weight_decay=protocol.weight_decay,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    order = data_order(len(data["train"]), condition.steps, condition.batch_size, run.seed)
    trainer = InOrder(
        model=with_peft(base, run),
        args=arguments,
        train_dataset=[{"index": int(index)} for index in order.flatten()],
        data_collator=lambda rows: padded(data["train"], [row["index"] for row in rows]),
    )
    trainer.args.remove_unused_columns = False
    trainer.train()
    return trainer.losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", LRS)
@pytest.mark.parametrize("base", DENSE)
def test_losses_of_the_trainer(method, base, short_data, tmp_path):
    runs = [run_of(method, lr, seed, eps=EPS) for seed, lr in enumerate(LRS[method], 3)]
    outcomes = train_together(runs, base_of(base), short_data, tmp_path)
    for run in runs:
        losses = trainer_losses(base_of(base), run, short_data, tmp_path / "trainer")
        assert len(losses) == 50
        np.testing.assert_allclose(series(outcomes[run.run_id], "nll"), losses, rtol=1e-5)
