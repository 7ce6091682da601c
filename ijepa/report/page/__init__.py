"""The page of `ijepa report`: one HTML file that needs nothing else."""
