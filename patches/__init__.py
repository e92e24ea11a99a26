"""Run-time changes of what a subclass cannot reach in a host. See README.md."""
