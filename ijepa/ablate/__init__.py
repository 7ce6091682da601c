"""Many runs that differ in some settings: the paper's ablations, and anybody's own grid."""
