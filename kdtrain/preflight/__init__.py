"""What can be seen before money is spent: models, rows and token ids that do not fit."""
