"""Command line: ``python -m lightning_neurons demo`` and ``... report``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli
from jsonargparse.typing import OpenUnitInterval, PositiveInt

from lightning_neurons.demo import demo, demo_pruning
from lightning_neurons.errors import ArgumentError
from lightning_neurons.report.html.page import write_html

DEMO = """Train on handwritten digits for a few epochs and show which neurons are dead and which matter.

Args:
    seed: Same seed, same numbers.
    epochs: How many epochs to train.
    output_dir: Where the TensorBoard run and the files go.
    prune: The share of multiply-accumulate operations that may stay, such as 0.5: cut while training goes on, train
        three epochs more, and compare with a random cut.
"""

REPORT = """Show everything that lies in the folder of a run as one HTML file, report.html in that folder.

Args:
    run_dir: The folder of a run, such as neurons_demo/version_0; neurons.json must be there.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; ``--help`` lists them."""

    def run_demo(
        seed: int = 0,
        epochs: PositiveInt = 5,
        output_dir: Path = Path("neurons_demo"),
        prune: OpenUnitInterval | None = None,
    ) -> None:
        if prune is None:
            demo(seed=seed, epochs=epochs, output_dir=output_dir)
        else:
            demo_pruning(prune, seed=seed, epochs=epochs, output_dir=output_dir)

    def run_report(run_dir: str) -> None:
        try:
            print(write_html(run_dir))
        except ArgumentError as error:
            sys.exit(f"lightning_neurons report: {error}")

    run_demo.__doc__, run_report.__doc__ = DEMO, REPORT
    # What must be given is positional, and every option of the demo has a default.
    auto_cli(
        {"demo": run_demo, "report": run_report},
        args=None if args is None else list(args),
        prog="lightning_neurons",
        as_positional=True,
    )
