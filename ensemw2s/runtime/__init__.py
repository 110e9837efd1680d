"""What every run stands on: files, processes, results kept, what was spent, what decides a result, the console."""
