"""Depth and codecs of links, set to what the first steps of a run measured."""
