"""A table that is run as one test hides nothing: every row runs, and each one that fails is named."""

from unittest.mock import Mock

import pytest
import torch

from tests.tables import for_each


def test_every_row_runs_with_the_same_seeds_and_each_failure_is_named():
    run = Mock(return_value=None)

    @for_each("left", [1, 2])
    @for_each("right, word", [(1, "a"), (2, "b"), (3, "c")])
    def test(left, right, word):
        run(left, right, word, torch.rand(1).item())
        if left == right:
            with pytest.raises(ValueError, match="never"):
                pass

    with pytest.raises(
        AssertionError, match=r"(?s)0: 1': .*0: 1, a': .*DID NOT RAISE.*1: 2': .*1: 2, b': .*DID NOT RAISE"
    ):
        test()
    rows = [call.args[:3] for call in run.call_args_list]
    assert rows == [(left, *row) for left in (1, 2) for row in ((1, "a"), (2, "b"), (3, "c"))]
    assert len({call.args[3] for call in run.call_args_list}) == 1


def test_a_table_without_rows_is_an_error():
    with pytest.raises(AssertionError, match="without rows"):
        for_each("row", [])(lambda row: None)()


@for_each("row", ["a", "b"])
def test_fixtures_come_beside_the_columns(tmp_path, row):
    assert tmp_path.is_dir()
    assert row in {"a", "b"}
