"""Tries to break the package: kills, threads, full disks, hostile files, random calls. See `tests.faults.battery`."""
