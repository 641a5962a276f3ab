"""What is wrong in the arguments of the guard is said when the callback is made, with what would be right."""

import math
from typing import Any

import numpy as np

from lightning_neurons import NeuronPruningCallback
from lightning_neurons.callbacks.pruning.recovery_settings import Guard
from tests.callbacks.guarded import guard
from tests.callbacks.refusals import not_refused

GUARD = {"monitor": "val_acc", "max_drop": 0.1}
COUNT = "a whole number of at least 1"
NUMBER = "a number of at least 0, in units of the metric"
SHARE = r"a share in \[0, 1\], such as 0.1 for 10 %"
HALF = r'"stop" with a threshold or lossless=True: there is no half step'
LINEAR = {"amount": 0.5, "schedule": "linear", "end_epoch": 6}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_drop": 0.1}, "monitor=None.*the metric that may fall by max_drop=0.1, such as 'val_acc'"),
    ({"monitor": 3, "max_drop": 0.1}, "monitor=3.*the name of a logged metric"),
    (GUARD | {"max_drop": -0.1}, f"max_drop=-0.1.*{NUMBER}"),
    (GUARD | {"max_drop": math.nan}, f"max_drop=nan.*{NUMBER}"),
    (GUARD | {"max_drop": math.inf}, f"max_drop=inf.*{NUMBER}"),
    (GUARD | {"max_drop": "0.1"}, f"max_drop='0.1'.*{NUMBER}"),
    (GUARD | {"max_drop": True}, f"max_drop=True.*{NUMBER}"),
    (GUARD | {"max_drop": [0.1]}, rf"max_drop=\[0.1\].*{NUMBER}"),
    (GUARD | {"max_drop": 1.1, "relative_drop": True}, f"max_drop=1.1.*{SHARE}"),
    (GUARD | {"max_drop": 5, "relative_drop": True}, f"max_drop=5.*{SHARE}"),
    (GUARD | {"max_drop": -0.1, "relative_drop": True}, f"max_drop=-0.1.*{SHARE}"),
    (GUARD | {"max_drop": math.nan, "relative_drop": True}, f"max_drop=nan.*{SHARE}"),
    (GUARD | {"max_drop": "0.1", "relative_drop": True}, f"max_drop='0.1'.*{SHARE}"),
    (GUARD | {"relative_drop": 1}, "relative_drop=1.*True or False"),
    (GUARD | {"relative_drop": "yes"}, "relative_drop='yes'.*True or False"),
    ({"relative_drop": True}, "relative_drop=True.*False without max_drop="),
    ({"monitor": "val_acc", "relative_drop": True}, "relative_drop=True.*False without max_drop="),
    ({"on_violation": "halve"}, "on_violation='halve'.*'stop' without max_drop="),
    (GUARD | {"mode": "maxx"}, r"mode='maxx'.*'max', 'min'; did you mean 'max'\?"),
    (GUARD | {"mode": "mim"}, r"mode='mim'.*'max', 'min'; did you mean 'min'\?"),
    ({"mode": "maxx"}, r"mode='maxx'.*did you mean 'max'\?"),
    (GUARD | {"on_violation": "half"}, r"on_violation='half'.*'stop', 'halve'; did you mean 'halve'\?"),
    (GUARD | {"on_violation": "raise"}, "on_violation='raise'.*'stop', 'halve'"),
    (GUARD | {"recovery_epochs": 0}, f"recovery_epochs=0.*{COUNT}"),
    (GUARD | {"recovery_epochs": -1}, f"recovery_epochs=-1.*{COUNT}"),
    (GUARD | {"recovery_epochs": 1.5}, f"recovery_epochs=1.5.*{COUNT}"),
    (GUARD | {"recovery_epochs": True}, f"recovery_epochs=True.*{COUNT}"),
    (GUARD | {"recovery_epochs": "2"}, f"recovery_epochs='2'.*{COUNT}"),
    ({"recovery_epochs": 2}, 'recovery_epochs=2.*max_drop= .with monitor=. or recovery="distill" beside it'),
    ({"monitor": "val_acc", "recovery_epochs": 2}, "recovery_epochs=2.*max_drop="),
    (
        GUARD | LINEAR | {"recovery_epochs": 2},
        "recovery_epochs=2.*at most every_n_epochs=1, so that a cut has recovered",
    ),
    (GUARD | LINEAR | {"recovery_epochs": 3, "every_n_epochs": 2}, "recovery_epochs=3.*at most every_n_epochs=2"),
    (GUARD | {"amount": None, "threshold": 0.1, "on_violation": "halve"}, f"on_violation='halve'.*{HALF}"),
    (GUARD | {"amount": None, "lossless": True, "on_violation": "halve"}, f"on_violation='halve'.*{HALF}"),
]


def test_an_argument_that_is_wrong_is_named_with_what_came_and_what_is_allowed():
    rows = [
        ({"amount": 0.3} | arguments, f"(?=.* is not allowed: expected ).*{message}") for arguments, message in WRONG
    ]
    assert not_refused(NeuronPruningCallback, rows) == {}


RIGHT: list[tuple[dict[str, Any], Guard]] = [
    ({"max_drop": 0}, Guard("val_score", 0.0, "max", False, "stop")),
    ({"max_drop": 50, "mode": "min"}, Guard("val_score", 50.0, "min", False, "stop")),
    ({"max_drop": 1, "relative_drop": True}, Guard("val_score", 1.0, "max", True, "stop")),
    ({"max_drop": 0.0, "relative_drop": True}, Guard("val_score", 0.0, "max", True, "stop")),
    ({"max_drop": np.float32(0.5), "on_violation": "halve"}, Guard("val_score", 0.5, "max", False, "halve")),
    ({"threshold": 0.1}, Guard("val_score", 0.125, "max", False, "stop")),
    ({"target_params": 0.5, "on_violation": "halve"}, Guard("val_score", 0.125, "max", False, "halve")),
]


def test_arguments_at_the_end_of_their_range_are_taken():
    for arguments, expected in RIGHT:
        assert guard(**arguments).pruning.guard == expected


def test_a_recovery_may_last_until_the_next_round_and_as_long_as_one_likes_after_the_last():
    for arguments in (
        {"recovery_epochs": 9},
        {"recovery_epochs": 2, "schedule": "linear", "end_epoch": 5, "every_n_epochs": 2},
        {"recovery_epochs": 3, "schedule": "linear", "end_epoch": 1},
    ):
        assert guard(**arguments).pruning.recovery_epochs == arguments["recovery_epochs"]


def test_without_a_bound_a_monitor_is_only_reported():
    callback = NeuronPruningCallback(amount=0.3, monitor="val_acc")
    assert callback.pruning.guard is None
    assert callback.pruning.monitor == "val_acc"


def test_bounds_by_hand():
    cases = {
        ("max", 0.125, False, 0.75): 0.625, ("min", 0.125, False, 0.75): 0.875,
        ("max", 0.25, True, 0.5): 0.375, ("min", 0.25, True, 0.5): 0.625,
        ("max", 0.25, True, -0.5): -0.625, ("min", 0.25, True, -0.5): -0.375,
    }  # fmt: skip
    for (mode, drop, relative, baseline), bound in cases.items():
        assert Guard("m", drop, mode, relative, "stop").bound(baseline) == bound
