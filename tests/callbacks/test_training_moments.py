"""What training reads only later, seldom, or in a hook keeps a layer whole as well; to look ahead leaves no trace."""

import warnings
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_neurons.callbacks.pruning.moments import moments_to_come
from tests.callbacks.modules import Manual, Plain, dataset, fit, loader
from tests.callbacks.pruned import Probe, pruner, widths
from tests.callbacks.test_training_only import CUT, WHOLE, Deep, TwoOptimizers, seeded

EPOCHS = 14


class Later(Deep):
    """A second head, now and then."""

    def __init__(self, when) -> None:
        super().__init__()
        self.heads, self.when, self.count = nn.ModuleList(nn.Linear(6, 3) for _ in range(2)), when, 0

    def extra(self, batch):
        second = self.features(batch[0])[1]
        return nn.functional.cross_entropy(self.heads[0](second), batch[1])

    def training_step(self, batch, batch_idx):
        self.count += 1
        return self.loss(batch) + (self.extra(batch) if self.when(self, batch_idx) else 0)


class Turns(Later):
    """The same functions are called in each step, with other weights."""

    def training_step(self, batch, batch_idx):
        _, second, third = self.features(batch[0])
        is_now = self.when(self, batch_idx)
        out = self.heads[0](second) if is_now else self.heads[1](ONES)
        return self.net.fc2(third).square().sum() + out.square().sum()


ONES = torch.ones(8, 6)
LATER = {
    "from an epoch on": lambda module, batch_idx: module.current_epoch >= 3,
    "in the last epoch": lambda module, batch_idx: module.current_epoch == module.trainer.max_epochs - 1,
    "in every third epoch": lambda module, batch_idx: module.current_epoch % 3 == 2,
    "every fifth batch": lambda module, batch_idx: batch_idx % 5 == 4,
    "the last batch": lambda module, batch_idx: module.trainer.is_last_batch,
    "from a batch on": lambda module, batch_idx: batch_idx > 11,
    "every hundredth step": lambda module, batch_idx: module.global_step % 100 == 0,
    "every tenth step": lambda module, batch_idx: module.global_step % 10 == 9,
    "from a step on": lambda module, batch_idx: module.global_step > 150,
    "its own count": lambda module, batch_idx: module.count % 7 == 0,
    "from a batch of all on": lambda module, batch_idx: module.trainer.fit_loop.total_batch_idx >= 150,
    "while it trains": lambda module, batch_idx: module.trainer.training,
}


def said_by(module, epochs, **kwargs):
    """What a run says of layers that it does not cut."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [pruner("weight_l2", amount=0.33, scope="layer")], max_epochs=epochs, **kwargs)
    assert trainer.current_epoch == epochs
    said = [str(one.message).partition("cannot cut ")[2] for one in caught]
    return {name: reason for name, _, reason in (one.partition(": ") for one in said) if name.startswith("net.")}


@pytest.mark.parametrize(("make", "when"), [*((Later, when) for when in LATER), (Turns, "every fifth batch")])
def test_a_reader_that_comes_later_or_seldom_keeps_its_layer_whole(make, when):
    module = seeded(lambda: make(LATER[when]))
    said = said_by(module, EPOCHS, train=loader(104, shuffle=True))
    assert said.keys() == {"net.conv2"}
    assert said["net.conv2"].startswith("training_step fails without them (RuntimeError")
    assert {name: widths(module)[name] for name in WHOLE} == {**CUT, "net.conv2": 6}


class Picks(Plain):
    """Another neuron is looked at with every fifth batch, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.net.drop.register_forward_hook(lambda module, inputs, output: self.made.append(output))
        self.made = []
        with torch.no_grad():
            self.net.fc1.weight[0] *= 10  # so that it stays

    def training_step(self, batch, batch_idx):
        self.made.clear()
        loss = self.loss(batch)
        return loss + self.made[0][:, 7 if batch_idx % 5 == 4 else 0].square().mean()


