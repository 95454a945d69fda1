"""Which family an optimizer's class belongs to, and what is usual for it."""

import pytest
import torch

from autotune.search.usual import family_of, usual_lr

KINDS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adadelta]


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_own_subclass_is_of_its_bases_family(kind):
    class Mine(kind):
        pass

    assert family_of(Mine([torch.zeros(1)])) == family_of(kind([torch.zeros(1)]))


def test_an_unknown_one_has_its_own_name():
    class Mine(torch.optim.LBFGS):
        pass

    assert family_of(Mine([torch.zeros(1)])) == "Mine"
    assert usual_lr("Mine") is None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("FusedAdam", "Adam"),
        ("DeepSpeedCPUAdam", "Adam"),
        ("PagedAdamW8bit", "AdamW"),
        ("Lion8bit", "Lion"),
        ("FusedSGD", "SGD"),
        ("Sophia", "Sophia"),
    ],
)
def test_names_of_other_packages(name, family):
    kind = type(name, (torch.optim.Optimizer,), {})
    assert family_of(kind([torch.zeros(1)], {})) == family
    assert usual_lr(family) is not None or family == "Sophia"
