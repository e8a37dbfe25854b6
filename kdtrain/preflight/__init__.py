"""What can be seen before money is spent: models, rows and token ids that do not fit.

A run is checked in this order, each step before the next one costs more:

| when | what | where |
|---|---|---|
| before torch is imported | the config, and the files that it names | `config/load.py`, `files.py` |
| before rows are read | model folders | `runs/build.py` |
| while rows are read | rows, their lengths, answers and images | `data/dataset.py`, `runs/read_data.py` |
| before a model is loaded | memory by part, what makes it fit, disk | `resources.py`, `memory.py`, `remedies.py` |
| while the trainer is built | arguments, vocabularies, token ids | `trainer/argument_checks.py`, `token_ids.py` |
| then | both models on a few tokens and an image, positions against lengths | `model_checks.py`, `positions.py` |
| then | visual features and their projectors | `feature_kd/term.py` |
| then | whether the teacher's targets stand at the right tokens | `alignment.py` |
| then | how much changes what the teacher alone reads | `context.py` |
| before the first step | steps, optimizer, scheduler, the best metric | `trainer/startup_checks.py` |
"""
