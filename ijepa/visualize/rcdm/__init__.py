"""RCDM: what a pooled representation holds, shown by a diffusion model that decodes it (extra
`rcdm`)."""
