"""One file per host; each is the only file that imports its host."""
