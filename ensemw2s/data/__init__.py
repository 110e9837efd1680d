"""Questions and what becomes of them: loaded, checked, split, cut by difficulty, tokenised, put into batches."""
