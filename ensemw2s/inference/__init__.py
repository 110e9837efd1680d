"""What a mixture of models says, be it of one or many: decoding, choices, scores of given answers, labels."""
