"""The checkpoints of a run: when they are due, what goes into them, and how a run takes one up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ijepa.config import Recipe
from ijepa.recipes import recipe_to_dict
from ijepa.report.metrics import MetricsWriter
from ijepa.report.progress import RunProgress
from ijepa.train import distributed
from ijepa.train.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointError,
    random_states,
    read_metadata,
    save_checkpoint,
    set_random_states,
    take_up,
    write_checkpoint,
)
from ijepa.train.divergence import check_finite
from ijepa.train.online import Score
from ijepa.train.parallel.shard_writer import ShardWriter
from ijepa.train.run_folder import RunFolder
from ijepa.train.schedules import due
from ijepa.train.trainer import Trainer


class Saving:
    """Saves a run, by its first rank; a sharded one by all, while training goes on.

    Args:
        recipe: settings, lengths in steps.
        data_id: what the data are known by, see `from_recipe.data_fingerprint`.
        seconds: how long the run has trained so far.
        saved_step: of the checkpoint that the run goes on from, None where it begins.

    Attributes:
        unwritten: why the latest save is missing, None where it is not.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: Trainer,
        folder: RunFolder,
        *,
        metrics: MetricsWriter | None,
        progress: RunProgress,
        data_id: dict[str, int | str],
        seconds: Callable[[], float],
        saved_step: int | None,
    ):
        self._recipe, self._trainer, self._folder = recipe, trainer, folder
        self._metrics, self._progress = metrics, progress
        self._data_id, self._seconds = data_id, seconds
        self._saved_step = saved_step
        self._writer = ShardWriter() if trainer.sharded else None
        self._writing: int | None = None  # the step that the shard writer is at
        self._put_off = False
        self._best = _best_before(folder.path, saved_step)
        self.unwritten: OSError | None = None

    def due(self, done: int) -> bool:
        """Whether it is time for a checkpoint.

        While updates are skipped it is put off until one is made again: checkpoints of weights that
        train no further would soon have pushed out the last good ones.
        """
        train = self._recipe.train
        if not (self._put_off or due(train.checkpoint_every, done, train.num_steps)):
            return False
        skipping = bool(self._trainer.consecutive_skips) and done < train.num_steps
        if skipping and not self._put_off:
            self._progress.note(f"step {done}: not saved before there are updates again")
        self._put_off = skipping
        return not skipping

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps, by the first rank, once the log is on the disk.

        Where there is no room it says so and training goes on: the next save tries again. Shards
        are written while training goes on; whether they were is known at the next save or `finish`.

        Raises:
            WeightsNotFinite: nothing was written.
        """
        if self._writer is not None:
            self._save_shards(self._writer, done)
            return
        if self._metrics is None or done == self._saved_step:
            return
        weights = self._trainer.weights()
        check_finite(weights, done)
        try:
            self._sync_folder()
            save_checkpoint(self._folder.path, done, weights=weights, **self._described(done))
        except OSError as error:
            self._not_saved(done, error)
        else:
            self.unwritten, self._saved_step = None, done

    def _save_shards(self, writer: ShardWriter, done: int) -> None:
        self.finish()
        if done == self._saved_step:
            return
        weights = self._trainer.weights()
        check_finite(weights, done)
        try:
            distributed.on_main(self._sync_folder)
            writer.start(self._folder.path, done, weights=weights, **self._described(done))
        except OSError as error:
            self._not_saved(done, error)
        else:
            self._writing = done

    def finish(self) -> None:
        """Wait for what is being written; all ranks of a sharded run have to ask."""
        done, self._writing = self._writing, None
        if self._writer is None or done is None:
            return
        try:
            self._writer.wait()
        except OSError as error:
            self._not_saved(done, error)
        else:
            self.unwritten, self._saved_step = None, done

    def close(self) -> None:
        """Let go of what writes shards; after a failure what it was at may be lost."""
        if self._writer is not None:
            self._writer.close()

    def tell_unsaved(self, done: int) -> None:
        """Of a sharded run that ends where the other ranks may not be asked."""
        self._progress.note(
            f"step {done}: not saved, the shards of ranks that ended would be missing; "
            f"{self.latest() or 'no checkpoint'} stands"
        )

    def _sync_folder(self) -> None:
        """By the first rank: the folder is there, and the log on the disk."""
        assert self._metrics is not None  # the first rank's
        if self._folder.put_back(self._recipe, self._metrics):
            self._progress.note(f"{self._folder.path} was deleted while the run goes on: it is "
                                "back, with recipe.json and metrics.jsonl")  # fmt: skip
        self._metrics.sync()

    def _described(self, done: int) -> dict[str, dict[str, Any]]:
        """Everything in a checkpoint but the weights."""
        return {
            "state": {"trainer": self._trainer.state_dict(), "random": random_states()},
            "metadata": {
                "config": recipe_to_dict(self._recipe),
                "data": {**self._data_id, "next_step": done},
                "seconds": self._seconds(),
            },
        }

    def _not_saved(self, done: int, error: OSError) -> None:
        self.unwritten = error
        self._progress.note(f"step {done}: NOT SAVED, the next save will try again: {error}")

    def keep_if_best(self, done: int, score: Score, weights: dict[str, Tensor]) -> None:
        """Put the weights after `done` steps into checkpoints/best, where none scored higher.

        A figure of another kind than before (labels came or went) counts anew. Where there is no
        room it says so, and the next best is tried.
        """
        before = self._best
        if before is not None and before.figure == score.figure and score.value <= before.value:
            return
        if self._metrics is None or self._trainer.consecutive_skips:
            return
        check_finite(weights, done)
        try:
            write_checkpoint(
                self._folder.path / "checkpoints",
                BEST,
                done,
                weights=weights,
                state={},
                metadata={
                    "config": recipe_to_dict(self._recipe),
                    "data": self._data_id,
                    "score": {"figure": score.figure, "value": score.value},
                },
            )
        except OSError as error:
            self._progress.note(f"step {done}: the best weights were NOT SAVED: {error}")
        else:
            self._best = score

    def latest(self) -> str | None:
        """What there is to go on from, as "step 500"; None before the first checkpoint."""
        return None if self._saved_step is None else f"step {self._saved_step}"


def _best_before(run_folder: Path, saved_step: int | None) -> Score | None:
    """The score of the best weights of a run that goes on; None of a new one, or of weights from
    steps that will be taken again."""
    try:
        metadata = read_metadata(run_folder / "checkpoints" / BEST)
        if saved_step is None or metadata["step"] > saved_step:
            return None
        return Score(str(metadata["score"]["figure"]), float(metadata["score"]["value"]))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None  # there are none, or they are damaged: the next ones take their place


def restore(
    checkpoint: Checkpoint,
    trainer: Trainer,
    *,
    data_id: dict[str, int | str],
    last_step: int,
) -> None:
    """Weights, optimiser, counters and random states of a checkpoint.

    Args:
        data_id: of the run's data, which have to be the checkpoint's.
        last_step: where the run ends.

    Raises:
        CheckpointError: it is of other data, other networks, or a step beyond the last.
    """
    if "trainer" not in checkpoint.state:
        raise CheckpointError(
            f"{checkpoint.path} holds weights alone, those that scored best: they can be used, and "
            f"the run goes on from {checkpoint.path.parent.parent}"
        )
    _check_data(checkpoint, data_id)
    try:
        trainer.load_weights(checkpoint.weights)
        trainer.load_state_dict(checkpoint.state["trainer"])
        set_random_states(checkpoint.state["random"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from None
    if distributed.is_main():
        take_up(checkpoint.path)
    if trainer.step_index != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.path} is of step {checkpoint.step}, but its optimiser of step "
            f"{trainer.step_index}"
        )
    if checkpoint.step > last_step:
        raise CheckpointError(
            f"{checkpoint.path} is of step {checkpoint.step}, beyond train.steps {last_step}"
        )


def _check_data(checkpoint: Checkpoint, data_id: dict[str, int | str]) -> None:
    saved = checkpoint.metadata.get("data", {})
    for name, value in data_id.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{checkpoint.path} was trained on other data: {name} is "
                f"{saved.get(name)!r} there and {value!r} here"
            )
