"""What a slow link costs: measured between network namespaces, and by a model of the schedule."""
