"""What train.py is made of: recipes, checkpoints, ranks, evaluation, reports."""
