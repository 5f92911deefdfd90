"""LUR inside other people's frameworks; each module imports its framework when it is asked for, not before."""
