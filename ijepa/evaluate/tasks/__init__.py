"""Labelled images to evaluate on, read from disk as their makers lay them out, or rendered."""

from ijepa.evaluate.tasks.opening import TASKS, open_task
from ijepa.evaluate.tasks.task import Split, Task, TaskDataError

__all__ = ["TASKS", "Split", "Task", "TaskDataError", "open_task"]
