"""A pretraining run: the steps, the optimiser, checkpoints, ranks, and how it goes on or ends."""
