"""What LUR refuses inside the Trainer of transformers, by name and before anything moves."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import state
from trainer_cases import adapted, batches_of, model, trained

import fastlur
from fastlur.errors import ModelError, NonFiniteError
from fastlur.integrations.open_unlearning import bounded_ascent
from fastlur.integrations.trainer import refuse_many
from fastlur.llm import NPO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"gradient": "exact"}, "gradient='exact'"),
        ({"gradient": "popov"}, "gradient='popov'"),
        ({"forget_loss": "npoo"}, "forget_loss='npoo'"),
        ({"forget_loss": 3}, "forget_loss=3"),
        ({"forget_loss": NPO()}, r"reference=fastlur\.llm\.reference_log_probs"),
        ({"inner_lr": -1.0}, "inner_lr=-1.0"),
        ({"forget_weight": float("nan")}, "forget_weight=nan"),
        ({"order": "both"}, "order='both'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(tmp_path, wrong, named):
    with pytest.raises(fastlur.FastlurError, match=named):
        trained(tmp_path, model(), **wrong)


def test_adapters_that_get_no_gradient_are_refused_with_the_remedy(tmp_path):
    """Merged ones alone, and beside a norm that would be trained in their place without a word."""
    for more in ({}, {"modules_to_save": ["norm"]}):
        network = adapted(**more)
        network.merge_adapter()
        before = state(network)
        with pytest.raises(ModelError, match=r"no gradient reaches its adapters.*unmerge_adapter"):
            trained(tmp_path, network)
        after = state(network)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_that_may_not_move_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nothing may move; let some"):
        trained(tmp_path, model().requires_grad_(False))
    network = adapted().requires_grad_(False)
    with pytest.raises(ModelError, match="its adapters are frozen"):
        trained(tmp_path, network)


@pytest.mark.parametrize("gradient", ["secant", "optimistic", "first_order"])
def test_what_is_not_finite_ends_the_run_and_moves_nothing(tmp_path, gradient):
    def broken(network, batch):
        calls.append(len(calls))
        return bounded_ascent(network, batch) * (float("nan") if len(calls) > 2 else 1.0)

    calls: list[int] = []
    network, twin = model(), model()
    with pytest.raises(NonFiniteError, match=r"step 3: .*no gradient of this batch") as caught:
        trained(tmp_path, network, batches=5, gradient=gradient, forget_loss=broken)
    assert caught.value.step == 3
    trained(tmp_path, twin, batches=5, gradient=gradient, arguments={"max_steps": 2})
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_sides_is_refused(tmp_path):
    trainer, _ = trained(tmp_path, model())
    with pytest.raises(fastlur.FastlurError, match="forget: a batch must hold"):
        trainer.training_step(trainer.model, batches_of(1)[0]["retain"])


@pytest.mark.parametrize("kind", ["MULTI_GPU", "FSDP", "DEEPSPEED"])
def test_more_than_one_process_is_refused(tmp_path, kind):
    from accelerate.utils import DistributedType

    trainer, _ = trained(tmp_path, model())
    accelerator = types.SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(fastlur.FastlurError, match=f"not {kind}"):
        refuse_many(trainer.args, accelerator)


def test_scaled_losses_are_refused(tmp_path):
    with pytest.raises(fastlur.FastlurError, match="fp16=True"):
        trained(tmp_path, model(), arguments={"fp16": True})


def test_weights_that_round_the_inner_step_away_are_warned_of(tmp_path):
    """As the framework's own configs load them."""
    with pytest.warns(UserWarning, match=r"parameters move in bfloat16: .*less than 0.2 %"):
        trained(tmp_path, model(dtype=torch.bfloat16))
