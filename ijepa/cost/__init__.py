"""What a recipe costs before it is started: operations, memory, days on a GPU."""
