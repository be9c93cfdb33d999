"""From files on disk to normalised episodes; see notebooks/guides/extending.md."""
