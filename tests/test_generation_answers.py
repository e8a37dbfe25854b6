"""Answers of the teacher, written before training."""

import json

import torch

from kdtrain.data import Collator, Source, build_dataset
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.generation.writers import LocalWriter
from tests.tiny_processors import make_llava, make_llava_model, png


def test_a_teacher_never_writes_a_token_that_stands_for_an_image(tmp_path):
    """The next forward would look for its image, and find none."""
    llava = make_llava()
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "image"}, {"type": "text", "text": "What is the file?"}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = Source(str(tmp_path / "rows.jsonl"), answers="teacher")
    data, _ = build_dataset([source], llava, max_length=128, on_overlength="error", train_on="assistant")
    teacher = make_llava_model(len(llava.tokenizer)).eval()
    image = llava.tokenizer.convert_tokens_to_ids("<image>")

    collate = Collator(llava)
    batch = collate([data[0]])
    inputs = batch.model_inputs
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    with torch.no_grad():
        logits = teacher(**inputs).logits[0, -1]
        assert logits.max() > 0
        teacher.lm_head.weight[image] = 2 * teacher.lm_head.weight[logits.argmax()]
        assert teacher(**inputs).logits[0, -1].argmax() == image

    writer = LocalWriter(
        teacher, llava, collate, max_new_tokens=4, vocabulary=len(llava.tokenizer), batch_size=1, device="cpu"
    )
    answers = TeacherAnswers(writer, tmp_path / "answers", identity={})
    filled = answers.fill(data)
    written = [label for label in filled[0]["labels"] if label != -100]
    assert written
    assert image not in written
    assert written[0] == logits.argmax()
    with torch.no_grad():
        teacher(**collate([filled[0]]).model_inputs)
