"""One, two and four processes, with and without accumulation, train the same on the same global batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launched import run_launched
from tests.distributed.run_equality import STEPS, TRAININGS, main, trainings

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is compared, trained here and in one launch for each number of several processes."""
    out = tmp_path_factory.mktemp("equality")
    main(str(out), "1")
    for world in WORLDS[1:]:
        run_launched("tests/distributed/run_equality.py", out, world, processes=world)
    return out


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_averages_are_those_of_one_process(name: str, trained: Path) -> None:
    """Losses over twenty steps in fp32; the last weights, and their moving average, which is what is used."""
    alone = f"{name.removesuffix('.resumed').removesuffix('.early')}.1x1"
    curve = json.loads((trained / f"{alone}.json").read_text())
    weights = load_file(trained / f"{alone}.safetensors")
    assert len(curve) == STEPS and len({entry["loss"] for entry in curve}) == STEPS  # every step saw something else
    kinds = {key.split(".")[0] for key in weights}
    assert kinds == {"last", "average"}
    assert any(
        not torch.allclose(tensor, weights[key.replace("average.", "last.", 1)], atol=1e-4)
        for key, tensor in weights.items()
        if key.startswith("average.")
    )
    others = [f"{name}.{world}x{a}" for world in WORLDS for own, a in trainings(world) if own == name]
    others = [other for other in others if other != alone]
    assert {other.split(".")[-1].split("x")[0] for other in others} >= {"2", "4"}
    for other in others:
        losses = json.loads((trained / f"{other}.json").read_text())
        for step, (ours, expected) in enumerate(zip(losses, curve, strict=True), start=1):
            assert ours.keys() == expected.keys()
            for term, value in expected.items():
                assert ours[term] == pytest.approx(value, abs=1e-5, rel=0), f"{other}: {term} of step {step}"
        theirs = load_file(trained / f"{other}.safetensors")
        assert theirs.keys() == weights.keys()
        for key, tensor in weights.items():
            # The softmax does not feel a key's bias: its gradient is rounding alone, which AdamW makes steps of.
            tolerance = 1e-3 if key.endswith("k_proj.bias") else 5e-5
            difference = (theirs[key].float() - tensor.float()).abs().max()
            assert difference <= tolerance, f"{other}: {key} differs by {difference}"
