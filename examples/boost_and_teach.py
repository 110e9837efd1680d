"""The method in a few lines: boost experts on easy questions, label hard ones, teach a student.

Usage: python examples/boost_and_teach.py [folder]
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
    score_answers,
    split_questions,
)

folder = sys.argv[1] if len(sys.argv) > 1 else "run/boost_and_teach"
questions = QuestionFormat(prompt_template="{prompt}=", answer_prefix="")
easy = load_questions({"characters": "reverse", "size": 300, "seed": 1, "min_length": 3, "max_length": 4})
hard = load_questions({"characters": "reverse", "size": 500, "seed": 2, "min_length": 4, "max_length": 6})
hard = exclude_questions(hard, [easy])
easy = split_questions(easy, {"train": 200, "validation": 50})
hard = split_questions(hard, {"unlabelled": 200, "test": 100})
tokenizer = load_tokenizer("scratch:char-weak")
settings = {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 16}

trainer = BoostingTrainer(
    "scratch:char-weak",
    args=BoostingConfig(output_dir=f"{folder}/boosting", num_rounds=2, **settings),
    train_dataset=easy["train"],
    eval_dataset=easy["validation"],
    processing_class=tokenizer,
    question_format=questions,
    on_round=lambda record: print(f"round {record['round']}: error {record['error']:.3f}, {record['validation']}"),
)
ensemble = trainer.train()

answers = ensemble.label(hard["unlabelled"], tokenizer, max_new_tokens=10)
student = StudentTrainer(
    "scratch:char-strong",
    args=StudentConfig(output_dir=f"{folder}/student", **settings),
    train_dataset=answers,
    question_format=questions,
)
model = student.train()

for name, answerer in (("ensemble", ensemble), ("student", model)):
    scores = score_answers(answerer, hard["test"], tokenizer, question_format=questions)
    print(f"{name}: {scores.accuracy:.0%} of the hard test questions right")
