"""What every run stands on: files, processes, records, what was spent, what decides a result, the console."""
