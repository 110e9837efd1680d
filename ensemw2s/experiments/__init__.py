"""A whole experiment in one folder, its configuration, its plan, and studies of many."""
