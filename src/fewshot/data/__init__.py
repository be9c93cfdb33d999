"""From files on disk to normalised episodes; see the map in the README."""
