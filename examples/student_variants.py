"""Teach the same student in every way: from answers, from distributions (kept, and live), with its own certainty.

Usage: python examples/student_variants.py [folder]
"""

import sys

from ensemw2s import (
    BoostingConfig,
    BoostingTrainer,
    QuestionFormat,
    StudentConfig,
    StudentTrainer,
    exclude_questions,
    load_questions,
    load_tokenizer,
    split_questions,
)

folder = sys.argv[1] if len(sys.argv) > 1 else "run/student_variants"
questions = QuestionFormat(prompt_template="{prompt}=", answer_prefix="")
easy = load_questions({"characters": "reverse", "size": 300, "seed": 1, "min_length": 3, "max_length": 4})
hard = load_questions({"characters": "reverse", "size": 500, "seed": 2, "min_length": 4, "max_length": 6})
hard = split_questions(exclude_questions(hard, [easy]), {"unlabelled": 150, "test": 100})
tokenizer = load_tokenizer("scratch:char-weak")
settings = {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 16}

ensemble = BoostingTrainer(
    "scratch:char-weak",
    args=BoostingConfig(output_dir=f"{folder}/boosting", num_rounds=2, **settings),
    train_dataset=easy,
    processing_class=tokenizer,
    question_format=questions,
).train()

# Beside each answer token the ensemble's 8 likeliest tokens; killed, the same call goes on behind the finished rows.
answers = ensemble.label(
    hard["unlabelled"], tokenizer, max_new_tokens=10, top_logprobs=8, output_file=f"{folder}/answers.jsonl",
)  # fmt: skip

variants = {
    "sft": ({"variant": "sft"}, None),
    "soft, from the cache": ({"variant": "soft"}, None),
    "soft, live teachers": ({"variant": "soft"}, ensemble),
    "soft, half of it": ({"variant": "soft", "soft_weight": 0.5, "temperature": 2.0}, ensemble),
    "confidence": ({"variant": "confidence"}, None),
    "sft on the surest half": ({"variant": "sft", "keep_fraction": 0.5}, None),
}
for name, (variant, teacher) in variants.items():
    trainer = StudentTrainer(
        "scratch:char-strong",
        args=StudentConfig(output_dir=f"{folder}/student", **variant, **settings),
        train_dataset=answers,
        question_format=questions,
        teacher=teacher,
    )
    trainer.train()
    right = trainer.evaluate(hard["test"])["eval_accuracy"]
    print(f"{name} student: {right:.0%} of hard test questions right after {trainer.cost.seconds:.0f} s")
