"""How a model is shared among ranks: not at all, replicated, or sharded."""
