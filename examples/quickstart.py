"""One callback, no argument: which neurons are dead and which matter, while a network trains.

python examples/quickstart.py
"""

import lightning as L  # noqa: N812

from lightning_neurons import NeuronSensitivityCallback
from lightning_neurons.demo import DigitsModule, digits


def main() -> None:
    """Train on digits and ask the report."""
    L.seed_everything(0, verbose=False)
    callback = NeuronSensitivityCallback()
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[callback],
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(DigitsModule(), *digits())

    report = callback.report
    assert report is not None, "validation ran, so there is a report"
    print("the three neurons that matter most:", report.ranking("fisher")[:3])
    print("the important tenth of fc1:", report.select("fisher", share=0.1)["net.fc1"])
    print("dead in fc1:", report.dead("net.fc1").sum().item(), "of", len(report.dead("net.fc1")))
    print("dead in every epoch:", callback.history.persistently_dead()["net.fc1"])
    print("deadness of conv1 at a threshold of 10 % of its RMS:", report.deadness_at(0.1)["net.conv1"].mean().item())


if __name__ == "__main__":
    main()
