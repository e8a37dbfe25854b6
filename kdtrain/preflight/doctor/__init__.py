"""A doctor for distillation: runs that train without an error, and teach something else or nothing.

| what is wrong | how it is seen | where |
|---|---|---|
| rows of data.eval in data.train, tokens that max_length cuts, answers without an end | the rows | `rows.py` |
| another chat template, thinking on one side, a base student that does not stop | tokenizers | `templates.py` |
| a teacher worse than the student, one that thinks or never stops, equal models | a few rows | `answers.py` |
| a teacher that has not seen the image | its targets with another image | `images.py` |
| a term that hardly moves the student | gradient norms | `gradients.py` |
| targets of other tokens, a prefix without effect | the targets | `../alignment.py`, `../context.py` |
"""
