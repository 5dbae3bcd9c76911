"""Where a trainer runs this process."""

import lightning

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.support.team import Team


def runtime_of(trainer: lightning.Trainer) -> Runtime:
    """Device, processes and precision of a trainer that has set up its strategy."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    team = Team(trainer.global_rank, trainer.world_size, strategy.broadcast)
    return Runtime(strategy.root_device, team, precision.forward_context, str(precision.precision))


def data_of(trainer: lightning.Trainer) -> VisionTasks:
    """A trainer's data module.

    Raises:
        InputError: when it has none, or one of another class.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, VisionTasks):
        raise InputError("the trainer's datamodule must be a VisionTasks")
    return data
