"""Pretraining from a recipe to a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ijepa.config import Recipe
from ijepa.train import distributed
from ijepa.train.checkpoint import Checkpoint
from ijepa.train.conclusion import conclude
from ijepa.train.from_recipe import choose_device
from ijepa.train.lost_ranks import STOPPED, RankLost
from ijepa.train.resume import how_to_continue
from ijepa.train.run import Run
from ijepa.train.schedules import due
from ijepa.train.stop_signals import StopSignals
from ijepa.train.trainer import LateResult, StepGivenUp
from ijepa.train.waiting import PATIENCE, StoppableWait, StoppedWaiting


@dataclass(frozen=True)
class Outcome:
    """Where a run lies, and whether it took all its steps."""

    folder: Path
    finished: bool


def pretrain(
    recipe: Recipe, *, checkpoint: Checkpoint | None = None, console: Console | None = None
) -> Outcome:
    """Run a recipe, from the start or from a checkpoint of it.

    Args:
        console: where progress is shown; None is silent.

    Raises:
        ValueError: settings, data or checkpoint that do not fit together.
        Diverged: too many steps without an update, or weights that are not finite; the checkpoints
            of before are kept.
        RankLost: another rank is gone; the first rank has saved the last whole step.
        OSError: the last checkpoint, the report or lines of the log could not be written.

    Whatever is raised once the run has begun carries a note that says how to go on, on one rank.
    """
    device = distributed.start(choose_device(recipe.train.device))
    try:
        run = Run(recipe, checkpoint, device, console if distributed.is_main() else None)
        try:
            finished = train(run)
            run.saving.finish()
            if finished:
                conclude(run)
            run.check_written()
        except BaseException as error:
            if _speaks_of(error):
                error.add_note(
                    how_to_continue(run.folder.path, getattr(error, "good_before", None))
                )
            raise
        finally:
            run.close()
        return Outcome(run.folder.path, finished)
    except Exception as error:
        distributed.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        distributed.stop()


def _speaks_of(error: BaseException) -> bool:
    """Whether this rank says how to go on after a failure: the first one that is left."""
    lost = error.ranks if isinstance(error, RankLost) else frozenset()
    left = set(range(distributed.world_size())) - lost
    return distributed.rank() == min(left, default=0)


def train(run: Run) -> bool:
    """Take the remaining steps; False where a signal ended the run early.

    A step's figures are read while the next one runs, so the host never waits for the device.
    """
    train, monitor = run.recipe.train, run.recipe.monitor
    late: LateResult | None = None
    vote = distributed.LateVote(run.device)

    with (
        run.progress,
        StopSignals(run.saving.latest, speaks=distributed.is_main()) as stop,
        StoppableWait(lambda: stop.requested) as wait,
    ):
        if not run.trainer.sharded:  # to save, the ranks of shards have to stop at one step
            run.trainer.give_up = lambda: stop.waited(PATIENCE)
        try:
            if run.first_step == 0 and monitor.every:
                with wait.stoppable():
                    run.look(0)
            run.progress.begin()
            for done, images, masks in wait.over(run.batches()):
                with run.first(f"First step, of {train.batch_size:,} images", done):
                    result = run.trainer.step(images, masks)
                earlier, late = late, LateResult(done, result)
                run.figures.observe(earlier)

                if due(monitor.every, done, train.num_steps):
                    with wait.stoppable():
                        run.look(done)
                stopping = vote.any(stop.requested)
                if stopping or run.saving.due(done):
                    run.figures.observe(late)  # a checkpoint's steps are in the log
                    late = None
                    run.saving.save(done)
                if stopping and done < train.num_steps:
                    return False
            run.figures.observe(late)
        except (StoppedWaiting, StepGivenUp):
            distributed.leave(STOPPED)
            run.figures.observe(late)
            if run.trainer.sharded:
                run.saving.tell_unsaved(run.trainer.step_index)
            else:
                run.saving.save(run.trainer.step_index)
            return False
        except Exception as error:
            run.rescue(late)
            if isinstance(error, RankLost) and error.stopped:
                return False
            raise
    return True
