"""Both of Lightning's namespaces are loaded; which of them speaks is as it would be without us."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import lightning_utilities.core.rank_zero as messages
import pytest

from lightning_neurons.callbacks.trainer import namespaces

LOOK = """
import {first}
import lightning_utilities.core.rank_zero as messages
before = messages.log, messages.rank_zero_deprecation_category
import lightning_neurons
import lightning.pytorch
import pytorch_lightning
assert (messages.log, messages.rank_zero_deprecation_category) == before
print(messages.log.name)
"""


@pytest.mark.parametrize("first", ["lightning.pytorch", "pytorch_lightning"])
def test_messages_come_from_the_namespace_that_was_loaded_first(first):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", LOOK.format(first=first)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{first}.utilities.rank_zero", done.stderr


def test_where_no_namespace_was_loaded_none_keeps_a_place(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    logger = Mock()
    monkeypatch.setattr(messages, "log", messages.log)
    with namespaces.first_keeps_its_place():
        messages.log = logger
    assert messages.log is logger
