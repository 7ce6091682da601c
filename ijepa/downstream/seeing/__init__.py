"""Pictures of what was learned: `ijepa visualize` and `ijepa report`."""