def test_another_neuron_that_is_looked_at_seldom_keeps_its_layer_whole():
    module = seeded(Picks)
    assert said_by(module, 3, train=loader(104, shuffle=True)).keys() == {"net.fc1"}
    assert {name: widths(module)[name] for name in WHOLE} == {**CUT, "net.fc1": 8}


class Growing(Deep):
    """The weight of the second part of the loss is 0 at first."""

    def extra(self, batch):
        weight = max(0, self.current_epoch - 11)
        return weight * self.features(batch[0])[2].view(-1, 8).var(0).sum()


def test_what_counts_for_nothing_at_first_keeps_its_layer_whole():
    said = said_by(seeded(Growing), EPOCHS)
    assert said.keys() == {"net.fc1"}
    assert said["net.fc1"].startswith("the gradients of training_step differ")


HOOKS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward",
    "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
    "on_train_batch_end", "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_start",
    "on_validation_epoch_start", "on_validation_batch_start", "validation_step", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_validation_model_train", "lr_scheduler_step",
    "on_train_epoch_end", "on_save_checkpoint",
)  # fmt: skip


def held_in(hook, base, module_of):
    """A class that moves an average of weights in one of its hooks, and does there what its base does."""

    def call(self, *args, **kwargs):
        net = module_of(self, *args).net
        self.average = getattr(self, "average", None) or [p.detach().clone() for p in net.fc1.parameters()]
        for old, new in zip(self.average, net.fc1.parameters(), strict=True):
            old.lerp_(new.detach(), 0.1)
        return getattr(base, hook)(self, *args, **kwargs)

    return type("Held", (base,), {hook: call})


