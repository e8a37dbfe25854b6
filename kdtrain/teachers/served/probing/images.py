"""Whether a server looks at the images of a chat."""

from __future__ import annotations

from kdtrain.errors import KdtrainError
from kdtrain.teachers.served.images import ImageRow, image_is_seen
from kdtrain.teachers.served.probing.ask import Asker


def check_images(asker: Asker, row: ImageRow) -> None:
    """Do the answers for a row change with its image?"""
    teacher = asker.teacher
    sizes = {"top_k": asker.top_k, "vocab_size": teacher.vocab_size}
    try:
        seen = teacher.servers.run(image_is_seen(teacher.servers, teacher.model, row, server=asker.url, **sizes))
    except KdtrainError as error:
        asker.say("error", "base_url", f"The server gives no targets for a row with an image: {error}")
        return
    if seen:
        asker.say("info", "base_url", "The image of a row is seen")
    else:
        message = f"The server does not look at images: its answer for row {row.name} is the same with a blank one"
        hint = "serve the vision-language model itself, or use rlhf.teacher.backend: hf"
        asker.say("error", "base_url", message, hint)
