"""Images that a procedure draws: shapes, and scenes of solids, with labels."""