class Scheduled(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("hook", HOOKS)
def test_weights_that_any_hook_reads_keep_their_layers_whole(hook, tmp_path):
    module = seeded(held_in(hook, Scheduled, lambda module, *_: module))
    said = said_by(module, 3, enable_checkpointing=True, default_root_dir=tmp_path)
    assert said.keys() == {"net.conv2", "net.fc1"}
    assert all(reason.startswith(f"{hook} fails without them (RuntimeError") for reason in said.values())
    assert widths(module) == {**WHOLE, "net.conv1": 3}


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_validation_epoch_end"])
def test_weights_that_a_hook_of_a_callback_reads_keep_their_layers_whole(hook):
    callback = held_in(hook, L.Callback, lambda callback, trainer, module: module)()
    module = seeded(Plain)
    module.configure_callbacks = lambda: [callback]
    said = said_by(module, 3)
    assert {name: reason.partition(" ")[0] for name, reason in said.items()} == {"net.conv2": hook, "net.fc1": hook}


class Gathering(Plain):
    """What the steps of an epoch have made is looked at when it is over, and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {"training": [], "validation": []}
        self.net.fc2.register_forward_pre_hook(self.gather)

    def gather(self, layer, inputs):
        self.made["training" if self.training else "validation"].append(inputs[0].detach())

    def on_validation_epoch_end(self):
        self.look("validation")

    def on_train_epoch_end(self):
        self.look("training")

    def look(self, stage):
        self.log(stage, (torch.cat(self.made[stage]) @ self.net.fc2.weight.T).mean())
        self.made[stage].clear()


class Broken(Plain):
    """Its hooks do with no other module than this one; what they do there need not be known."""

    def on_train_epoch_end(self):
        assert self is self.trainer.lightning_module

    def optimizer_step(self, *args, **kwargs):
        assert self is self.trainer.lightning_module
        super().optimizer_step(*args, **kwargs)


@pytest.mark.parametrize("make", [Gathering, Broken, Manual, Scheduled])
def test_what_ends_with_its_epoch_or_runs_on_no_copy_keeps_no_layer_whole(make):
    module = seeded(make)
    assert said_by(module, 3) == {}
    assert widths(module) == CUT


class Outgoing(Plain):
    """Writes, prints, saves and stops in its hooks, some of it in epochs to come."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    def tell(self, what):
        with open(self.folder / "told", "a") as file:
            file.write(f"{what} {self.current_epoch}\n")
        print(f"{what} {self.current_epoch}")

    def on_train_epoch_start(self):
        self.tell("start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.tell(batch_idx)

    def on_validation_epoch_end(self):
        self.tell("validation")

    def on_train_epoch_end(self):
        self.tell("end")
        torch.save({}, self.folder / f"saved {self.current_epoch}")
        self.trainer.save_checkpoint(self.folder / f"checkpoint {self.current_epoch}")
        if self.current_epoch >= 2:
            self.trainer.should_stop = True


class Best(L.pytorch.callbacks.ModelCheckpoint):
    """The user's own kind of a callback of Lightning's, which removes files."""

    ends = Mock(return_value=None)

    def on_validation_end(self, trainer, pl_module):
        self.ends()
        super().on_validation_end(trainer, pl_module)


def test_to_look_ahead_writes_says_and_stops_nothing(tmp_path, capsys):
    seen = []
    for name, callbacks in (("without", []), ("with", [pruner("weight_l2", amount=0.33, scope="layer")])):
        folder = tmp_path / name
        folder.mkdir()
        best = Best(folder / "best", "{epoch}", monitor="val_loss", mode="max", save_top_k=1)
        module = seeded(lambda folder=folder: Outgoing(folder))
        trainer = fit(module, [*callbacks, best], max_epochs=EPOCHS, enable_checkpointing=True)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.parent == folder)
        told = [line for line in capsys.readouterr().out.splitlines() if line[-1:].isdigit() and len(line) < 20]
        seen.append((trainer.current_epoch, files, (folder / "told").read_text(), told))
        assert len([*(folder / "best").iterdir()]) == 1
        assert best.ends.call_count == 1 + 3  # with the sanity check
        best.ends.reset_mock()
    assert seen[0] == seen[1]
    assert seen[1][0] == 3
    assert widths(module) == CUT


class Endless(IterableDataset):
    """A stream without a length."""

    def __iter__(self):
        return iter(dataset())


RUNS = {
    "plain": (Plain, {}),
    "two optimizers": (TwoOptimizers, {}),
    "accumulated": (Plain, {"accumulate_grad_batches": 2}),
    "many batches": (Plain, {"train": loader(13, batch_size=1)}),
    "validated twice an epoch": (Plain, {"val_check_interval": 2}),
    "no length": (Plain, {"train": DataLoader(Endless(), 8)}),
}


@pytest.mark.parametrize("run", RUNS)
def test_moments_to_come_are_those_that_come(run):
    make, options = RUNS[run]
    expected, found = Probe("on_validation_end", lambda trainer, module: moments_to_come(trainer)), {}
    after = {}

    class Recorder(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            key = trainer.current_epoch, batch_idx
            found[key] = trainer.fit_loop.total_batch_idx, trainer.global_step, trainer.is_last_batch

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            after[trainer.current_epoch, batch_idx] = trainer.global_step

    fit(seeded(make), [expected, Recorder()], max_epochs=EPOCHS, **options)
    batches, round_steps = max(batch_idx for _, batch_idx in found) + 1, set()
    for number in (100, 1000):  # the first batch before which so many steps have been made
        reached = [key for key, (_, step, _) in found.items() if step == number]
        round_steps |= {reached[0]} if reached else set()
    first = expected.seen[0]
    steps = [(one.epoch, one.batch_idx) for one in first if one.kind == "step"]
    following = {*sorted(key for key in found if key[0])[:10], (1, batches - 1)}
    assert steps == sorted(following | {(epoch, 0) for epoch in (*range(2, 12), EPOCHS - 1)} | round_steps)
    assert [one.epoch for one in first if one.kind == "end"] == [1, EPOCHS - 1]
    for one in (one for epoch in range(EPOCHS - 1) for one in expected.seen[epoch] if one.kind == "step"):
        key = one.epoch, one.batch_idx
        batches, before, is_last = found[key]
        assert (one.batches, one.steps, one.is_last) == (batches, (before, after[key]), is_last)
