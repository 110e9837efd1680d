"""One model fine-tuned on weighted answer tokens, with checkpoints, without padding."""
