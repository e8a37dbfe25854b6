"""trl's GKDTrainer on a job: what a user writes by the example of its documentation. `python trl_script.py JOB`."""

import json
import sys

from datasets import load_dataset
from transformers import AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
trainer = GKDTrainer(
    model=job["student"],
    teacher_model=job["teacher"],
    args=GKDConfig(**job["options"]),
    processing_class=AutoTokenizer.from_pretrained(job["student"]),
    train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
)
trainer.train(resume_from_checkpoint=job["resume"] or None)
trainer.save_model()
