"""Gradients of data-parallel replicas: compressed, exchanged and averaged, with error feedback."""
