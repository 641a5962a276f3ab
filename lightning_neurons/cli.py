"""The command line: ``python -m lightning_neurons demo``."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt

from lightning_neurons.demo import demo


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; ``--help`` lists them."""

    def run_demo(seed: int = 0, epochs: PositiveInt = 5, output_dir: Path = Path("neurons_demo")) -> None:
        demo(seed=seed, epochs=epochs, output_dir=output_dir)

    run_demo.__doc__ = demo.__doc__
    auto_cli(
        {"demo": run_demo}, args=None if args is None else list(args), prog="lightning_neurons", as_positional=False
    )
