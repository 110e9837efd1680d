"""The student: its trainer, the answers that it learns from, its teachers and losses."""
