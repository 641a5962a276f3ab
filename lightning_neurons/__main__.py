"""``python -m lightning_neurons``."""

from lightning_neurons.cli import main

if __name__ == "__main__":
    main()
