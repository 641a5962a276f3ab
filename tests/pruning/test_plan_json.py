"""Plans as files: what is written comes back, and what is no plan is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given

from lightning_neurons import ArgumentError, PruningPlan, prune
from lightning_neurons.pruning.plan import PlanCost
from tests.criteria.streams import laws
from tests.models import ConvNet, pictures, seeded
from tests.pruning.test_plan import rounds
from tests.tables import for_each

FULL = PruningPlan(
    {"net.conv1": (0, 3), "fc": (), "größe": (11,)},
    widths={"net.conv1": 4, "fc": 2, "größe": 12, "head": 1},
    reasons={"net.conv1": {0: "fisher 0.1", 3: "goes with fc 3"}, "größe": {11: 'quoted "why"\n'}},
    cost=PlanCost(2**60 + 1, 3_000, 2**60, 1_500),
    notes=("head is not cut: its neurons are the model's output", ""),
)


def document(**changes) -> dict:
    """A right one with some entries changed; None takes one out."""
    found = {
        "format": "lightning_neurons pruning plan",
        "version": 1,
        "neurons": {"fc": [0, 2]},
        "widths": {"fc": 4},
        "reasons": {"fc": {"0": "why", "2": "why"}},
        "cost": {"parameters": 10, "macs": 20, "parameters_after": 5, "macs_after": 6},
        "notes": ["a note"],
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


@for_each("plan", [FULL, PruningPlan({}), PruningPlan.from_indices({"fc": [2, 0]})])
def test_what_is_saved_comes_back_the_same(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    found = PruningPlan.load(str(tmp_path / "plan.json"))
    assert found == plan
    assert found.to_dict() == plan.to_dict()
    assert all(type(i) is int for by in found.reasons.values() for i in by)
    assert all(type(gone) is tuple for gone in found.neurons.values())
    assert type(found.notes) is tuple
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@laws
@given(rounds())
def test_any_plan_survives_json(case):
    _, plans = case
    for plan in (*plans, plans[0].then(plans[1])):
        assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_survives_a_checkpoint_that_holds_plain_values_only(tmp_path):
    torch.save(FULL.to_dict(), tmp_path / "checkpoint.pt")
    assert PruningPlan.from_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)) == FULL


def test_plain_values_are_the_callers_own():
    plan = PruningPlan.from_dict(document())
    plan.to_dict()["neurons"]["fc"].append(3)
    plan.to_dict()["widths"]["fc"] = 99
    assert plan == PruningPlan.from_dict(document())


def test_saving_leaves_the_plan_and_nothing_else(tmp_path):
    for plan in (FULL, PruningPlan({})):
        plan.save(tmp_path / "new" / "folder" / "plan.json")
    assert os.listdir(tmp_path / "new" / "folder") == ["plan.json"]
    assert PruningPlan.load(tmp_path / "new" / "folder" / "plan.json") == PruningPlan({})


def fail(*_, **__):
    raise OSError("no space left")


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_save_that_fails_leaves_the_file_that_was_there(step, tmp_path, monkeypatch):
    FULL.save(tmp_path / "plan.json")
    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(OSError, match="no space left"):
            PruningPlan({}).save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]
    assert PruningPlan.load(tmp_path / "plan.json") == FULL


def test_a_save_of_what_is_no_json_leaves_the_file_that_was_there(tmp_path):
    FULL.save(tmp_path / "plan.json")
    with pytest.raises(TypeError):
        PruningPlan({}, notes=(object(),)).save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]
    assert PruningPlan.load(tmp_path / "plan.json") == FULL


@for_each("content", [b"", b"{", b"neurons: fc", b"\xff\xfe\x00", b'{"format": 1'])
def test_a_file_that_is_no_json_is_refused_with_its_path(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"plan\.json.*a JSON file that PruningPlan\.save wrote, whole"):
        PruningPlan.load(tmp_path / "plan.json")


def test_half_a_file_is_refused(tmp_path):
    FULL.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    for length in range(0, len(text) - 1, 37):
        (tmp_path / "plan.json").write_text(text[:length])
        with pytest.raises(ArgumentError):
            PruningPlan.load(tmp_path / "plan.json")


@for_each(
    "given",
    [None, 3, "plan", [], ["fc"], {}, document(format="other"), document(format=None), document(neurons=None)]
    + [document(neurons=neurons) for neurons in ([0, 2], "fc", 3)],
)
def test_what_is_no_plan_is_refused(given):
    with pytest.raises(ArgumentError, match="a document with format 'lightning_neurons pruning plan' and neurons"):
        PruningPlan.from_dict(given)


@for_each("version", [2, 0, -1, 1.5, "1", True, [1], None])
def test_another_version_or_none_is_refused(version):
    with pytest.raises(ArgumentError, match=r"version .* is not allowed: expected version 1 to 1"):
        PruningPlan.from_dict(document(version=version))


@for_each(
    "changes, named",
    [
        ({"neurons": {"fc": [0, 4]}}, "neurons below the width 4 in 'fc'"),
        ({"neurons": {"fc": [1, 1]}}, "neurons['fc']=1"),
        ({"neurons": {"fc": [-1]}}, "neurons['fc']=-1"),
        ({"neurons": {"fc": [0.0]}}, "neurons['fc']=0.0"),
        ({"neurons": {"fc": "01"}}, "neurons['fc']='01'"),
        ({"neurons": {"fc": None}}, "neurons['fc']=None"),
        ({"neurons": {"fc": {"0": 1}}}, "neurons['fc']"),
        ({"widths": {"fc": -4}}, "widths that are positive whole numbers"),
        ({"widths": {"fc": 4, "head": 0}}, "widths that are positive whole numbers"),
        ({"widths": {"fc": 4.0}}, "widths that are positive whole numbers"),
        ({"widths": {"fc": "4"}}, "widths that are positive whole numbers"),
        ({"widths": {"fc": 4, "head": True}}, "widths that are positive whole numbers"),
        ({"widths": [4]}, "widths that are positive whole numbers"),
        ({"reasons": {"fc": {"zero": "why"}}}, "a plan as PruningPlan.save wrote it"),
        ({"reasons": {"fc": ["why"]}}, "a plan as PruningPlan.save wrote it"),
        ({"reasons": ["why"]}, "a plan as PruningPlan.save wrote it"),
        ({"cost": {"parameters": 10}}, "a plan as PruningPlan.save wrote it"),
        ({"cost": {**document()["cost"], "seconds": 1}}, "a plan as PruningPlan.save wrote it"),
        ({"cost": [10, 20, 5, 6]}, "a plan as PruningPlan.save wrote it"),
        ({"cost": 10}, "a plan as PruningPlan.save wrote it"),
        ({"cost": {**document()["cost"], "macs": "many"}}, "plan"),
        ({"cost": {**document()["cost"], "macs_after": None}}, "plan"),
        ({"notes": 3}, "a plan as PruningPlan.save wrote it"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_with_what_is_wrong(changes, named, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(document(**changes)))
    with pytest.raises(ArgumentError) as error:
        PruningPlan.load(tmp_path / "plan.json")
    assert named in str(error.value)


@for_each("layer, neuron", [("fc", "1"), ("fc", "99"), ("other", "0")])
def test_a_reason_for_what_stays_is_refused_or_harmless(layer, neuron):
    try:
        plan = PruningPlan.from_dict(document(reasons={layer: {neuron: "why"}}))
    except ArgumentError:
        return
    before = PruningPlan({"fc": (1,), "other": (0,)}, widths={"fc": 5, "other": 2})
    assert plan.lifted(before).neurons == {"fc": (0, 3)}
    assert plan.lowered(before).neurons == {"fc": (0, 1)}


def test_only_format_version_and_neurons_have_to_be_there():
    bare = document(widths=None, reasons=None, cost=None, notes=None)
    assert PruningPlan.from_dict(bare) == PruningPlan({"fc": (0, 2)})


def test_neurons_written_in_any_order_are_sorted():
    assert PruningPlan.from_dict(document(neurons={"fc": [3, 0]}, reasons={})).neurons == {"fc": (0, 3)}


def test_a_file_that_is_not_there_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "none.json")


def test_a_plan_that_was_saved_cuts_another_copy_the_same():
    x, y = pictures(8)
    first, second = seeded(ConvNet), seeded(ConvNet)
    plan = prune(first, x[:2], {"criterion": "fisher", "target_params": 0.5}, [(x, y)], compensation="none").plan
    plan.save("plan.json")
    assert PruningPlan.load("plan.json") == plan
    again = prune(second, x[:2], PruningPlan.load("plan.json")).plan
    assert (again.neurons, again.widths, again.cost) == (plan.neurons, plan.widths, plan.cost)
    assert again.reasons == plan.reasons
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
